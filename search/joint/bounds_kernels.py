"""Compiled part of the time bounds: the least over all cuts into stages of the greatest over stages, from below, under the memory of a device."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
CLOSE = 1e-11
"""Part of a time to which a single bound is looked for."""
WIDEN = 1.25
"""Steps in which a time that some cut reaches is looked for above one that none does."""
LONGEST = 100.0
"""Times that all passes take one after the other: plans that cannot fit in so long a step are taken not to fit."""
ONE, WARM_UP, ALL, TWICE = 0, 1, 2, 3
"""Micro-batches that a rank holds at once, at least: one; as many as ranks behind it, and itself; all; twice the ranks behind it, and itself."""
ONE_CHUNK, LOOPED, VEE, BOTH_WAYS = 0, 1, 2, 3
"""Which stages a rank holds: one; every p-th; one on the way there and one on the way back; two, each for half of the micro-batches."""


class Tables(NamedTuple):
    """Sums over the pieces (embedding, layers, head) before each one; shape (tables, pieces + 1) unless said otherwise."""

    forward_s: Floats
    backward_s: Floats
    weight_s: Floats
    """Of the backward pass, weights' gradients."""
    compute_s: Floats
    """Of both passes, without collectives."""
    elements: Floats
    moved_elements: Floats
    """Parameters that may live on the host."""
    kept_bytes: Floats
    """By a micro-batch that recomputes nothing."""
    cheap_bytes: Floats
    """Of these, what costs less than ``dear_s`` a byte to make again."""
    cheap_s: Floats
    """Least seconds for a byte that is made again; shape (tables,)."""
    dear_s: Floats
    """Least seconds for a byte beyond ``cheap_bytes``; shape (tables,)."""
    sharded_s: Floats
    """Collectives of a micro-batch that gathers parameters and scatters gradients in each pass; shape (entries, pieces + 1)."""


class Case(NamedTuple):
    """What is bounded; each of shape (cases,)."""

    table: Ints
    entry: Ints
    """Row of ``sharded_s``; -1: parameters are not gathered in each pass."""
    ranks: Ints
    chunks: Ints
    share: Floats
    """Micro-batches."""
    shape: Ints
    """`ONE_CHUNK`, `LOOPED`, `VEE` or `BOTH_WAYS`."""
    split: NDArray[np.bool_]
    """Whether weights' gradients are passes of their own."""
    flight: Ints
    """`ONE`, `WARM_UP`, `ALL` or `TWICE`."""
    message_s: Floats
    parameter_bytes: Floats
    """That a rank holds of each of its parameters; as the three that follow."""
    gradient_bytes: Floats
    state_bytes: Floats
    away_gradient_bytes: Floats
    """Gradients where the optimizer's states are on the host."""
    away_s: Floats
    """Seconds of the host's step for each parameter, where it has the states."""


class Limits(NamedTuple):
    """What the device and the trainer allow."""

    room_bytes: float
    activation_bytes_per_s: float
    """To the host and back."""
    parameter_bytes_per_s: float
    """From the host."""
    states_leave: bool
    """Whether optimizer states may be on the host, and whether the others may."""
    activations_leave: bool
    parameters_leave: bool
    recomputes: bool
    update_s: float
    """Of the optimizer, for each byte of its states."""
    slow_compute: float
    """Seconds that compute loses for one of collectives of data parallelism beside it."""
    slow_collectives: float
    """Seconds that these lose for one of compute."""


