"""What passes and gaps of a step hold and need, by where each block's weights are; the step's least time for given residencies."""

from __future__ import annotations

import math
from collections.abc import Sequence
from functools import lru_cache
from typing import NamedTuple

import numpy as np

from search.chain_kernels import Floats, Ints
from search.solvers.weight_problem import Residency, WeightProblem


class PhaseTables(NamedTuple):
    """Zeros and ones by phase (pass 0, gap 0, pass 1, ...), residency and block."""

    holds: Ints
    """[phases, residencies, blocks]: its weights are in use or kept."""
    fetches: Ints
    """[phases, residencies, blocks]: they come in for this phase."""
    leaves: Ints
    """[phases, residencies, blocks]: its gradients are on the device, bound for the host."""
    sends: Ints
    """[phases, residencies, blocks]: they go out during this phase."""


@lru_cache(maxsize=64)
def phase_tables(num_blocks: int) -> PhaseTables:
    """The tables of a chain of so many blocks."""
    phases, shape = 4 * num_blocks, (4 * num_blocks, len(Residency), num_blocks)
    holds, fetches, leaves, sends = (np.zeros(shape, np.int64) for _ in range(4))
    for block in range(num_blocks):
        first, second = 2 * block, 2 * (2 * num_blocks - 1 - block)
        every = np.arange(phases)
        holds[:, Residency.RESIDENT, block] = 1
        holds[[first, second], Residency.TWICE, block] = 1
        holds[:, Residency.OVER_TURN, block] = (every >= first) & (every <= second)
        holds[:, Residency.OVER_STEP, block] = (every <= first) | (every >= second)
        fetches[first, [Residency.TWICE, Residency.OVER_TURN], block] = 1
        fetches[second, [Residency.TWICE, Residency.OVER_STEP], block] = 1
        away = [Residency.TWICE, Residency.OVER_TURN, Residency.OVER_STEP]
        for phase in (second, second + 1, (second + 2) % phases):
            leaves[phase, away, block] = 1
        sends[(second + 2) % phases, away, block] = 1
    return PhaseTables(holds, fetches, leaves, sends)


def phase_s(problem: WeightProblem) -> Floats:
    """[phases], compute time; 0 for gaps."""
    seconds = np.zeros(2 * problem.num_passes)
    seconds[::2] = problem.pass_s
    return seconds


def phase_room_bytes(problem: WeightProblem) -> Ints:
    """[phases]; a gap has the room of the pass before it or after it, whichever is less."""
    room = np.array(problem.room_bytes, np.int64)
    return np.stack((room, np.minimum(room, np.roll(room, -1))), axis=1).ravel()


def weight_step_s(problem: WeightProblem, residencies: Sequence[Residency]) -> float:
    """Least time of a repeated step for given residencies; inf where memory does not suffice.

    Args:
        problem: blocks, memory and link.
        residencies: per block.

    Model:
        With L(q) = D(q + 1) and U(q) the least of D(r) + free(r) over all r >= q, G(q) = max(L(q), min(U(q), G(q - 1) + what the link
        brings without waiting)): coming early never hurts, so that the sum of waits is least. Begun with the least G, a step ends with no
        less than it began; repeated until it ends as it began, or until nothing bounds it.
    """
    tables, chosen = phase_tables(problem.num_blocks), np.arange(problem.num_blocks)
    ways, rate = np.array(residencies), problem.link.in_bytes_per_s
    weights, gradients = np.array(problem.weight_bytes, np.int64), np.array(problem.gradient_bytes, np.int64)
    needs = tables.fetches[:, ways, chosen] @ weights
    free = phase_room_bytes(problem) - tables.holds[:, ways, chosen] @ weights - tables.leaves[:, ways, chosen] @ gradients
    sent_s = (tables.sends[:, ways, chosen] @ gradients) / problem.link.out_bytes_per_s
    base = np.maximum(phase_s(problem), sent_s)
    total, phases = int(needs.sum()), needs.size
    demand = np.concatenate([np.cumsum(needs) + total * lap for lap in range(3)])
    most = np.minimum.accumulate((demand + np.tile(free, 3))[::-1])[::-1][:phases]
    least = demand[1 : phases + 1]
    if free.min() < 0 or (least > most).any():
        return math.inf
    came, ended_s = float(needs[0]), math.inf
    while True:
        level, waits_s, bounded = came, 0.0, False
        for phase in range(phases):
            reached = level + base[phase] * rate
            bounded = bounded or reached >= most[phase] or reached < least[phase]
            now = max(float(least[phase]), min(float(most[phase]), reached))
            waits_s += max(0.0, (now - level) / rate - base[phase])
            level = now
        ended_s = math.fsum(base) + waits_s
        if not bounded or level - total <= came:
            return ended_s
        came = level - total


def weight_bound_s(problem: WeightProblem) -> float:
    """No residencies give a faster step: compute, and the bytes that must come in.

    **Model**: each weight comes in twice a step but for what is kept over the turn and over the end of the step; that is at most the room there:
    bytes >= 2 sum(w) - room(turn) - room(end).
    """
    turn, room = problem.num_blocks, problem.room_bytes
    kept = min(room[turn - 1], room[turn]) + min(room[0], room[-1])
    return max(math.fsum(problem.pass_s), (2 * sum(problem.weight_bytes) - kept) / problem.link.in_bytes_per_s)
