"""Recompute and what lives on the host, decided together for one workload on one device: the fastest plan of a cell within a budget."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from itertools import groupby

import numpy as np

from hardware_models.errors import InfeasibleError
from hardware_models.units import format_bytes
from search.device.device_bound import DeviceBound
from search.device.host_cells import HostBytes, HostCell, Technique, uniform_shares
from search.device.weight_placement import Placement, placements
from search.recompute import RecomputeSolver
from search.solvers.offload_problem import HostLink, OffloadProblem
from search.solvers.offload_solver import OffloadSolution, solve_offload
from search.step_evaluator import Candidate
from simulator.host_schedule import HostShares
from simulator.lower_host import HostLanes, host_lanes
from simulator.plan import MemoryBlock
from simulator.sequence import Operation, keep_all

NUM_BUDGETS = 12
"""The chain is asked for sequences at so many budgets between the cell's room and what nothing recomputed needs."""
SHARE_BITS = 5
"""The least share of activations that fits is found to 2**-SHARE_BITS."""
POFO_LABELS = 32
"""Partial schedules a stage of the solver of recompute and offload."""
POFO_SLOTS = 300
POFO_TRIES = 4
"""How often its room is lowered because its plan needs more than the budget."""
EXCESS_FACTOR = 1.25
"""By how many times what it needs too much: recompute puts some of the room back."""
PLACED_AGAIN = 2
"""Placements of parameters for which sequences are chosen anew."""
KEPT_LAST = (1, 2, 3, 4, 6, 8, 12, 16)
"""So many last blocks may keep their activations: they come back at once."""


