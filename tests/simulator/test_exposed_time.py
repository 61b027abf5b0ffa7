"""Whose time it is: hand-worked programs, and parts that sum to the step on random ones."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from simulator import engine_compiled
from simulator.exposed_time import TIME_CLASSES, exposed_times
from simulator.parallel.traced_writer import ProgramWriter
from simulator.program import Kind, MemoryClass, Program, Stream, no_slowdown

NOTHING = (0,) * len(MemoryClass)


class Case:
    """A program of two devices, written instruction by instruction."""

    def __init__(self) -> None:
        self.writer = ProgramWriter()

    def compute(self, duration_s: float, *after: int, device: int = 0, kind: Kind = Kind.FORWARD) -> int:
        """An instruction of a compute stream."""
        return self.writer.issue(kind, device, Stream.COMPUTE, duration_s, after=after)

    def move(self, stream: Stream, duration_s: float, *after: int, device: int = 0) -> int:
        """A transfer."""
        return self.writer.issue(Kind.TRANSFER, device, stream, duration_s, after=after)

    def times(self) -> dict[str, float]:
        """Exposed times that are not zero."""
        program = self.writer.program([NOTHING, NOTHING], no_slowdown())
        times = exposed_times(program, engine_compiled.record(program))
        assert tuple(times) == TIME_CLASSES
        return {name: seconds for name, seconds in times.items() if seconds}


def test_compute_counts_by_its_kind() -> None:
    case = Case()
    for kind, seconds in (
        (Kind.FORWARD, 1.0),
        (Kind.RECOMPUTE, 2.0),
        (Kind.BACKWARD, 4.0),
        (Kind.REDUCE, 8.0),
        (Kind.OPTIMIZER, 16.0),
    ):
        case.compute(seconds, kind=kind)
    assert case.times() == {"compute": 13.0, "recompute": 2.0, "optimizer": 16.0}


@pytest.mark.parametrize(
    ("stream", "name"),
    [
        (Stream.TP, "tp"), (Stream.CP, "cp"), (Stream.EP, "ep"), (Stream.DP, "dp"), (Stream.SEND, "pp"), (Stream.H2D, "offload"),
        (Stream.D2H, "offload"), (Stream.HOST, "host"),
    ],
)  # fmt: skip
def test_a_transfer_that_compute_waits_for_is_exposed(stream: Stream, name: str) -> None:
    case = Case()
    first = case.compute(3.0)
    case.compute(1.0, case.move(stream, 2.0, first))
    assert case.times() == {"compute": 4.0, name: 2.0}


def test_only_what_sticks_out_behind_compute_is_exposed() -> None:
    case = Case()
    copy = case.move(Stream.H2D, 5.0)
    case.compute(3.0)
    case.compute(1.0, copy)
    assert case.times() == {"compute": 4.0, "offload": 2.0}


def test_a_transfer_that_nobody_waits_for_is_not() -> None:
    case = Case()
    case.move(Stream.DP, 3.0)
    case.compute(5.0)
    assert case.times() == {"compute": 5.0}


def test_a_chain_of_collectives_is_told_apart() -> None:
    case = Case()
    tp = case.move(Stream.TP, 1.0, case.compute(3.0))
    case.compute(1.0, case.move(Stream.EP, 4.0, case.move(Stream.CP, 2.0, tp)))
    assert case.times() == {"compute": 4.0, "tp": 1.0, "cp": 2.0, "ep": 4.0}


def test_a_marker_behind_a_queue_exposes_the_queue() -> None:
    """Three buckets on one stream and an empty instruction behind them that the optimizer waits for."""
    case = Case()
    last = case.compute(2.0)
    for _ in range(3):
        case.move(Stream.DP, 1.5, last)
    case.compute(1.0, case.move(Stream.DP, 0.0, last), kind=Kind.OPTIMIZER)
    assert case.times() == {"compute": 2.0, "dp": 4.5, "optimizer": 1.0}


def test_what_another_rank_does_is_bubble_and_its_message_is_not() -> None:
    """The other rank computes 3 s, reduces 2 s over its own group, sends 1 s."""
    case = Case()
    reduced = case.move(Stream.TP, 2.0, case.compute(3.0, device=1), device=1)
    case.compute(9.0, case.move(Stream.SEND, 1.0, reduced, device=1))
    assert case.times() == {"compute": 9.0, "bubble": 5.0, "pp": 1.0}


def test_waiting_for_another_ranks_compute_is_bubble() -> None:
    case = Case()
    case.compute(2.0, case.compute(4.0, device=1))
    assert case.times() == {"compute": 2.0, "bubble": 4.0}


def test_the_rank_that_ends_last_is_explained_and_ties_go_to_the_lowest() -> None:
    case = Case()
    case.compute(2.0)
    case.compute(3.0, device=1, kind=Kind.RECOMPUTE)
    assert case.times() == {"recompute": 3.0}
    case.compute(1.0)
    assert case.times() == {"compute": 3.0}


def test_the_end_of_the_step_belongs_to_what_ends_it() -> None:
    case = Case()
    case.move(Stream.DP, 2.0, case.compute(3.0))
    assert case.times() == {"compute": 3.0, "dp": 2.0}


@st.composite
def programs(draw: st.DrawFn) -> Program:
    """Random instructions on the streams of two devices; each waits for some before it; transfers may take no time."""
    writer = ProgramWriter([2.0, 3.0])
    streams = (Stream.COMPUTE, Stream.COMPUTE, Stream.DP, Stream.TP, Stream.SEND, Stream.H2D, Stream.HOST)
    for n in range(draw(st.integers(1, 20))):
        stream = draw(st.sampled_from(streams))
        kind = (
            draw(st.sampled_from([Kind.FORWARD, Kind.BACKWARD, Kind.OPTIMIZER])) if stream == Stream.COMPUTE else Kind.TRANSFER
        )
        after = draw(st.sets(st.integers(0, n - 1), max_size=3)) if n else set()
        duration_s = float(draw(st.integers(0, 3))) if draw(st.booleans()) else draw(st.floats(0.0, 5.0))
        index = writer.issue(kind, draw(st.integers(0, 1)), stream, duration_s, after=after)
        if stream == Stream.SEND:
            writer.route(index, float(draw(st.integers(1, 6))), 2.0, (draw(st.integers(0, 1)),))
    slowdown = no_slowdown()
    slowdown[Stream.COMPUTE, Stream.DP] = draw(st.sampled_from([1.0, 1.3]))
    return writer.program([NOTHING, NOTHING], slowdown)


@settings(max_examples=200, deadline=None)
@given(programs())
def test_parts_sum_to_the_step(program: Program) -> None:
    record = engine_compiled.record(program)
    times = exposed_times(program, record)
    assert sum(times.values()) == pytest.approx(record.end_s.max(), rel=1e-9, abs=1e-12)
    assert min(times.values()) >= 0.0
    rank = int(np.argmax([max(record.end_s[program.device == device], default=0.0) for device in range(program.num_devices)]))
    own = (program.device == rank) & (program.stream == Stream.COMPUTE)
    busy_s = (record.end_s - record.start_s)[own].sum()
    assert times["compute"] + times["optimizer"] == pytest.approx(busy_s, rel=1e-9, abs=1e-12)
