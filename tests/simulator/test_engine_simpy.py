"""The reference engine: semantics by hand on small programs, and what must hold on every program."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.engine_simpy import run
from simulator.program import Kind, MemoryClass, Program, Stream
from simulator.run_record import DeadlockError, MemoryBalanceError

NO_BYTES = (0,) * len(MemoryClass)


@dataclass(frozen=True, kw_only=True)
class Step:
    """One instruction of a test program; memory events are (offset, bytes, class)."""

    duration_s: float
    device: int = 0
    stream: Stream = Stream.COMPUTE
    after: tuple[int, ...] = ()
    memory: tuple[tuple[float, int, MemoryClass], ...] = field(default=())


def program_of(steps: Sequence[Step], resident: Sequence[tuple[int, ...]] = (NO_BYTES,)) -> Program:
    events = [event for step in steps for event in step.memory]
    return Program(
        kind=np.full(len(steps), Kind.FORWARD, dtype=np.int8),
        device=np.array([step.device for step in steps], dtype=np.int32),
        stream=np.array([step.stream for step in steps], dtype=np.int8),
        duration_s=np.array([step.duration_s for step in steps], dtype=np.float64),
        micro_batch=np.zeros(len(steps), dtype=np.int32),
        block=np.arange(len(steps), dtype=np.int32),
        option_index=np.zeros(len(steps), dtype=np.int16),
        dependency_offsets=np.cumsum([0, *(len(step.after) for step in steps)], dtype=np.int64),
        dependencies=np.array([other for step in steps for other in step.after], dtype=np.int64),
        memory_offsets=np.cumsum([0, *(len(step.memory) for step in steps)], dtype=np.int64),
        memory_time_s=np.array([event[0] for event in events], dtype=np.float64),
        memory_bytes=np.array([event[1] for event in events], dtype=np.int64),
        memory_class=np.array([event[2] for event in events], dtype=np.int8),
        resident_bytes=tuple(resident),
    )


def spans_of(steps: Sequence[Step]) -> dict[str, tuple[float, float]]:
    timeline, _ = run(program_of(steps, [NO_BYTES] * (1 + max(step.device for step in steps))))
    return {span.name: (span.start_s, span.end_s) for span in timeline.spans}


def bytes_of(steps: Sequence[Step]) -> list[tuple[float, int]]:
    _, (profile,) = run(program_of(steps))
    return list(zip(profile.time_s.tolist(), profile.total_bytes.tolist(), strict=True))


def kept(offset_s: float, size_bytes: int) -> tuple[float, int, MemoryClass]:
    return offset_s, size_bytes, MemoryClass.ACTIVATIONS


def test_a_stream_is_first_in_first_out_and_dependencies_wait() -> None:
    steps = [
        Step(duration_s=2.0),
        Step(duration_s=3.0, stream=Stream.D2H, after=(0,)),
        Step(duration_s=1.0, after=(1,)),
        Step(duration_s=1.0),
        Step(duration_s=1.0, device=1, after=(2,)),
    ]
    assert spans_of(steps) == {
        "F0 mb0": (0.0, 2.0), "F1 mb0": (2.0, 5.0), "F2 mb0": (5.0, 6.0), "F3 mb0": (6.0, 7.0), "F4 mb0": (6.0, 7.0),
    }  # fmt: skip


def test_a_dependency_may_have_a_higher_index() -> None:
    steps = [Step(duration_s=1.0, after=(1,)), Step(duration_s=2.0, stream=Stream.H2D)]
    assert spans_of(steps)["F0 mb0"] == (2.0, 3.0)


def test_an_empty_program_is_its_resident_bytes() -> None:
    timeline, (profile,) = run(program_of([], [(5, 4, 3, 2, 1, 0, 0)]))
    assert timeline.makespan_s == 0.0
    assert (profile.time_s.tolist(), profile.peak_bytes, profile.peak_breakdown_bytes["gradients"]) == ([0.0], 15, 4)


def test_events_of_one_instant_keep_their_order_in_an_instruction() -> None:
    steps = [Step(duration_s=1.0, memory=(kept(0.0, 4), kept(0.5, 8), kept(0.5, -4), kept(1.0, 2), kept(1.0, -8)))]
    assert bytes_of(steps) == [(0.0, 0), (0.0, 4), (0.5, 12), (0.5, 8), (1.0, 10), (1.0, 2)]


def test_ends_precede_starts() -> None:
    steps = [
        Step(duration_s=1.0),
        Step(duration_s=1.0, memory=(kept(0.0, 5),)),  # starts at 1, where the copy ends and frees
        Step(duration_s=1.0, stream=Stream.D2H, memory=(kept(0.0, 3), kept(1.0, -3))),
    ]
    assert bytes_of(steps) == [(0.0, 0), (0.0, 3), (1.0, 0), (1.0, 5)]


def test_starts_of_one_instant_go_by_index() -> None:
    steps = [Step(duration_s=1.0, stream=Stream.D2H, memory=(kept(0.0, 1),)), Step(duration_s=1.0, memory=(kept(0.0, 2),))]
    assert bytes_of(steps) == [(0.0, 0), (0.0, 1), (0.0, 3)]


def test_an_instruction_without_duration_ends_before_others_start() -> None:
    steps = [
        Step(duration_s=0.0, memory=(kept(0.0, 7), kept(0.0, -7))),
        Step(duration_s=1.0, stream=Stream.D2H, memory=(kept(0.0, 1),)),
        Step(duration_s=0.0, memory=(kept(0.0, 2),)),
    ]
    assert [total for _, total in bytes_of(steps)] == [0, 7, 0, 1, 3]


def test_frees_in_the_midst_precede_and_allocations_follow() -> None:
    steps = [
        Step(duration_s=2.0, memory=(kept(0.0, 4), kept(1.0, -4))),
        Step(duration_s=2.0, stream=Stream.H2D, memory=(kept(1.0, 16),)),
        Step(duration_s=1.0, stream=Stream.D2H, memory=(kept(1.0, 2),)),
    ]
    assert bytes_of(steps) == [(0.0, 0), (0.0, 4), (1.0, 0), (1.0, 2), (1.0, 18)]


def test_a_deadlock_prints_the_grid() -> None:
    steps = [
        *(Step(duration_s=1.0) for _ in range(5)),
        Step(duration_s=1.0, after=(7,)),
        Step(duration_s=1.0),
        Step(duration_s=1.0, device=1, after=(5,)),
        Step(duration_s=1.0, device=1, stream=Stream.H2D),
    ]
    with pytest.raises(DeadlockError) as caught:
        run(program_of(steps, [NO_BYTES] * 2))
    assert str(caught.value).splitlines() == [
        "deadlock: >> << marks the instruction of each stream that cannot start",
        "  device 0 COMPUTE ... | F2 mb0 | F3 mb0 | F4 mb0 | >>F5 mb0<< | F6 mb0   waits for F7 mb0 (device 1 COMPUTE)",
        "  device 1 COMPUTE >>F7 mb0<<   waits for F5 mb0 (device 0 COMPUTE)",
        "  device 1 H2D     F8 mb0   finished",
    ]


def test_bytes_below_zero_name_the_instruction() -> None:
    steps = [Step(duration_s=1.0, memory=(kept(0.0, 4),)), Step(duration_s=1.0, memory=((0.5, -4, MemoryClass.GRADIENTS),))]
    message = "device 0: bytes of every class >= 0 must hold, but gradients falls to -4 in instruction 1 (F1 mb0)"
    with pytest.raises(MemoryBalanceError, match=re.escape(message)):
        run(program_of(steps))


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Any program whose dependencies have lower indices; its events balance within each instruction."""
    num_devices = draw(st.integers(1, 3))
    steps: list[Step] = []
    for n in range(draw(st.integers(0, 16))):
        duration_s = draw(st.sampled_from([0.0, 0.5, 1.0, 2.0]) | st.floats(0, 3))
        size = draw(st.integers(1, 100))
        kind = draw(st.sampled_from(MemoryClass))
        early, late = sorted(draw(st.tuples(st.floats(0, 1), st.floats(0, 1))))
        memory = ((early * duration_s, size, kind), (late * duration_s, -size, kind)) if draw(st.booleans()) else ()
        after = draw(st.sets(st.integers(0, n - 1), max_size=3)) if n else set()
        steps.append(
            Step(
                duration_s=duration_s, device=draw(st.integers(0, num_devices - 1)), stream=draw(st.sampled_from(Stream)),
                after=tuple(sorted(after)), memory=memory,
            )
        )  # fmt: skip
    resident = [
        tuple(draw(st.lists(st.integers(0, 100), min_size=len(MemoryClass), max_size=len(MemoryClass))))
        for _ in range(num_devices)
    ]
    return program_of(steps, resident)