class DeviceSolver:
    """Finds the fastest plan of one micro-batch size.

    Args:
        recompute: the workload, its device and step, and what recompute alone can do.
        techniques: what may save memory.

    **Model**: for fractions of parameters and optimizer states, sequences come from the chain's table at budgets between the room that is left and what nothing recomputed
    needs, from experts and from `search.solvers.offload_solver`; beside each the least share of activations that fits goes to the host. All are lowered and played,
    so that time and peak are the simulator's.
    """

    def __init__(self, recompute: RecomputeSolver, techniques: tuple[Technique, ...]) -> None:
        self.techniques, self.recompute = techniques, recompute
        self.workload, self.evaluator = recompute.workload, recompute.evaluator
        setting = self.evaluator.setting
        self.lanes: HostLanes | None = host_lanes(recompute.device) if set(techniques) - {"recompute"} else None
        self.bound = DeviceBound(self.evaluator, self.recompute, self.lanes, activations="activations" in techniques)
        self._host = HostBytes(self.workload, num_microbatches=setting.num_microbatches, optimizer=setting.optimizer)
        self._nothing = keep_all(len(self.workload.blocks))

    def plain(self) -> Candidate:
        """Nothing recomputed, nothing on the host."""
        return self.recompute.evaluate("none", self._nothing)

    def experts(self) -> tuple[Candidate, ...]:
        """What is set by hand today, of the techniques that are allowed."""
        alone = self.recompute.experts() if "recompute" in self.techniques else (self.plain(),)
        return (*alone, *(self.evaluator.evaluate(*one) for one in self._expert_offloads()))

    def least(self, cell: HostCell) -> Candidate:
        """The plan of least memory that is known among those that send all that the cell allows."""
        activations = 1.0 if "activations" in self.techniques else 0.0
        shares = self._shares(activations, cell.weights_high, cell.optimizer_high)
        found = [self.evaluator.evaluate(name, operations, shares) for name, operations in self._lean_sequences()]
        return min(found, key=lambda one: (one.peak_bytes, one.step_time_s))

    def best(self, budget_bytes: int, cell: HostCell, *, below_s: float = math.inf) -> Candidate:
        """The fastest plan within a budget at the upper end of a cell, all its micro-batches lowered.

        Args:
            budget_bytes: most bytes of live tensors on the device.
            cell: fractions of parameters and optimizer states.
            below_s: plans that compute for longer are not looked at.

        Raises:
            InfeasibleError: none fits, or none that does computes for less; says the least budget that fits.
        """
        best = self._at(budget_bytes, self._equal(cell.weights_high), cell.optimizer_high, below_s)
        if best is None:
            raise self._refusal(budget_bytes, self.least(cell).peak_bytes)
        return self.evaluator.exact(self._polished(best, budget_bytes))

    def best_beside(self, budget_bytes: int, shares: HostShares) -> Candidate:
        """The fastest sequence within a budget beside what goes to the host.

        Raises:
            InfeasibleError: none fits; says the least budget that does.
        """
        if not shares.any:
            return self.recompute.best(budget_bytes)
        best: Candidate | None = None
        least = 0
        for name, operations in self._sequences(budget_bytes, shares.weights, shares.optimizer):
            found = self.evaluator.evaluate(name, operations, shares)
            least = min(least or found.peak_bytes, found.peak_bytes)
            best = _better(best, found, budget_bytes)
        if best is None:
            raise self._refusal(budget_bytes, least)
        return best

    def _at(self, budget_bytes: int, weights: Placement, optimizer: float, below_s: float) -> Candidate | None:
        """The fastest plan with these fractions within a budget; None where none fits that computes for less than ``below_s``."""
        best: Candidate | None = None
        found = [(self.evaluator.compute_s(one[1]), *one) for one in self._sequences(budget_bytes, weights, optimizer)]
        for compute_s, name, operations in sorted(found, key=lambda one: one[0]):
            if compute_s >= min(below_s, below_s if best is None else best.step_time_s):
                break
            best = self._with_least_shares(best, name, operations, budget_bytes, weights, optimizer)
        for operations, shares in self._together(budget_bytes, weights, optimizer):
            if self.evaluator.compute_s(operations) < min(below_s, below_s if best is None else best.step_time_s):
                best = _better(best, self.evaluator.evaluate("optimal", operations, shares), budget_bytes)
                best = self._with_least_shares(best, "optimal", operations, budget_bytes, weights, optimizer)
        return best

    def _with_least_shares(
        self, best: Candidate | None, name: str, operations: tuple[Operation, ...], budget_bytes: int, weights: Placement, optimizer: float
    ) -> Candidate | None:  # fmt: skip
        """The better of a candidate and a sequence beside the least share of activations with which it fits."""
        shares = self._least_shares(operations, budget_bytes, weights, optimizer)
        if shares is None:
            return best
        return _better(best, self.evaluator.evaluate(name, operations, shares), budget_bytes)

    def _sequences(
        self, budget_bytes: int, weights: Placement, optimizer: float
    ) -> Iterator[tuple[str, tuple[Operation, ...]]]:
        """Sequences worth trying, by name."""
        if "recompute" not in self.techniques:
            yield "none", self._nothing
            return
        fraction = self._host.weight_fraction(weights)
        if not fraction and not optimizer:
            with_recompute = self._recompute_alone(budget_bytes)
            if with_recompute is not None:
                yield with_recompute.name, with_recompute.operations
        seen: set[tuple[Operation, ...]] = set()
        for name, operations in self._lean_sequences():
            if operations not in seen:
                seen.add(operations)
                yield name, operations
        cell = HostCell(weights_low=fraction, weights_high=fraction, optimizer_low=optimizer, optimizer_high=optimizer)
        room = budget_bytes + self._host.most_freed_bytes(cell) + self._host.most_gradients_freed_bytes(cell)
        most = max(self.plain().peak_bytes, room)
        lowest = min(room, self.recompute.least().peak_bytes)
        budgets = np.linspace(lowest, most, NUM_BUDGETS).astype(np.int64).tolist()
        for operations in self.recompute.ladder(budgets):
            if operations not in seen:
                yield "optimal", operations

    def _lean_sequences(self) -> Iterator[tuple[str, tuple[Operation, ...]]]:
        """Experts' sequences and the one of least memory; the plain one alone where nothing may be recomputed."""
        if "recompute" not in self.techniques:
            yield "none", self._nothing
            return
        yield from ((one.name, one.operations) for one in (*self.recompute.experts(), self.recompute.least()))

    def _recompute_alone(self, budget_bytes: int) -> Candidate | None:
        try:
            return self.recompute.best(budget_bytes)
        except InfeasibleError:
            return None

    def _least_shares(
        self, operations: tuple[Operation, ...], budget_bytes: int, weights: Placement, optimizer: float
    ) -> HostShares | None:
        """The least share of activations, equal in all blocks, with which a sequence fits; None where none does."""

        def with_share(share: int) -> HostShares:
            return HostShares(activations=(share / (1 << SHARE_BITS),) * len(weights), weights=weights, optimizer=optimizer)

        def fits(share: int) -> bool:
            return self.evaluator.peak_bytes(operations, with_share(share)) <= budget_bytes

        if fits(0):
            return with_share(0)
        low, high = 0, 1 << SHARE_BITS
        if "activations" not in self.techniques or not fits(high):
            return None
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (low, middle) if fits(middle) else (middle, high)
        return with_share(high)

    def _together(
        self, budget_bytes: int, weights: Placement, optimizer: float
    ) -> Iterator[tuple[tuple[Operation, ...], HostShares]]:
        """What the solver of recompute and offload chooses for the chain in the room that fractions leave, less of it as long as the step needs more than the budget.

        The solver lets copies wait as memory allows and counts no staging; a host schedule drops what left two moments later.
        """
        if self.lanes is None or not {"recompute", "activations"} <= set(self.techniques):
            return
        alone = HostShares(activations=self._equal(0.0), weights=weights, optimizer=optimizer)
        spare = budget_bytes - self.evaluator.resident_bytes(alone)
        link = _link(self.lanes)
        weights_s = tuple(
            share * block.parameter_bytes / link.in_bytes_per_s
            for share, block in zip(weights, self.workload.blocks, strict=True)
        )
        problem = OffloadProblem(chain=self.recompute.problem, link=link, in_busy_s=weights_s)
        room = spare
        for _ in range(POFO_TRIES):
            try:
                found = solve_offload(problem, room, num_slots=POFO_SLOTS, most_labels=POFO_LABELS)
            except InfeasibleError:
                return
            shares = self._shares_of(found, weights, optimizer)
            yield found.operations, shares
            excess = self.evaluator.peak_bytes(found.operations, shares) - budget_bytes
            if excess <= 0:
                return
            room -= int(EXCESS_FACTOR * excess)

    def _shares_of(self, found: OffloadSolution, weights: Placement, optimizer: float) -> HostShares:
        """Blocks whose items go: those of a graph by its block, a boundary by the block that reads it."""
        count = len(self.workload.blocks)
        gone = {step.first if step.option else step.stop for step in found.steps if step.offloaded}
        activations = tuple(1.0 if block in gone else 0.0 for block in range(count))
        return HostShares(activations=activations, weights=weights, optimizer=optimizer)

    def _polished(self, best: Candidate, budget_bytes: int) -> Candidate:
        """The same with the activations of few last blocks kept, where that is faster and fits."""
        if best.shares is None or not any(best.shares.activations):
            return best
        start, count = best.shares, len(self.workload.blocks)
        for kept in KEPT_LAST:
            if kept >= count:
                break
            activations = (*start.activations[: count - kept], *(0.0,) * kept)
            shares = replace(start, activations=activations)
            best = _better(best, self.evaluator.evaluate(best.name, best.operations, shares), budget_bytes) or best
        return best

    def placed(self, best: Candidate, budget_bytes: int, *, until: float = math.inf) -> Candidate:
        """The fastest plan with whole blocks' parameters on the host that is found around one with fractions, where it is faster; no other is looked at after the moment ``until``.

        All placements are tried beside the plan's own sequence, the `PLACED_AGAIN` best ones beside all sequences.
        """
        if self.lanes is None or "weights" not in self.techniques or best.shares is None:
            return best
        optimizer = best.shares.optimizer
        away = replace(best.shares, weights=self._equal(1.0))
        largest = max(block.parameter_bytes for block in self.workload.blocks)
        room = budget_bytes - self.evaluator.peak_bytes(best.operations, away) + 2 * largest
        tried: list[tuple[float, Placement]] = []
        found = best
        for weights in placements(self.workload, best.operations, self.evaluator.prices, _link(self.lanes), room):
            if time.monotonic() > until:
                break
            one = self._with_least_shares(None, best.name, best.operations, budget_bytes, weights, optimizer)
            if one is not None:
                tried.append((one.step_time_s, weights))
                found = _better(found, one, budget_bytes) or found
        for _, weights in sorted(tried)[:PLACED_AGAIN]:
            if time.monotonic() > until:
                break
            one = self._at(budget_bytes, weights, optimizer, found.step_time_s)
            found = found if one is None else _better(found, one, budget_bytes) or found
        return self.evaluator.exact(self._polished(found, budget_bytes)) if found is not best else best

    def _equal(self, share: float) -> Placement:
        """The same fraction of each block."""
        return (share,) * len(self.workload.blocks)

    def _expert_offloads(self) -> Iterator[tuple[str, tuple[Operation, ...], HostShares]]:
        """Whole classes on the host, as `torch.autograd.graph.save_on_cpu`, ZeRO-Offload and ZeRO-Infinity put them there, beside none or full recompute."""
        alone = {one.name: one.operations for one in self.recompute.experts() if one.name in {"none", "full"}}
        for name, classes in (
            ("activations on the host", ("activations",)),
            ("optimizer on the host", ("optimizer",)),
            ("weights and optimizer on the host", ("weights", "optimizer")),
        ):
            if not set(classes) <= set(self.techniques):
                continue
            shares = self._shares(*(1.0 if one in classes else 0.0 for one in ("activations", "weights", "optimizer")))
            for recompute in ("none", "full") if "recompute" in self.techniques else ("none",):
                yield f"{recompute}, {name}", alone[recompute], shares

    def _shares(self, activations: float, weights: float, optimizer: float) -> HostShares:
        return uniform_shares(len(self.workload.blocks), activations=activations, weights=weights, optimizer=optimizer)

    def _refusal(self, budget_bytes: int, least: int) -> InfeasibleError:
        return InfeasibleError(
            limit=f"a memory budget of {budget_bytes} bytes ({format_bytes(budget_bytes)}) holds no schedule of {self.workload.model} "
            f"at micro-batch {self.workload.micro_batch}",
            smallest_change=f"the least budget that fits is {least} bytes ({format_bytes(least)})",
            needed_bytes=least,
        )  # fmt: skip


