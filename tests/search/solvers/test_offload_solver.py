"""Recompute with offload against brute force, byte by byte, and against recompute alone."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import replace
from fractions import Fraction
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InfeasibleError, InputError
from search.chain_problem import ChainProblem
from search.chain_schedules import evaluate, store_all
from search.chain_solver import minimum_limit_bytes, solve_chain
from search.solvers.offload_problem import HostLink, OffloadProblem, OffloadStep, evaluate_offload, segment_cost, stretch_of
from search.solvers.offload_solver import minimum_offload_bytes, solve_offload
from simulator.sequence import Operation, check_sequence
from tests.chain_cases import all_persistent_sequences, chains, long_chain

LINK = HostLink(out_bytes_per_s=1.0, in_bytes_per_s=1.0)


def all_steps(chain: ChainProblem, first: int = 0) -> Iterator[tuple[OffloadStep, ...]]:
    """Every schedule: each split into steps, option, sequence of a segment, and choice of what goes to the host."""
    if first == chain.num_stages:
        yield ()
        return
    for stop, offloaded in product(range(first + 1, chain.num_stages + 1), (False, True)):
        ways: list[tuple[str, tuple[Operation, ...], int]] = []
        if stop == first + 1:
            ways += [(option, (), 0) for option in chain.option_names[first]]
        if stop < chain.num_stages:
            for found in all_persistent_sequences(stretch_of(chain, first, stop)):
                moved = tuple(Operation(kind, stage + first, option) for kind, stage, option in found)
                ways.append(("", moved, segment_cost(chain, moved, first, stop)[1]))
        for rest in all_steps(chain, stop):
            for option, moved, peak in ways:
                step = OffloadStep(
                    first=first, stop=stop, option=option, offloaded=offloaded, recompute=moved, recompute_bytes=peak
                )
                yield (step, *rest)


class ByteByByte:
    """One direction of the link: counts single bytes, each of which takes 1 / rate seconds."""

    def __init__(self, limit: int, kept: int, rate: int) -> None:
        self.limit, self.kept, self.rate, self.waiting, self.pinned, self.byte_times = limit, kept, rate, 0, 0, 0

    def run(self, seconds: float, need: int, busy_s: float, *, reads_input: bool) -> bool:
        """Waits for room, then runs; whether there can be room."""
        if self.kept + need + (self.pinned if reads_input else 0) > self.limit:
            return False
        while self.kept + self.waiting + need > self.limit:
            self.waiting -= 1
            self.byte_times += 1
        ticks = int(seconds) * self.rate
        self.byte_times += ticks
        for _ in range(ticks - int(busy_s) * self.rate):
            self.waiting = max(0, self.waiting - 1)
        return True

    def leave(self, size: int, pinned: int, *, offloaded: bool) -> None:
        """Keeps the item of a step, or hands it to the link."""
        self.kept += 0 if offloaded else size
        self.waiting += size if offloaded else 0
        self.pinned = pinned if offloaded else 0

    @property
    def seconds(self) -> Fraction:
        """Until all has been moved."""
        return Fraction(self.byte_times + self.waiting, self.rate)


def replay(problem: OffloadProblem, steps: tuple[OffloadStep, ...], limit: int) -> float:
    """Time of a schedule, counted byte by byte; inf where it does not fit."""
    chain, top = problem.chain, problem.chain.num_stages - 1
    out = ByteByByte(limit, chain.boundary_bytes[0], int(problem.link.out_bytes_per_s))
    back = ByteByByte(limit, chain.boundary_bytes[0], int(problem.link.in_bytes_per_s))
    out_busy, in_busy = problem.busy_s("out"), problem.busy_s("in")
    for step in steps:
        i, fits = step.first, True
        if step.option:
            o = chain.option_names[i].index(step.option)
            item = chain.saved_bytes[i][o]
            peak = chain.resident_bytes[top] + chain.boundary_gradient_bytes[top + 1] + chain.forward_peak_bytes[i][o]
            fits &= out.run(chain.forward_s[i][o], peak, out_busy[i], reads_input=True)
            peak = chain.resident_bytes[i] + chain.backward_peak_bytes[i][o]
            fits = fits and back.run(chain.backward_s[i][o], peak, in_busy[i], reads_input=True)
        else:
            item = chain.boundary_bytes[step.stop]
            for stage in range(i, step.stop):
                peak = (
                    chain.held_bytes(top) + chain.discard_peak_bytes[stage] + (chain.boundary_bytes[stage] if stage > i else 0)
                )
                fits = fits and out.run(chain.discard_s[stage], peak, out_busy[stage], reads_input=stage == i)
            busy = sum(in_busy[i : step.stop])
            seconds, peak = segment_cost(chain, step.recompute, i, step.stop)
            fits = fits and back.run(seconds, peak, busy, reads_input=True)
        if not fits:
            return math.inf
        out.leave(item, chain.boundary_bytes[step.stop], offloaded=step.offloaded)
        back.leave(item, chain.boundary_bytes[step.stop], offloaded=step.offloaded)
    return float(out.seconds + back.seconds)


def with_outputs_saved(chain: ChainProblem) -> ChainProblem:
    """The chain whose graphs save their outputs, as they must."""
    outputs = chain.boundary_bytes[1:]
    saved = tuple(tuple(max(size, output) for size in row) for row, output in zip(chain.saved_bytes, outputs, strict=True))
    return replace(chain, saved_bytes=saved)


@st.composite
def problems(draw: st.DrawFn) -> OffloadProblem:
    chain = draw(chains(size=7, most_stages=4, most_sequences=40))
    chain = with_outputs_saved(chain)
    rates, busy = st.integers(1, 3).map(float), st.tuples(*[st.integers(0, 2).map(float)] * chain.num_stages)
    return OffloadProblem(
        chain=chain,
        link=HostLink(out_bytes_per_s=draw(rates), in_bytes_per_s=draw(rates)),
        out_busy_s=tuple(min(a, *f, d) for a, f, d in zip(draw(busy), chain.forward_s, chain.discard_s, strict=True)),
        in_busy_s=tuple(min(a, *b) if len(b) > 1 else min(a, b[0]) for a, b in zip(draw(busy), chain.backward_s, strict=True)),
    )


@settings(max_examples=25)
@given(problems(), st.integers(0, 12))
def test_equals_brute_force(problem: OffloadProblem, more: int) -> None:
    least = minimum_offload_bytes(problem.chain)
    schedules = list(all_steps(problem.chain))
    assert all(replay(problem, steps, least - 1) == math.inf for steps in schedules)
    limit = least + more
    times = [replay(problem, steps, limit) for steps in schedules]
    solution = solve_offload(problem, limit, num_slots=10_000, most_labels=5000)
    assert solution.time_s == pytest.approx(min(times), rel=1e-12)
    assert solution.proof.is_exact
    best = schedules[times.index(min(times))]
    assert evaluate_offload(problem, best, limit) == pytest.approx(min(times), rel=1e-12)


@settings(max_examples=20)
@given(chains(size=100).map(with_outputs_saved), st.floats(0.01, 100.0), st.integers(0, 100), st.integers(1, 40))
def test_never_worse_than_recompute_alone_and_never_below_its_bound(
    chain: ChainProblem, rate: float, percent: int, slots: int
) -> None:
    least, most = minimum_limit_bytes(chain), evaluate(chain, store_all(chain))[1]
    limit = least + max(0, most - least) * percent // 100
    problem = OffloadProblem(chain=chain, link=HostLink(out_bytes_per_s=rate, in_bytes_per_s=rate))
    coarse = solve_offload(problem, limit, num_slots=slots, most_labels=4)
    fine = solve_offload(problem, limit, num_slots=600, most_labels=40)
    assert coarse.time_s <= solve_chain(chain, limit, slots).time_s
    assert fine.time_s <= solve_chain(chain, limit, 600).time_s
    assert coarse.proof.lower_bound_s <= fine.time_s + 1e-9
    check_sequence(coarse.operations, chain.num_stages)
    if coarse.steps:
        assert evaluate_offload(problem, coarse.steps, limit) == pytest.approx(coarse.time_s, rel=1e-9)


def test_two_stages_by_hand() -> None:
    """Stage 0 saves 6 bytes, stage 1 nothing; 6 bytes go out during F 1 (2 s at 3 bytes/s) and come back beside B 1."""
    chain = ChainProblem.classic([1.0, 2.0], [1.0, 2.0], [0, 0, 0], [6, 0], [0, 4], [0, 4])
    problem = OffloadProblem(chain=chain, link=HostLink(out_bytes_per_s=3.0, in_bytes_per_s=3.0))
    assert solve_chain(chain, 10).time_s == 6.0
    assert solve_chain(chain, 9).time_s == 7.0
    solution = solve_offload(problem, 9)
    kept = OffloadStep(first=1, stop=2, option="all", offloaded=False)
    sent = OffloadStep(first=0, stop=1, option="all", offloaded=True)
    assert solution.time_s == pytest.approx(6 + 2 / 3)
    assert solution.steps == (sent, kept)
    assert evaluate_offload(problem, (sent, kept), 9) == pytest.approx(6 + 1 / 3 + 1 / 3)
    assert evaluate_offload(problem, (sent, kept), 3) == math.inf
    assert solution.operations == store_all(chain)
    assert solution.offloaded_stages == (1,)


def test_a_fast_link_takes_the_place_of_recompute_and_a_slow_one_changes_nothing() -> None:
    chain = long_chain(12, 2, 5)
    limit, once_s = minimum_limit_bytes(chain) * 3 // 2, evaluate(chain, store_all(chain))[0]
    alone = solve_chain(chain, limit).time_s
    times = []
    for rate in (1.0, 1e6, 1e7, 1e8, 1e12):
        problem = OffloadProblem(chain=chain, link=HostLink(out_bytes_per_s=rate, in_bytes_per_s=rate))
        times.append(solve_offload(problem, limit).time_s)
    assert times[0] == alone
    assert times[-1] == pytest.approx(once_s, rel=1e-3)
    assert times == sorted(times, reverse=True)


def test_other_traffic_costs_time() -> None:
    chain = ChainProblem.classic([1.0, 2.0], [1.0, 2.0], [0, 0, 0], [6, 0], [0, 4], [0, 4])
    link = HostLink(out_bytes_per_s=3.0, in_bytes_per_s=3.0)
    busy = OffloadProblem(chain=chain, link=link, out_busy_s=(0.0, 1.0), in_busy_s=(0.0, 1.0))
    sent, kept = (OffloadStep(first=i, stop=i + 1, option="all", offloaded=i == 0) for i in (0, 1))
    assert evaluate_offload(busy, (sent, kept), 9) == pytest.approx(6 + 2 * (1 / 3 + 2 / 3))


def test_what_does_not_fit_names_the_least_that_does() -> None:
    chain = ChainProblem.classic([1.0] * 8, [2.0] * 8, [1] * 9, [4] * 8)
    least = minimum_offload_bytes(chain)
    assert least <= minimum_limit_bytes(chain)
    problem = OffloadProblem(chain=chain, link=LINK)
    with pytest.raises(
        InfeasibleError,
        match=f"does not fit into limit_bytes = {least - 1} by recompute and offload; the least that fits is {least} bytes",
    ):
        solve_offload(problem, least - 1)


def test_messages_of_wrong_arguments() -> None:
    chain = ChainProblem.classic([1.0], [1.0], [0, 0], [6])
    with pytest.raises(InputError, match=r"out_bytes_per_s = 0.0: 0 < rate < inf must hold"):
        HostLink(out_bytes_per_s=0.0, in_bytes_per_s=1.0)
    with pytest.raises(InputError, match="one value per stage must be given, but got 2 for 1 stages"):
        OffloadProblem(chain=chain, link=LINK, out_busy_s=(0.0, 0.0))
    with pytest.raises(InputError, match="0 <= value < inf must hold"):
        OffloadProblem(chain=chain, link=LINK, in_busy_s=(-1.0,))
    with pytest.raises(InputError, match="steps must follow one another from stage 0 to 1"):
        evaluate_offload(OffloadProblem(chain=chain, link=LINK), (), 9)
    with pytest.raises(InputError, match="num_slots >= 1 and most_labels >= 1 must hold, but got 500 and 0"):
        solve_offload(OffloadProblem(chain=chain, link=LINK), 9, most_labels=0)
