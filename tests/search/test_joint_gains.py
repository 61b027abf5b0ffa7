"""The table of joint gains: no set of techniques is worse than a part of it, and the committed rows are what the module says of them."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_models.catalogue import load_hardware
from search.device.host_cells import TECHNIQUES
from search.joint_gains import COLUMNS, SETTINGS, TOGETHER, gains, read_rows, write_rows
from search.plan_space import PlanSearch
from search.search_request import SearchRequest
from simulator.model_source import model_source

RESULTS = Path(__file__).parents[2] / "search" / "results" / "joint_gains.csv"


@pytest.mark.slow
def test_more_techniques_are_never_worse() -> None:
    source = model_source("tests.small_models:residual_mlp", batch=1)
    request = SearchRequest(
        model=source, device=load_hardware("h100-sxm"), global_batch=1, budget_bytes=1 << 40, techniques=TECHNIQUES
    )
    space = PlanSearch(request)
    least = space.with_techniques(("recompute",)).least().peak_bytes
    tight = PlanSearch(
        SearchRequest(model=source, device=request.device, global_batch=1, budget_bytes=least, techniques=TECHNIQUES)
    )
    times: dict[tuple[str, ...], float] = {}
    for gain in gains(tight):
        times[gain.techniques] = gain.found.candidate.step_time_s if gain.found else float("inf")
        assert gain.found is None or gain.found.candidate.peak_bytes <= least
        assert gain.lower_bound_s <= times[gain.techniques]
    assert len(times) == 11
    assert times["recompute",] < float("inf")
    for techniques, seconds in times.items():
        assert all(seconds <= other for part, other in times.items() if set(part) < set(techniques))


def test_rows_are_written_in_the_order_of_the_settings_and_read_back(tmp_path: Path) -> None:
    rows = [dict.fromkeys(COLUMNS, "1") | {"setting": setting.name} for setting in reversed(SETTINGS)]
    write_rows(rows, tmp_path / "rows.csv", columns=COLUMNS, settings=[setting.name for setting in SETTINGS])
    assert read_rows(tmp_path / "rows.csv") == rows[::-1]
    assert read_rows(tmp_path / "none.csv") == []


def test_committed_rows_hold_every_set_and_joint_is_best() -> None:
    rows = read_rows(RESULTS)
    names = list(dict.fromkeys(row["setting"] for row in rows))
    assert names
    assert set(names) <= {setting.name for setting in SETTINGS}
    for name in names:
        own = [row for row in rows if row["setting"] == name]
        assert len(own) == 11
        joint = own[-1]
        assert joint["techniques"] == TOGETHER.join(TECHNIQUES)
        fitting = [float(row["step_time_s"]) for row in own if row["fits"] == "yes"]
        assert float(joint["step_time_s"]) == min(fitting)
        assert float(joint["lower_bound_s"]) <= float(joint["step_time_s"])
        assert all(int(row["peak_memory_bytes"]) <= int(row["budget_bytes"]) for row in own if row["fits"] == "yes")
