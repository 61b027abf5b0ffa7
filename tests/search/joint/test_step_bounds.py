"""Refined bounds: passes in chunks beside copies, traffic beside what is made again, and how close they come to the simulator."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from search.joint.layer_tables import LayerTables
from search.joint.played_step_kernels import Passes, Played, Slowdown, Staged, StageSeconds, play_step
from search.joint.step_bounds import StepBounds
from search.stage_recompute import simulate_on_cluster
from simulator.model_source import ModelSource
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan
from tests.search.joint.bound_samples import SMALL

KEPT = Slowdown(compute=1.25, traffic=2.0)


def passes(kinds: list[int], batches: list[int]) -> Passes:
    """Of one rank with one stage."""
    count = len(kinds)
    no = np.zeros(count, np.bool_)
    return Passes(
        first=np.array([0, count]), stage=np.zeros(count, np.int64), kind=np.array(kinds), micro_batch=np.array(batches), sends=no,
        opens=np.arange(count) == 0, closes=np.arange(count) == count - 1, rank_of=np.zeros((1, max(batches) + 1), np.int64),
    )  # fmt: skip


def seconds(forward: float, backward: float, *, reduce: float = 0.0, chunks: int = 1, lead: float = 0.0) -> StageSeconds:
    """Of one stage, all of it compute."""
    one = {
        "forward": forward, "forward_compute": forward, "backward": backward, "backward_compute": backward, "weight": 0.0, "gather": 0.0, "first": 0.0,
        "first_back": 0.0, "reduce": reduce, "lead": lead,
    }  # fmt: skip
    return StageSeconds(chunks=np.array([chunks]), **{name: np.array([value]) for name, value in one.items()})


def staged(chunks: int, forward: float, backward: float, *, leave: float, come: float, fetch: float = 0.0) -> Staged:
    """Equal chunks."""
    rows = (np.full((1, chunks), value) for value in (forward, backward, backward, leave, come, fetch, fetch))
    return Staged(np.array([chunks]), *rows)


def end_s(found: Played) -> float:
    return float(found.end[0])


def test_chunks_wait_for_their_copies() -> None:
    """Forward chunks run at 0, 1, 4 and 7 s and have left by 4, 7, 10 and 13 s; the last micro-batch comes back from 13 s on."""
    order = passes([0, 0, 3, 3], [0, 1, 0, 1])
    own = staged(2, 1.0, 2.0, leave=3.0, come=1.0)
    assert end_s(play_step(order, seconds(2.0, 4.0), own, 0.0, False, False, False, KEPT)) == pytest.approx(18.0)


def test_parameters_come_two_chunks_ahead() -> None:
    """Four chunks of 1 s, each after a fetch of 2 s: the link is never idle, and the last chunk ends 1 s after it."""
    order = passes([0], [0])
    own = staged(4, 1.0, 1.0, leave=0.0, come=0.0, fetch=2.0)
    assert end_s(play_step(order, seconds(4.0, 4.0), own, 0.0, False, False, False, KEPT)) == pytest.approx(9.0)


def test_gradients_go_behind_the_chunks_that_make_them() -> None:
    """Of two chunks of 4 s the second one runs beside 2 s of traffic, which take 4 s then and 0.8 s of compute; the other 2 s end the step."""
    order = passes([0, 3], [0, 0])
    own = staged(2, 1.0, 4.0, leave=0.0, come=0.0)
    found = play_step(order, seconds(2.0, 8.0, reduce=4.0, chunks=16), own, 0.0, False, False, False, KEPT)
    assert end_s(found) == pytest.approx(2.0 + 4.0 + 4.0 + 0.8 + 2.0)


def test_what_is_made_again_comes_before_gradients() -> None:
    """After 1 s forward and 6 s again, 2 s of gradients in two buckets of 1 s of traffic each: the first one beside the last second (then 1.25 s, of traffic 0.625 s)."""
    order = passes([0, 3], [0, 0])
    none = Staged(np.zeros(1, np.int64), *(np.zeros((1, 0)) for _ in range(7)))
    found = play_step(order, seconds(1.0, 8.0, reduce=2.0, chunks=2, lead=6.0), none, 0.0, False, False, False, KEPT)
    assert end_s(found) == pytest.approx(1.0 + 6.0 + 1.0 + 1.25 + 2.0 - 0.625)


def test_a_rank_turns_with_what_is_left() -> None:
    """2.75 s of parameters beside 4 s forward: for 5 s both go on, which leaves 0.25 s that the pass ends with; 8 s backward and 4 s of gradients are left then."""
    order = passes([0, 3], [0, 0])
    none = Staged(np.zeros(1, np.int64), *(np.zeros((1, 0)) for _ in range(7)))
    own = seconds(4.0, 8.0, reduce=4.0)._replace(gather=np.array([2.75]), first=np.array([0.0]))
    found = play_step(order, own, none, 0.0, False, False, False, KEPT)
    assert float(found.turned[0]) == pytest.approx(5.0 + 0.25 + 8.0)
    assert float(found.traffic[0]) == pytest.approx(4.0)


def test_a_second_of_traffic_has_its_price() -> None:
    """2 s beside compute, which does 1.6 s of work in them: 0.4 s more."""
    assert KEPT.price == pytest.approx(0.4)


@pytest.mark.parametrize("part", [0.5, 1.0])
def test_bounds_of_staged_plans_are_near_simulated_steps(part: float) -> None:
    setting, memory = SMALL[0], Memory(zero_stage=2, activation_offload=part)
    request = setting.request()
    device = load_hardware(request.cluster.device)
    source = ModelSource(name=setting.model, config=request.config, batch=setting.batch, seq_len=setting.seq_len)
    plan = Plan(
        parallel=Parallel(pp=2, dp=2, virtual_stages=2), batch=Batch(global_batch=8, micro_batch=2, seq_len=setting.seq_len),
        pipeline=Pipeline(schedule="interleaved"), memory=memory,
    )  # fmt: skip
    step_s = simulate_on_cluster(source, plan, request.cluster, reserved=False, device=device).step_time_s
    bounds = StepBounds(LayerTables(request, device), source)
    plain = replace(plan, memory=Memory(zero_stage=2))
    found = bounds.bounds(plain, {memory: bounds.order(replace(plain, memory=memory))}, np.inf)[0]
    assert 0.95 * step_s < found.seconds <= step_s
