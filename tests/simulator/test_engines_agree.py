"""Both engines on random programs: same times, same memory, and what must hold on every program."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.network.sharing import max_min_rates
from simulator import engine_compiled, engine_simpy
from simulator.program import Kind, MemoryClass, Program, Stream, Transfers, no_slowdown, no_transfers
from simulator.run_record import DeadlockError, queues_of

MOST_DEVICES, MOST_INSTRUCTIONS, MOST_LINKS = 3, 24, 4
TIMES = st.one_of(st.integers(0, 4).map(float), st.floats(0.0, 10.0))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Programs whose dependencies have lower indices, so that they end; each allocates what it frees later."""
    num = draw(st.integers(1, MOST_INSTRUCTIONS))
    devices = draw(st.integers(1, MOST_DEVICES))
    dependencies = [sorted(draw(st.sets(st.integers(0, n - 1), max_size=3))) if n else [] for n in range(num)]
    durations = np.array([draw(TIMES) for _ in range(num)])
    links = draw(st.integers(1, MOST_LINKS))
    moving = [n for n in range(num) if draw(st.integers(0, 3)) == 0]
    routes = [sorted(draw(st.sets(st.integers(0, links - 1), min_size=1, max_size=3))) for _ in moving]
    transfers = Transfers(
        instruction=np.array(moving, dtype=np.int64), size_bytes=np.array([float(draw(st.integers(1, 8))) for _ in moving]),
        limit_bytes_per_s=np.array([draw(st.sampled_from([np.inf, 1.0, 2.5])) for _ in moving]),
        route_offsets=np.cumsum([0, *(len(route) for route in routes)], dtype=np.int64), routes=np.array([link for route in routes for link in route], dtype=np.int64),
        link_bytes_per_s=np.array([float(draw(st.integers(1, 4))) for _ in range(links)]),
    )  # fmt: skip
    slowdown = no_slowdown()
    for _ in range(draw(st.integers(0, 4))):
        slowdown[draw(st.sampled_from(Stream)), draw(st.sampled_from(Stream))] = draw(st.sampled_from([1.0, 1.25, 2.0, 1.7]))
    sizes = [draw(st.integers(0, 5)) for _ in range(num)]
    events = [[(0.0, size), (float(durations[n]), -size)] if draw(st.booleans()) else [] for n, size in enumerate(sizes)]
    flat = [event for own in events for event in own]
    return Program(
        kind=np.full(num, Kind.FORWARD, dtype=np.int8), device=np.array([draw(st.integers(0, devices - 1)) for _ in range(num)], dtype=np.int32),
        stream=np.array([draw(st.sampled_from([Stream.COMPUTE, Stream.H2D, Stream.D2H, Stream.TP])) for _ in range(num)], dtype=np.int8), duration_s=durations,
        micro_batch=np.zeros(num, dtype=np.int32), block=np.arange(num, dtype=np.int32), option_index=np.zeros(num, dtype=np.int16),
        dependency_offsets=np.cumsum([0, *(len(own) for own in dependencies)], dtype=np.int64), dependencies=np.array([other for own in dependencies for other in own], dtype=np.int64),
        memory_offsets=np.cumsum([0, *(len(own) for own in events)], dtype=np.int64), memory_time_s=np.array([event[0] for event in flat]),
        memory_bytes=np.array([event[1] for event in flat], dtype=np.int64), memory_class=np.full(len(flat), MemoryClass.ACTIVATIONS, dtype=np.int8),
        resident_bytes=((0,) * len(MemoryClass),) * devices, transfers=transfers, slowdown=slowdown,
    )  # fmt: skip


@settings(max_examples=150, deadline=None)
@given(programs())
def test_engines_agree_in_time_and_memory(program: Program) -> None:
    reference, compiled = engine_simpy.record(program), engine_compiled.record(program)
    np.testing.assert_allclose(compiled.start_s, reference.start_s, rtol=1e-9, atol=0)
    np.testing.assert_allclose(compiled.end_s, reference.end_s, rtol=1e-9, atol=0)
    np.testing.assert_array_equal(compiled.start_count, reference.start_count)
    np.testing.assert_array_equal(compiled.end_count, reference.end_count)
    for one, other in zip(engine_simpy.run(program)[1], engine_compiled.run(program)[1], strict=True):
        np.testing.assert_array_equal(one.alive_bytes, other.alive_bytes)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_streams_dependencies_and_memory(program: Program) -> None:
    record = engine_compiled.record(program)
    for queue in queues_of(program).values():
        assert all(record.end_s[before] <= record.start_s[after] for before, after in pairwise(queue))
    for n in range(program.num_instructions):
        waited = program.dependencies[program.dependency_offsets[n] : program.dependency_offsets[n + 1]]
        assert (record.end_s[waited] <= record.start_s[n]).all()
        assert record.end_s[n] >= (record.start_s[n] + program.duration_s[n]) * (1 - 1e-12)
    _, profiles = engine_compiled.run(program)
    assert all((profile.alive_bytes[-1] == profile.alive_bytes[0]).all() for profile in profiles)
    busiest = max(sum(program.duration_s[n] for n in queue) for queue in queues_of(program).values())
    assert record.end_s.max() >= busiest * (1 - 1e-9)
    assert record.end_s.max() >= critical_path_s(program) * (1 - 1e-9)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_links_carry_no_more_than_their_rate(program: Program) -> None:
    """Bytes over a link in the whole run fit its rate times the time during which something used it."""
    record, transfers = engine_compiled.record(program), program.transfers
    for link, rate in enumerate(transfers.link_bytes_per_s):
        rows = [
            row
            for row in range(len(transfers.instruction))
            if link in transfers.routes[transfers.route_offsets[row] : transfers.route_offsets[row + 1]]
        ]
        starts = [record.start_s[n] + program.duration_s[n] for n in transfers.instruction[rows]]
        ends = [record.end_s[n] for n in transfers.instruction[rows]]
        if rows:
            assert sum(transfers.size_bytes[rows]) <= rate * (max(ends) - min(starts)) * (1 + 1e-9)


