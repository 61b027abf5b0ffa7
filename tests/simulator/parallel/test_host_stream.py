"""The host launches passes on a stream of its own: equal stages with round times to launch them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import engine_compiled
from simulator.exposed_time import exposed_times
from simulator.parallel.host_python import HostStalls
from simulator.parallel.lower_step import StepParts
from simulator.parallel.stages import StageCost
from simulator.pipeline.action import Order
from simulator.pipeline.one_way import one_f_one_b
from simulator.pipeline.zero_bubble import zb_h1
from simulator.program import Stream
from tests.simulator.parallel.step_cases import BACKWARD_S, FORWARD_S, WEIGHT_S, equal_cost, lowered, parts_of

BOTH_S = FORWARD_S + BACKWARD_S


def launched(forward_s: float, backward_s: float, weight_s: float = 0.0) -> StageCost:
    """The stage of equal steps, with times to launch its passes."""
    cost = equal_cost()
    return replace(
        cost, forward=replace(cost.forward, host_s=forward_s), backward=replace(cost.backward, host_s=backward_s), weight_host_s=weight_s
    )  # fmt: skip


def with_host(parts: StepParts, cost: StageCost) -> StepParts:
    return replace(parts, costs=[cost] * parts.order.num_stages)


def step_s(parts: StepParts) -> float:
    return engine_compiled.record(lowered(parts)).makespan_s


def test_a_host_that_keeps_up_with_every_pass_is_left_out() -> None:
    program = lowered(with_host(parts_of(one_f_one_b(2, 4)), launched(FORWARD_S, BACKWARD_S)))
    assert Stream.DISPATCH not in program.stream.tolist()


def test_one_rank_is_as_slow_as_its_host() -> None:
    """Launching takes 5 s forward (computing 3) and 4 s backward (computing 7), m times, one after the other.

    The host is done with forward pass m at 9 m + 5; a backward pass's 7 s of computing follow and are always launched in time.
    """
    parts = with_host(parts_of(one_f_one_b(1, 4)), launched(5.0, 4.0))
    program = lowered(parts)
    record = engine_compiled.record(program)
    launches_s = [5.0 + 9.0 * m for m in range(4)]
    end_s = 0.0
    for m in range(4):
        end_s = max(end_s + FORWARD_S, launches_s[m]) + BACKWARD_S
    assert record.makespan_s == pytest.approx(end_s, rel=1e-12)
    times = exposed_times(program, record)
    assert times["host"] == pytest.approx(end_s - 4 * BOTH_S, rel=1e-12)


def test_a_step_bound_by_its_host_takes_the_hosts_time() -> None:
    """Both passes take 10 times as long to launch: all launches in a row on one rank."""
    assert step_s(with_host(parts_of(one_f_one_b(1, 5)), launched(30.0, 70.0))) == pytest.approx(500.0, rel=1e-12)


def test_the_weights_pass_takes_its_part_of_the_launches() -> None:
    """ZB-H1 on one rank: launches of 4, 20 - 6 and 6 s in a row."""
    cost = launched(4.0, 20.0, 6.0)
    program = lowered(with_host(parts_of(zb_h1(1, 1)), cost))
    spans_s = program.duration_s[program.stream == Stream.DISPATCH].tolist()
    assert spans_s == [4.0, 14.0, 6.0]
    assert engine_compiled.record(program).makespan_s == 24.0
    assert WEIGHT_S < 6.0


@settings(max_examples=30, deadline=None)
@given(
    forward_s=st.floats(0.0, 20.0),
    backward_s=st.floats(0.0, 20.0),
    more_s=st.floats(0.0, 5.0),
    ranks=st.integers(1, 4),
    batches=st.integers(1, 6),
)
def test_a_slower_host_never_helps(forward_s: float, backward_s: float, more_s: float, ranks: int, batches: int) -> None:
    plain = parts_of(one_f_one_b(ranks, batches))
    first = step_s(with_host(plain, launched(forward_s, backward_s)))
    assert first >= max(step_s(plain), batches * (forward_s + backward_s)) * (1 - 1e-12)
    assert step_s(with_host(plain, launched(forward_s + more_s, backward_s))) >= first * (1 - 1e-12)


def stalled(order: Order, *, batch_s: float = 0.0, exchange_s: float = 0.0, waits: bool = True) -> StepParts:
    return replace(parts_of(order, waits=waits), stalls=HostStalls(batch_s=batch_s, exchange_s=exchange_s))


def test_an_idle_device_waits_for_each_batch() -> None:
    """One rank: half a second before each of four forward passes, none before backward ones."""
    parts = stalled(one_f_one_b(1, 4), batch_s=0.5)
    program = lowered(parts)
    record = engine_compiled.record(program)
    assert record.makespan_s == pytest.approx(4 * (BOTH_S + 0.5), rel=1e-12)
    assert exposed_times(program, record)["host"] == pytest.approx(4 * 0.5, rel=1e-12)


def test_an_exchange_stalls_the_pass_that_takes_the_message() -> None:
    """Two ranks, one micro-batch: the message forward and its gradient back."""
    parts = stalled(one_f_one_b(2, 1), exchange_s=0.25)
    assert step_s(parts) == pytest.approx(2 * BOTH_S + 2 * 0.25, rel=1e-12)
    assert step_s(stalled(one_f_one_b(2, 1), exchange_s=0.25, waits=False)) == pytest.approx(2 * BOTH_S, rel=1e-12)


def test_each_run_of_an_attention_that_is_read_back_stalls() -> None:
    """One rank, three micro-batches: two runs of attention in each forward pass and one again in each backward pass."""
    stalls = HostStalls(attention_s=0.25)
    parts = replace(parts_of(one_f_one_b(1, 3)), stalls=stalls, attention_runs=[(2, 1)])
    assert step_s(parts) == pytest.approx(3 * (BOTH_S + 3 * 0.25), rel=1e-12)


def test_a_stalled_host_launches_from_an_idle_device_on() -> None:
    """Launching takes 5 s forward, after half a second for the batch: host and device wait for each other at each forward pass."""
    parts = with_host(stalled(one_f_one_b(1, 3), batch_s=0.5), launched(5.0, 4.0))
    assert step_s(parts) == pytest.approx(3 * (0.5 + 5.0 + BACKWARD_S), rel=1e-12)


def test_the_weights_pass_never_waits_for_messages() -> None:
    """ZB-H1 on two ranks: stalls before forward passes and inputs' gradients only."""
    program = lowered(stalled(zb_h1(2, 3), batch_s=0.5, exchange_s=0.25))
    spans_s = sorted(program.duration_s[program.stream == Stream.DISPATCH].tolist())
    assert spans_s == [0.25] * 3 + [0.5] * 3 + [0.75] * 3
