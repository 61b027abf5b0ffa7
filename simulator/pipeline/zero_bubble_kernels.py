"""Compiled kernel that builds an order of forward passes, input and weight gradients in waves, under a limit of memory.

A wave takes one micro-batch's forward pass down the ranks and one micro-batch's input gradient back up. Weight gradients go where a rank
would wait for either, or where memory is short. **Source** of the idea: the heuristic of arXiv 2401.10241, section 3.1.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

Floats = npt.NDArray[np.float64]
Ints = npt.NDArray[np.int64]

F, B, W = 0, 1, 2
"""Kinds of passes."""
MEMORY_SLACK = 1e-9
"""Rounding allowed at the limit of memory, in activations of one micro-batch."""


class Choices(NamedTuple):
    """How one run of the heuristic decides; the caller tries many."""

    most_ahead: int
    """Most forward passes of a rank before its first input gradient."""
    wait_for_first: bool
    """Before the first input gradient, rather wait than run a forward pass that makes it late."""
    hold_forward: bool
    """In a wave, leave out a forward pass that would make the next input gradient late, where that costs little."""
    fill_always: bool
    """Run a weight gradient in a gap shorter than itself even where the rank has idled less than others."""
    empty_first: bool
    """The first rank, its forward passes done, runs all waiting weight gradients before each input gradient."""


class Costs(NamedTuple):
    """What passes cost."""

    time: Floats
    """[3 kinds, ranks]"""
    comm: float
    """Between neighbours."""
    memory: Floats
    """[3 kinds], change of the memory that a rank holds, in activations of one micro-batch."""
    limit: float
    """Most memory of a rank, in the same unit."""


class _State(NamedTuple):
    """What has run; changed in place."""

    ran: Ints
    """[3 kinds, ranks]"""
    free: Floats
    """[ranks], end of the last pass."""
    idle: Floats
    """[ranks], time waited since the first forward pass."""
    held: Floats
    """[ranks], memory."""
    end: Floats
    """[2 kinds, ranks, micro-batches], of forward passes and input gradients."""
    kinds: Ints
    """[ranks, 3 x micro-batches], the order."""


@njit(cache=True, inline="always")  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _arrival(state: _State, costs: Costs, kind: int, rank: int) -> float:
    """When the input of the next forward pass (input gradient) of a rank is there; its neighbour must have run it."""
    index = state.ran[kind, rank]
    if kind == F and rank > 0:
        return float(state.end[F, rank - 1, index] + costs.comm)
    if kind == B and rank < state.free.size - 1:
        return float(state.end[B, rank + 1, index] + costs.comm)
    return float(state.free[rank])


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _run(state: _State, costs: Costs, kind: int, rank: int) -> None:
    """Runs the next pass of a kind on a rank as early as it can."""
    begin = state.free[rank]
    if kind != W:
        begin = max(begin, _arrival(state, costs, kind, rank))
    if state.ran[F, rank] > 0:
        state.idle[rank] += begin - state.free[rank]
    finish = begin + costs.time[kind, rank]
    if kind != W:
        state.end[kind, rank, state.ran[kind, rank]] = finish
    state.kinds[rank, state.ran[:, rank].sum()] = kind
    state.free[rank] = finish
    state.held[rank] += costs.memory[kind]
    state.ran[kind, rank] += 1


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _make_room(state: _State, costs: Costs, rank: int) -> bool:
    """Runs weight gradients until a forward pass fits; False if none is left and it does not."""
    while state.held[rank] + costs.memory[F] > costs.limit + MEMORY_SLACK:
        if state.ran[W, rank] >= state.ran[B, rank]:
            return False
        _run(state, costs, W, rank)
    return True


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _fill_gap(state: _State, costs: Costs, rank: int, until: float, fill_always: bool) -> None:
    """Runs the weight gradients that end in time, and one more if the rest of the gap is worth it."""
    while state.ran[W, rank] < state.ran[B, rank] and state.free[rank] + costs.time[W, rank] <= until:
        _run(state, costs, W, rank)
    gap = until - state.free[rank]
    if state.ran[W, rank] < state.ran[B, rank] and gap > 0 and (fill_always or gap > state.idle.max() - state.idle[rank]):
        _run(state, costs, W, rank)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _warm_up(state: _State, costs: Costs, choices: Choices) -> None:
    """First forward pass of all, further ones while the first input gradient is under way, then that input gradient."""
    ranks, batches = state.end.shape[1:]
    for rank in range(ranks):
        _run(state, costs, F, rank)
    extra = np.zeros(ranks, dtype=np.int64)
    reached = state.free[ranks - 1] + costs.time[B, ranks - 1]
    for rank in range(ranks - 2, -1, -1):
        due, clock, held = reached + costs.comm, state.free[rank], state.held[rank]
        while 1 + extra[rank] < min(batches, choices.most_ahead) and held + costs.memory[F] <= costs.limit + MEMORY_SLACK:
            late = clock + costs.time[F, rank] > due if choices.wait_for_first else clock >= due
            if late:
                break
            clock += costs.time[F, rank]
            held += costs.memory[F]
            extra[rank] += 1
        reached = max(clock, due) + costs.time[B, rank]
    for rank in range(1, ranks):  # a rank further down the pipeline needs fewer, as long as any are left to run later
        if extra[rank] > 0 and extra[rank] >= extra[rank - 1] and 1 + extra[rank] < batches:
            extra[rank] = max(0, extra[rank - 1] - 1)
    for rank in range(ranks):
        for _ in range(extra[rank]):
            _run(state, costs, F, rank)
    for rank in range(ranks - 1, -1, -1):
        _run(state, costs, B, rank)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _holds_forward(state: _State, costs: Costs, rank: int) -> bool:
    """Whether a rank that is two or more forward passes ahead of the next leaves this one out."""
    after = rank + 1
    due = state.free[after] + costs.time[F, after] + costs.time[B, after] + costs.comm
    if state.free[rank] >= due:
        return True
    clock, held, weights = state.free[rank] + costs.time[F, rank], state.held[rank] + costs.memory[F], state.ran[W, rank]
    while held > costs.limit + MEMORY_SLACK and weights < state.ran[B, rank]:
        clock += costs.time[W, rank]
        held += costs.memory[W]
        weights += 1
    return bool(clock > due and due - state.free[rank] <= state.idle.max() - state.idle[rank])


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _forward_wave(state: _State, costs: Costs, choices: Choices) -> bool:
    """One more forward pass on the first ranks, down to the first that leaves it out; False if memory does not allow it."""
    ranks, batches = state.end.shape[1:]
    runs = np.zeros(ranks, dtype=np.bool_)
    for rank in range(ranks):
        left = state.ran[F, rank] < batches
        ahead = rank < ranks - 1 and state.ran[F, rank] >= state.ran[F, rank + 1] + 2
        runs[rank] = left and not (choices.hold_forward and ahead and _holds_forward(state, costs, rank))
    for rank in range(ranks - 2, -1, -1):
        runs[rank] = runs[rank] and runs[rank + 1]
    for rank in range(ranks):
        if runs[rank]:
            if not _make_room(state, costs, rank):
                return False
            if rank > 0:
                _fill_gap(state, costs, rank, _arrival(state, costs, F, rank), choices.fill_always)
            _run(state, costs, F, rank)
    return True


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def wave_order(num_microbatches: int, costs: Costs, choices: Choices) -> tuple[bool, float, Ints]:
    """Whether the choices fit the limit; the longest time from a rank's first start to its last end; kinds [ranks, 3 m]."""
    ranks = costs.time.shape[1]
    state = _State(
        np.zeros((3, ranks), dtype=np.int64),
        np.zeros(ranks),
        np.zeros(ranks),
        np.zeros(ranks),
        np.zeros((2, ranks, num_microbatches)),
        np.zeros((ranks, 3 * num_microbatches), dtype=np.int64),
    )
    _warm_up(state, costs, choices)
    for _ in range(1, num_microbatches):
        if not _forward_wave(state, costs, choices):
            return False, np.inf, state.kinds
        for rank in range(ranks - 1, -1, -1):
            if state.ran[F, rank] <= state.ran[B, rank]:
                return False, np.inf, state.kinds
            if rank < ranks - 1:
                _fill_gap(state, costs, rank, _arrival(state, costs, B, rank), choices.fill_always)
            while (
                rank == 0 and choices.empty_first and state.ran[F, 0] == num_microbatches and state.ran[W, 0] < state.ran[B, 0]
            ):
                _run(state, costs, W, rank)
            _run(state, costs, B, rank)
    span = 0.0
    for rank in range(ranks):
        while state.ran[W, rank] < num_microbatches:
            _run(state, costs, W, rank)
        span = max(span, state.free[rank] - state.end[F, rank, 0] + costs.time[F, rank])
    return True, span, state.kinds