def dependencies_of(program: Program, n: int) -> list[int]:
    return program.dependencies[program.dependency_offsets[n] : program.dependency_offsets[n + 1]].tolist()


@given(programs())
def test_streams_do_not_overlap_and_dependencies_hold(program: Program) -> None:
    timeline, _ = run(program)
    by_block = {span.block: span for span in timeline.spans}
    assert sorted(by_block) == list(range(program.num_instructions))
    assert [(s.start_s, s.device, s.stream) for s in timeline.spans] == sorted(
        (s.start_s, s.device, s.stream) for s in timeline.spans
    )
    queues: dict[tuple[int, Stream], list[int]] = {}
    for n, span in sorted(by_block.items()):
        assert span.end_s == span.start_s + program.duration_s[n]
        assert all(by_block[other].end_s <= span.start_s for other in dependencies_of(program, n))
        queues.setdefault((span.device, span.stream), []).append(n)
    for queue in queues.values():
        assert all(by_block[earlier].end_s <= by_block[later].start_s for earlier, later in pairwise(queue))


@given(programs())
def test_no_instruction_waits_without_a_reason(program: Program) -> None:
    timeline, _ = run(program)
    by_block = {span.block: span for span in timeline.spans}
    last: dict[tuple[int, Stream], int] = {}
    for n, span in sorted(by_block.items()):
        reasons = [
            *dependencies_of(program, n),
            *([last[span.device, span.stream]] if (span.device, span.stream) in last else []),
        ]
        assert span.start_s == max((by_block[other].end_s for other in reasons), default=0.0)
        last[span.device, span.stream] = n