def _link(lanes: HostLanes) -> HostLink:
    return HostLink(out_bytes_per_s=lanes.to_host_bytes_per_s, in_bytes_per_s=lanes.to_device_bytes_per_s)


def _better(best: Candidate | None, other: Candidate, budget_bytes: int) -> Candidate | None:
    """The faster of two of which the second must fit."""
    if other.peak_bytes > budget_bytes:
        return best
    if best is None or (other.step_time_s, other.peak_bytes) < (best.step_time_s, best.peak_bytes):
        return other
    return best


def memory_keys(shares: HostShares | None) -> dict[str, object]:
    """Keys of a plan's memory section for fractions that `simulator.host_schedule.host_shares` reads back."""
    if shares is None:
        return {}
    pairs = list(zip(shares.activations, shares.weights, strict=True))
    activations, weights = common = max(dict.fromkeys(pairs), key=pairs.count)
    ranges: dict[tuple[float, float], list[str]] = {}
    start = 0
    for pair, run in groupby(pairs):
        stop = start + len(list(run))
        ranges.setdefault(pair, []).append(str(start) if stop == start + 1 else f"{start}-{stop - 1}")
        start = stop
    blocks = [_exception(",".join(text), pair, common) for pair, text in ranges.items() if pair != common]
    return {
        "activation_offload": activations, "weight_offload": weights, "optimizer_offload": shares.optimizer, "block": tuple(blocks)
    }  # fmt: skip


def _exception(blocks: str, pair: tuple[float, float], usual: tuple[float, float]) -> MemoryBlock:
    """Fractions of activations and weights of some blocks, each where it is not the usual one."""
    activations, weights = (None if one == common else one for one, common in zip(pair, usual, strict=True))
    return MemoryBlock(blocks=blocks, activation_offload=activations, weight_offload=weights)