@njit(cache=True)  # type: ignore[untyped-decorator]
def _again_s(need: float, kept: float, cheap: float, cheap_s: float, dear_s: float, held: float) -> float:
    """Least seconds a micro-batch to save bytes by recompute; infinite where all of it is not enough."""
    if need <= 0.0:
        return 0.0
    saved = need / held
    if saved > kept:
        return float(np.inf)
    return float(min(saved, cheap) * cheap_s + max(0.0, saved - cheap) * dear_s)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _memory_s(
    limit_s: float, elements: float, moves: float, kept: float, cheap: float, cheap_s: float, dear_s: float, held: float, case: Case, n: int, limits: Limits
) -> float:  # fmt: skip
    """Least seconds of a step that a rank spends on fitting its memory: recompute, or the optimizer's own time on the device; infinite where it cannot fit in time."""
    share, parameters = case.share[n], case.parameter_bytes[n] * elements
    on_host, fetched = limit_s * limits.activation_bytes_per_s / share, 2.0 * share * case.parameter_bytes[n] * moves
    best = np.inf
    for away in range(2):
        if away == 1 and not limits.states_leave:
            continue
        states = 0.0 if away == 1 else case.state_bytes[n] * elements
        gradients = elements * (case.away_gradient_bytes[n] if away == 1 else case.gradient_bytes[n])
        tail = case.away_s[n] * elements if away == 1 else limits.update_s * states
        need = parameters + gradients + states + held * kept - limits.room_bytes
        again = _again_s(need, kept, cheap, cheap_s, dear_s, held) if limits.recomputes or need <= 0.0 else np.inf
        if limits.activations_leave and need <= held * min(kept, on_host):
            again = 0.0
        if limits.parameters_leave and fetched <= limit_s * limits.parameter_bytes_per_s:
            left = (limit_s * limits.parameter_bytes_per_s - fetched) / share if limits.activations_leave else 0.0
            if need - parameters <= held * min(kept, left, on_host):
                again = 0.0
        best = min(best, share * again + tail)
    return float(best)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _held(flight: int, stage: int, ranks: int, share: float) -> float:
    if flight == WARM_UP:
        return float(min(share, ranks - stage))
    if flight == ALL:
        return float(share)
    if flight == TWICE:
        return float(min(share, 2 * (ranks - stage) - 1))
    return 1.0


@njit(cache=True)  # type: ignore[untyped-decorator]
def _beside_s(compute: float, other: float, sharded: float, limits: Limits) -> float:
    """Least seconds of compute, of what else a rank waits for, and of collectives of data parallelism that may run beside both."""
    first = compute + other + limits.slow_compute * max(0.0, sharded - other)
    return float(max(first, sharded + limits.slow_collectives * compute))


@njit(cache=True)  # type: ignore[untyped-decorator]
def _all_fit(limit_s: float, tables: Tables, case: Case, n: int, limits: Limits) -> bool:
    """Whether stages that each take as many pieces as time and memory allow take all."""
    table, ranks, share, split = case.table[n], case.ranks[n], case.share[n], case.split[n]
    forward_s, backward_s, weight_s = tables.forward_s[table], tables.backward_s[table], tables.weight_s[table]
    compute_s, elements, moved, kept, cheap = (
        tables.compute_s[table],
        tables.elements[table],
        tables.moved_elements[table],
        tables.kept_bytes[table],
        tables.cheap_bytes[table],
    )
    done, last = 0, len(forward_s) - 1
    for stage in range(ranks):
        start = forward_s[done] + stage * case.message_s[n]
        back = backward_s[done] - (weight_s[done] if split else 0.0) + stage * case.message_s[n]
        held = _held(case.flight[n], stage, ranks, share)
        end = done
        while end < last:
            work = share * (forward_s[end + 1] - forward_s[done] + backward_s[end + 1] - backward_s[done])
            more = _memory_s(
                limit_s, elements[end + 1] - elements[done], moved[end + 1] - moved[done], kept[end + 1] - kept[done], cheap[end + 1] - cheap[done], tables.cheap_s[table],
                tables.dear_s[table], held, case, n, limits,
            )  # fmt: skip
            if split:
                weights = share * (weight_s[end + 1] - weight_s[done])
                taken = start + max(work + more, work - weights + back)
            else:
                taken = start + work + max(more, back)
            if taken > limit_s:
                break
            if case.entry[n] >= 0:
                sharded = share * (tables.sharded_s[case.entry[n], end + 1] - tables.sharded_s[case.entry[n], done])
                compute = share * (compute_s[end + 1] - compute_s[done])
                if _beside_s(compute, work - compute, sharded, limits) > limit_s:
                    break
            end += 1
        done = end
        if done == last:
            return True
    return False