@given(programs())
def test_makespan_is_at_least_the_critical_path_and_the_busiest_stream(program: Program) -> None:
    timeline, _ = run(program)
    longest: list[float] = []
    busy: dict[tuple[int, int], float] = {}
    for n in range(program.num_instructions):
        before = max((longest[other] for other in dependencies_of(program, n)), default=0.0)
        longest.append(before + float(program.duration_s[n]))
        queue = (int(program.device[n]), int(program.stream[n]))
        busy[queue] = busy.get(queue, 0.0) + float(program.duration_s[n])
    assert timeline.makespan_s >= max([0.0, *longest, *busy.values()]) * (1 - 1e-12)


@given(programs())
def test_balanced_events_return_to_the_resident_bytes(program: Program) -> None:
    _, profiles = run(program)
    assert [profile.device for profile in profiles] == list(range(program.num_devices))
    assert sum(len(profile.time_s) for profile in profiles) == len(program.memory_bytes) + program.num_devices
    for profile, resident in zip(profiles, program.resident_bytes, strict=True):
        assert tuple(profile.alive_bytes[0]) == tuple(profile.alive_bytes[-1]) == resident
        assert profile.time_s[0] == 0.0
        assert (np.diff(profile.time_s) >= 0).all()
        assert profile.peak_bytes <= sum(resident) + program.memory_bytes[program.memory_bytes > 0].sum()


@given(programs())
def test_a_second_run_is_equal(program: Program) -> None:
    (first, first_profiles), (second, second_profiles) = run(program), run(program)
    assert first == second
    for one, other in zip(first_profiles, second_profiles, strict=True):
        assert one.time_s.tobytes() == other.time_s.tobytes()
        assert one.alive_bytes.tobytes() == other.alive_bytes.tobytes()
