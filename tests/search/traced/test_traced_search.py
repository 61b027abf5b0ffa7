"""The joint search for traced models: its answer is that of brute force, its bounds hold, and what it returns is what was asked for."""

from __future__ import annotations

import math

import numpy as np
import pytest

from hardware_models.errors import InfeasibleError, InputError
from search.traced.chain_bounds import ChainBounds
from search.traced.request import traced_request
from search.traced.space import SPACE_SCHEDULES, traced_space
from search.traced.step_bounds import step_bound
from search.traced.traced_search import space_of, traced_search
from search.trainers import trainer_of
from tests.search.traced.traced_cases import CONVOLUTIONS, MLP, every_plan, request_of, shared_plans, simulated

TOLERANCE = 1 + 1e-9
LITTLE = 153_000
"""Bytes: 0.7 times what the fastest plan of the convolutions takes."""
SETTINGS = ((MLP, "a40-pairs", 2, 4), (CONVOLUTIONS, "a100-pcie-8x", 2, 4))


@pytest.mark.slow
@pytest.mark.parametrize(("setting", "budget"), [(SETTINGS[0], None), (SETTINGS[1], LITTLE)])
def test_the_certified_answer_is_that_of_brute_force(setting: tuple[str, str, int, int], budget: int | None) -> None:
    """Through the reference engine; with all memory, and with less than the fastest plan needs."""
    model, cluster, gpus, batch = setting
    plans = shared_plans(model, cluster, gpus, batch)
    allow = ("split-batch",) if model == CONVOLUTIONS else ()
    request = request_of(model, cluster=cluster, gpus=gpus, batch=batch, budget=budget, allow=allow)
    found = traced_search(request, plans=plans)
    every = [simulated(plans, plan, engine="simpy") for plan in every_plan(space_of(request, plans), plans)]
    fitting = [one.step_time_s for one in every if one is not None and one.fits]
    assert found.certified
    assert found.simulation.fits
    assert found.simulation.step_time_s == pytest.approx(min(fitting), rel=1e-9)
    assert budget is None or any(one is not None and not one.fits for one in every)


@pytest.mark.slow
@pytest.mark.parametrize("setting", [SETTINGS[0], (CONVOLUTIONS, "a100-pcie-8x", 4, 8)])
def test_no_plan_is_below_its_bounds(setting: tuple[str, str, int, int]) -> None:
    """Of a sample of plans, and of all without stages: the point's bound and the plan's own one, in seconds and bytes."""
    model, cluster, gpus, batch = setting
    plans, request = shared_plans(*setting), request_of(model, cluster=cluster, gpus=gpus, batch=batch)
    space = space_of(request, plans)
    bounds = ChainBounds(space, plans.simulator).seconds()
    alone = [index for index, point in enumerate(space.points) if point.pp == 1]
    for index in {*alone, *np.random.default_rng(0).choice(len(space), 24, replace=False).tolist()}:
        case = plans.plain(space.plan(index))
        own, found = step_bound(case, plans.simulator.stage_library(case.plan)), case.simulate()
        assert 0.0 < bounds[index] <= own.seconds * TOLERANCE
        assert own.seconds <= found.step_time_s * TOLERANCE
        assert 0 < own.needed_bytes <= max(found.peak_memory_bytes)


@pytest.mark.slow
def test_the_answer_uses_the_devices_and_beats_every_baseline() -> None:
    request = request_of()
    found = traced_search(request, plans=shared_plans(*SETTINGS[0]))
    assert found.plan.num_gpus == request.cluster.num_gpus
    assert found.plan.batch.global_batch == request.global_batch
    assert found.simulation.step_time_s <= min(one.step_time_s for one in found.baselines if one.fits)
    assert {one.name.split(",")[0] for one in found.baselines} == {"data parallel", "full sharding", "GPipe"}
    assert set(found.to_json()) >= {
        "best",
        "lower_bound_s",
        "gap",
        "certified",
        "space_size",
        "num_simulated",
        "elapsed_s",
        "baselines",
        "pareto",
    }
    assert found.lower_bound_s <= found.simulation.step_time_s


@pytest.mark.slow
def test_what_does_not_fit_says_what_would() -> None:
    with pytest.raises(
        InfeasibleError, match=r"over 2 devices fits 1000 bytes .*; the least that was seen is \d+ bytes"
    ) as raised:
        traced_search(request_of(budget=1000), plans=shared_plans(*SETTINGS[0]))
    needed = raised.value.needed_bytes
    assert 1000 < needed < math.inf
    assert traced_search(request_of(budget=needed), plans=shared_plans(*SETTINGS[0])).simulation.fits


def test_a_model_that_mixes_samples_keeps_its_share_whole_unless_that_is_allowed() -> None:
    sizes = {}
    for allow in ((), ("split-batch",)):
        space = traced_space(request_of(CONVOLUTIONS, allow=allow), num_blocks=4, mixes_samples=True)
        sizes[allow] = {(point.dp, point.micro_batch) for point in space.points}
        assert {point.schedule for point in space.points} <= set(SPACE_SCHEDULES)
    assert sizes[()] == {(2, 2), (1, 4)}
    assert sizes["split-batch",] == {(2, 2), (2, 1), (1, 4), (1, 2), (1, 1)}


@pytest.mark.parametrize(("flags", "message"), [
    ({"allow": ("fp8",)}, "known for a traced model over several devices are split-batch, tf32, bf16"),
    ({"trainer": "megatron"}, "megatron trains transformers that it builds itself"),
])  # fmt: skip
def test_what_traced_models_cannot_be_asked_for_is_refused(flags: dict[str, object], message: str) -> None:
    request = request_of()
    with pytest.raises(InputError, match=message):
        traced_request(
            request.source, request.cluster, request.device, trainer_of(str(flags.get("trainer", "any"))), global_batch=4, allow=flags.get("allow", ()),  # type: ignore[arg-type]
        )  # fmt: skip