@settings(max_examples=60, deadline=None)
@given(programs())
def test_without_a_clock_times_are_the_same(program: Program) -> None:
    free = replace(program, transfers=no_transfers(), slowdown=no_slowdown())
    record = engine_compiled.record(free)
    start_s, end_s = engine_compiled.times(free)
    np.testing.assert_array_equal(start_s, record.start_s)
    np.testing.assert_array_equal(end_s, record.end_s)


def test_times_without_a_clock_are_refused_where_links_are_shared_or_nothing_can_end() -> None:
    program = two_copies(slowdown=no_slowdown())
    with pytest.raises(ValueError, match="only where no transfers and no slow-down are, use record"):
        engine_compiled.times(program)
    stuck = replace(program, transfers=no_transfers(), dependency_offsets=np.array([0, 1, 2]), dependencies=np.array([1, 0]))
    with pytest.raises(ValueError, match="only 0 of 2 instructions can end"):
        engine_compiled.times(stuck)


def test_without_slowdown_a_link_that_nobody_shares_is_full() -> None:
    rates = max_min_rates([[0], [1]], [3.0, 5.0])
    assert rates.tolist() == [3.0, 5.0]


def test_two_copies_share_a_link_and_one_goes_on_alone() -> None:
    """Two copies of 4 and 8 bytes on one link of 2 B/s: 1 B/s each until 4 s, then 2 B/s for the 4 left: 6 s."""
    program = two_copies(slowdown=no_slowdown())
    for engine in (engine_simpy, engine_compiled):
        assert engine.record(program).end_s.tolist() == [4.0, 6.0]


def test_slowdown_lasts_as_long_as_the_other_stream_runs() -> None:
    """Compute of 3 s beside a copy of 4 s, each twice as slow under the other: both at half speed until compute ends at 6 s, then the copy's last second."""
    slowdown = no_slowdown()
    slowdown[Stream.COMPUTE, Stream.H2D] = slowdown[Stream.H2D, Stream.COMPUTE] = 2.0
    program = replace(
        two_copies(slowdown=slowdown),
        duration_s=np.array([3.0, 4.0]),
        transfers=no_transfers(),
    )
    program = replace(program, stream=np.array([Stream.COMPUTE, Stream.H2D], dtype=np.int8), device=np.zeros(2, dtype=np.int32))
    for engine in (engine_simpy, engine_compiled):
        assert engine.record(program).end_s.tolist() == [6.0, 7.0]


def test_a_deadlock_is_the_same_for_both() -> None:
    program = replace(two_copies(slowdown=no_slowdown()), dependency_offsets=np.array([0, 1, 2]), dependencies=np.array([1, 0]))
    messages = []
    for engine in (engine_simpy, engine_compiled):
        with pytest.raises(DeadlockError, match=">>F0 mb0<<") as caught:
            engine.run(program)
        messages.append(str(caught.value))
    assert messages[0] == messages[1]


def two_copies(*, slowdown: np.ndarray) -> Program:
    return Program(
        kind=np.zeros(2, dtype=np.int8), device=np.array([0, 1], dtype=np.int32), stream=np.full(2, Stream.H2D, dtype=np.int8), duration_s=np.zeros(2),
        micro_batch=np.zeros(2, dtype=np.int32), block=np.arange(2, dtype=np.int32), option_index=np.zeros(2, dtype=np.int16), dependency_offsets=np.zeros(3, dtype=np.int64),
        dependencies=np.empty(0, dtype=np.int64), memory_offsets=np.zeros(3, dtype=np.int64), memory_time_s=np.empty(0), memory_bytes=np.empty(0, dtype=np.int64),
        memory_class=np.empty(0, dtype=np.int8), resident_bytes=((0,) * len(MemoryClass),) * 2, slowdown=slowdown,
        transfers=Transfers(
            instruction=np.array([0, 1]), size_bytes=np.array([4.0, 8.0]), limit_bytes_per_s=np.full(2, np.inf), route_offsets=np.array([0, 1, 2]),
            routes=np.array([0, 0]), link_bytes_per_s=np.array([2.0]),
        ),
    )  # fmt: skip


def critical_path_s(program: Program) -> float:
    """Longest chain of durations over dependencies and streams."""
    before = {
        n: list(program.dependencies[program.dependency_offsets[n] : program.dependency_offsets[n + 1]])
        for n in range(program.num_instructions)
    }
    for queue in queues_of(program).values():
        for first, second in pairwise(queue):
            before[second].append(first)
    ends: dict[int, float] = {}
    for n in range(program.num_instructions):
        ends[n] = max((ends[int(other)] for other in before[n]), default=0.0) + float(program.duration_s[n])
    return max(ends.values())
