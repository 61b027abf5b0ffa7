"""Joint gains over a cluster: what a set of techniques allows, no set worse than a part of it, and the committed rows."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from search.joint import cluster_gains
from search.joint.cluster_gains import SETTINGS, TECHNIQUES, Technique, gains, trainer_with
from search.joint.memory_variants import memory_variants
from search.joint_gains import TOGETHER, read_rows
from search.trainers import TRAINERS, violations
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan

RESULTS = Path(__file__).parents[3] / "search" / "results" / "cluster_gains.csv"
SIZES: dict[str, Any] = {"parallel": Parallel(pp=2, dp=2), "batch": Batch(global_batch=8, micro_batch=1)}
PLANS: dict[Technique, Plan] = {
    "recompute": Plan(**SIZES, memory=Memory(recompute="full")),
    "offload": Plan(**SIZES, memory=Memory(activation_offload=0.5)),
    "sharding": Plan(**SIZES, memory=Memory(zero_stage=1)),
    "orders": Plan(**SIZES, pipeline=Pipeline(schedule="zb-h1")),
}


@pytest.mark.parametrize("technique", TECHNIQUES)
def test_a_technique_is_allowed_where_it_is_named_and_nowhere_else(technique: Technique) -> None:
    others = [one for one in TECHNIQUES if one != technique]
    assert violations(PLANS[technique], trainer_with([technique])) == ()
    assert violations(PLANS[technique], trainer_with(others)) != ()
    assert violations(Plan(**SIZES), trainer_with(())) == ()


def test_all_techniques_are_all_that_the_simulator_runs() -> None:
    assert trainer_with(TECHNIQUES) == TRAINERS["any"]
    (alone,) = memory_variants(trainer_with(()), Plan(**SIZES))
    assert alone == Memory()


def answer(seconds: float, bound_s: float) -> Any:
    return SimpleNamespace(simulation=SimpleNamespace(step_time_s=seconds), lower_bound_s=bound_s)


def test_a_search_that_ends_early_is_no_worse_than_its_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    """Recompute alone finds 3 s, offload alone nothing; both together were cut off at 5 s, all at 4 s."""
    found = {
        "recompute": answer(3.0, 2.0),
        "recompute + offload": answer(5.0, 1.0),
        TOGETHER.join(TECHNIQUES): answer(4.0, 0.5),
    }

    def searched(_setting: object, techniques: Sequence[str], _limit: float) -> Any:
        return found.get(TOGETHER.join(techniques))

    monkeypatch.setattr(cluster_gains, "_searched", searched)
    made = {TOGETHER.join(gain.techniques): gain for gain in gains(SETTINGS[0])}
    sets = [chosen for count in (1, 2, len(TECHNIQUES)) for chosen in combinations(TECHNIQUES, count)]
    assert list(made) == [TOGETHER.join(chosen) for chosen in sets]
    times = {name: gain.found and gain.found.simulation.step_time_s for name, gain in made.items()}
    assert all(times[name] == (3.0 if "recompute" in name else None) for name in times)
    assert made["recompute + offload"].lower_bound_s == 1.0
    assert made["recompute + orders"].lower_bound_s == 0.0, "its own search found nothing in time, and so proved nothing"
    assert made[TOGETHER.join(TECHNIQUES)].lower_bound_s == 0.5
    assert made["offload"].lower_bound_s is None


def test_committed_rows_hold_every_set_and_joint_is_best() -> None:
    rows = read_rows(RESULTS)
    names = list(dict.fromkeys(row["setting"] for row in rows))
    assert names
    assert set(names) <= {setting.name for setting in SETTINGS}
    for name in names:
        own = [row for row in rows if row["setting"] == name]
        assert len(own) == 11
        assert own[-1]["techniques"] == TOGETHER.join(TECHNIQUES)
        fitting = [row for row in own if row["fits"] == "yes"]
        assert float(own[-1]["step_time_s"]) == min(float(row["step_time_s"]) for row in fitting)
        for row in fitting:
            assert float(row["lower_bound_s"]) <= float(row["step_time_s"])
            used = int(row["tp"]) * int(row["cp"]) * int(row["pp"]) * int(row["dp"])
            assert used == int(row["gpus"])
