"""Rematerialization of one pipeline stage, of which several micro-batches are in flight: sequences for every share of the memory that each may keep."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np

from search.chain_kernels import ChainArrays, Floats, Ints, least_memory, least_times, slots_for
from search.chain_problem import ChainProblem
from search.chain_solver import chain_arrays, choose_slot_bytes, operations_behind, stacked_bytes_of
from search.stage_kernels import stage_choices
from simulator.sequence import Operation

NUM_SLOTS = 400
"""Memory slots of a table."""
NUM_SHARES = 48
"""Budgets for what one micro-batch keeps, evenly spread up to an equal share of the memory."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Share:
    """One budget: slots that a micro-batch keeps at most, and that the running one has."""

    kept: int
    own: int


class StageTable:
    """Sequences of a stage under a memory limit.

    Args:
        problem: the stage's chain; boundary 0 is what it receives, 0 bytes where that is the batch. Gradients of parameters are no part of it.
        limit_bytes: for the activations of all micro-batches in flight.

    **Model**: let k micro-batches be in flight, the running one among them. For a budget s of what one keeps from its forward to its backward pass, the others hold
    (k - 1) s and the running one has m = M - (k - 1) s. With c kept of the blocks below i, the least time of blocks i and later is::

        V(i, c) = min( f_i^o + b_i^o + V(i + 1, c + saved_i^o)                                     if c + peak_i^o <= m
                       sum(f_i .. f_{j-1}) + T(m - c, i, j - 1) + V(j, c + a_j), i < j <= L        if c + peak of that run <= m )
        V(L, c) = 0 if c <= s

    where T is the least time of a sub-chain (`ChainProblem`): once its turn to run backward has come, all above it is gone. A run to the end (j = L) keeps nothing more:
    other micro-batches pass between a stage's forward and backward pass. For each s this is exact over memory-persistent sequences, up to slots.

    **Source**: the recurrence of rotor (`search.chain_solver`) with in-flight memory as AdaPipe weighs it (Sun et al., ASPLOS 2024): earlier stages hold more
    micro-batches and so recompute more. The form with nested sequences is ours.

    **Not modelled**: that micro-batches in flight may keep different amounts (`search.solvers`).
    """

    def __init__(self, problem: ChainProblem, limit_bytes: int, *, num_slots: int = NUM_SLOTS) -> None:
        self.problem, self.limit_bytes = problem, limit_bytes
        self._chain: ChainArrays = chain_arrays(problem)
        self.slot_bytes = choose_slot_bytes(stacked_bytes_of(self._chain), max(1, limit_bytes), num_slots)
        self._slots = max(0, limit_bytes) // self.slot_bytes
        self._need: Ints = least_memory(self._chain, self.slot_bytes)[0]
        self._times: Floats = least_times(self._chain, self.slot_bytes, self._slots, self._need)

    def sequences(self, in_flight: float, *, num_shares: int = NUM_SHARES) -> Iterator[tuple[Operation, ...]]:
        """The fastest sequence under each of ``num_shares`` budgets for what a micro-batch keeps, least budget first.

        Args:
            in_flight: micro-batches at once, the running one among them; at least 1.
            num_shares: budgets; one is enough for a single micro-batch.
        """
        others, most = max(0.0, in_flight - 1.0), self._slots / max(1.0, in_flight)
        budgets = (
            [self._slots] if others == 0.0 else sorted({int(most * part / num_shares) for part in range(1, num_shares + 1)})
        )
        for kept in budgets:
            found = self._solve(_Share(kept=kept, own=int(self._slots - others * kept)))
            if found is not None:
                yield found

    def _solve(self, share: _Share) -> tuple[Operation, ...] | None:
        received = int(slots_for(self.problem.boundary_bytes[0], self.slot_bytes))
        if received > share.kept or share.own < 0:
            return None
        values, choices = stage_choices(self._chain, self.slot_bytes, self._times, share.kept, share.own)
        return self._sequence(choices, received, share) if np.isfinite(values[0, received]) else None

    def _sequence(self, choices: Ints, kept: int, share: _Share) -> tuple[Operation, ...]:
        forward: list[Operation] = []
        backward: list[Operation] = []
        first, stages = 0, self.problem.num_stages
        while first < stages:
            choice = int(choices[first, kept])
            if choice >= 0:
                forward.append(Operation("F_all", first, self.problem.option_names[first][choice]))
                backward = [Operation("B", first), *backward]
                kept += int(slots_for(self._chain.saved_bytes[first, choice], self.slot_bytes))
                first += 1
                continue
            entry = (first, -choice - 1, min(share.own - kept, self._slots))
            forward += [Operation("F_ck", first), *(Operation("F_e", stage) for stage in range(first + 1, -choice))]
            again = operations_behind(self.problem, self._chain, self.slot_bytes, self._need, self._times, entry)
            backward = [*again, *backward]
            first = -choice
            kept += int(slots_for(self._chain.boundary_bytes[first], self.slot_bytes)) if first < stages else 0
        return (*forward, *backward)


def kept_bytes(problem: ChainProblem, operations: Sequence[Operation]) -> int:
    """Bytes that a micro-batch keeps between its passes: what graphs saved, and inputs of checkpoints and graphs that no graph below has saved already; boundary 0 always.

    Args:
        problem: the stage's chain.
        operations: its sequence; the forward half ends where the last block has run for the first time.
    """
    last = problem.num_stages - 1
    turn = next(place for place, one in enumerate(operations) if one.block == last) + 1
    saved = {
        one.block: problem.saved_bytes[one.block][problem.option_names[one.block].index(one.option)]
        for one in operations[:turn]
        if one.kind == "F_all"
    }
    pinned = {one.block for one in operations[:turn] if one.kind != "F_e" and one.block - 1 not in saved} | {0}
    return sum(saved.values()) + sum(problem.boundary_bytes[block] for block in pinned)