@njit(cache=True)  # type: ignore[untyped-decorator]
def _several_s(tables: Tables, case: Case, n: int, limits: Limits, most_s: float) -> float:
    """A time that no cut into several stages a rank is below."""
    table, ranks, share = case.table[n], case.ranks[n], case.share[n]
    forward_s, backward_s = tables.forward_s[table], tables.backward_s[table]
    returned_s = backward_s[-1] - (tables.weight_s[table][-1] if case.split[n] else 0.0)
    whole_s = forward_s[-1] + backward_s[-1]
    copies = 2.0 if case.shape[n] == BOTH_WAYS and share > 1.0 else 1.0  # one micro-batch goes one way
    mean = share * whole_s / ranks
    found = max(forward_s[-1] + returned_s, mean)
    more = _memory_s(
        most_s, copies * tables.elements[table][-1] / ranks, copies * tables.moved_elements[table][-1] / ranks, tables.kept_bytes[table][-1] / ranks, tables.cheap_bytes[table][-1] / ranks, tables.cheap_s[table],
        tables.dear_s[table], 1.0 / (copies * case.chunks[n]), case, n, limits,
    )  # fmt: skip
    if more == np.inf:
        return float(np.inf)
    found = max(found, mean + more)
    if case.shape[n] in (LOOPED, VEE):
        found = max(found, _uneven_s(forward_s, backward_s, case, n))
    if case.entry[n] >= 0:
        compute = share * tables.compute_s[table][-1] / ranks
        sharded = share * tables.sharded_s[case.entry[n], -1] / ranks
        found = max(found, _beside_s(compute, mean - compute, sharded, limits))
    return float(found)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _uneven_s(forward_s: Floats, backward_s: Floats, case: Case, n: int) -> float:
    """Least time of the rank that holds the head, or of the one that holds most layers: each stage has at least one, whole layers only."""
    ranks, chunks, share = case.ranks[n], case.chunks[n], case.share[n]
    layers = len(forward_s) - 3
    forward, both = np.inf, np.inf
    for piece in range(1, layers + 1):
        one = forward_s[piece + 1] - forward_s[piece]
        forward = min(forward, one)
        both = min(both, one + backward_s[piece + 1] - backward_s[piece])
    head = forward_s[-1] - forward_s[-2] + backward_s[-1] - backward_s[-2]
    start = 0.0
    if case.shape[n] == VEE:
        head += forward_s[1] + backward_s[1]
    else:
        start = (ranks - 1) * (forward + case.message_s[n])
        if not case.split[n]:
            start += (ranks - 1) * (both - forward + case.message_s[n])
    least = np.inf
    for own in range(chunks, layers + 1):
        others = -(-(layers - own) // (ranks - 1)) if ranks > 1 else 0
        least = min(least, max(start + share * (own * both + head), share * others * both))
        if share * (own * both + head) > least:
            break
    return float(least)


@njit(cache=True)  # type: ignore[untyped-decorator]
def least_times(tables: Tables, case: Case, limits: Limits, most_s: float, narrow: float) -> Floats:
    """Seconds that no plan of each case is below; ``most_s`` where none is below that, which is all that is found out then.

    Args:
        tables: costs.
        case: shapes of pipelines and what they hold.
        limits: of device and trainer.
        most_s: no bound is looked for above it.
        narrow: part of a time to which the interval is halved between one that no cut reaches and one that some cut does.
    """
    found = np.empty(len(case.table))
    for n in range(len(found)):
        table = case.table[n]
        whole_s = case.share[n] * (tables.forward_s[table][-1] + tables.backward_s[table][-1])
        high = min(most_s, LONGEST * (whole_s + case.ranks[n] * case.message_s[n]))
        if case.shape[n] != ONE_CHUNK:
            found[n] = min(most_s, _several_s(tables, case, n, limits, high))
            continue
        low = whole_s / case.ranks[n]
        reached = low
        while reached < high and not _all_fit(reached, tables, case, n, limits):
            low, reached = reached, min(high, WIDEN * (reached + case.message_s[n]))
        if reached >= high and not _all_fit(high, tables, case, n, limits):
            found[n] = most_s
            continue
        high = reached
        while high - low > narrow * high:
            middle = 0.5 * (low + high)
            if _all_fit(middle, tables, case, n, limits):
                high = middle
            else:
                low = middle
        found[n] = low
    return found
