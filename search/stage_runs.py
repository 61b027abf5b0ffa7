"""Recompute of one pipeline stage in milliseconds: runs without graphs at its front, single blocks behind them, under whatever is in flight."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property
from itertools import chain
from math import inf, isfinite

import numpy as np

from search.chain_kernels import ChainArrays, Ints, least_memory
from search.chain_problem import ChainProblem
from search.chain_solver import chain_arrays
from search.cut_kernels import cut_runs, fastest_inside, need_of_run, run_needs
from search.run_kernels import (
    Beginnings,
    Choices,
    Fronts,
    Joins,
    Runs,
    block_choices,
    choice_front,
    fastest_joins,
    leanest_join,
)
from simulator.sequence import Operation

MOST_POINTS = 2048
"""Of a front."""
GRAINS = 2048
"""Parts of what a stage can keep; points of a front that lie closer together are left out."""
MOST_INSIDE = 64
"""Undominated ways of the blocks inside a run that are looked at."""
NUM_BUDGETS = 32
"""For what a stage keeps where it shares its rank."""
PEAKS = (0.75, 0.5, 0.3)
"""Of the peak where nothing runs again: limits for stages that share their rank."""
LARGE_OTHERS = 64.0
"""Micro-batches in flight beyond which only what is kept counts."""
MOST_EXCESSES = 12
"""Limits on how far a stage's peak exceeds what it keeps for which fronts are made."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StageSequence:
    """A sequence of a stage, with what it takes by the chain problem."""

    operations: tuple[Operation, ...]
    seconds: float
    kept_bytes: int
    """By a micro-batch between its passes, what it received among them."""
    peak_bytes: int
    """Most that one micro-batch holds at once."""


def undominated(ways: Sequence[StageSequence]) -> list[StageSequence]:
    """Sequences that no other equals or beats in time, bytes kept and peak; fastest first."""
    kept: list[StageSequence] = []
    for way in sorted(ways, key=lambda one: (one.seconds, one.kept_bytes, one.peak_bytes)):
        if not any(other.kept_bytes <= way.kept_bytes and other.peak_bytes <= way.peak_bytes for other in kept):
            kept.append(way)
    return kept


class StageRuns:
    """The fastest sequences of a stage under limits on what is held.

    Args:
        problem: the stage's chain; boundary 0 is what it receives, 0 bytes where that is the batch. Gradients of parameters are no part of it.
        starts: blocks at which runs may begin: 0, and the first layer of each kind of layers.

    **Model**: K is what a micro-batch keeps between its passes, P the most that it holds at once. With other micro-batches in flight, others * K + P must fit. A sequence is cut
    into segments: a block under an option, or a run of blocks without graphs that keeps its input only and runs again before its backward pass. The peak of a segment is what the
    segments below keep and its own need, so that P = max over segments of kept below + need. Of two neighbouring segments of like blocks the one with the larger need - kept
    belongs below (exchanging them never lowers the larger of the two peaks): a run holds the graphs of all its blocks while it keeps one boundary, so that runs come first, the
    longest below. What remains is to choose where the runs end and how many there are, cut so that their peak is least (`cut_runs`), and of the single blocks behind
    them the fastest choice for each number of kept bytes (`choice_fronts`): their peak is K and an excess that the last blocks decide, for which a few limits are tried.

    **Source**: the exchange argument is that of Liu 1987 ("An application of generalized tree pebbling to sparse matrix factorization") for orders of least peak; segments that
    keep one boundary, and why their lengths fall: rotor (see `ChainProblem`); options of a block as AdaPipe (Sun et al., ASPLOS 2024) chooses them.

    **Not modelled**: segments that run again more than once (`search.stage_chain` has them): they are faster only where nothing can be kept, as each costs a forward pass that keeping less of
    another block would cost too; kinds of layers between whose runs single blocks lie, beyond ``starts``.
    """

    def __init__(self, problem: ChainProblem, starts: Sequence[int] = (0,)) -> None:
        self.problem = problem
        self._chain: ChainArrays = chain_arrays(problem)
        self._choices = block_choices(self._chain)
        self._widest = self._chain.option_s.shape[1]
        self._firsts = [first for first in dict.fromkeys(starts) if first < problem.num_stages]
        fastest, leanest = self._chain.fastest, self._leanest_options
        self._inside: list[Ints] = [fastest] if (fastest == leanest).all() else [fastest, leanest]
        """Options of the blocks inside runs."""
        self._lowest = [(first, choices) for first in self._firsts for choices in self._lowest_choices(first)]

    def fastest(self, limit_bytes: float, others: float, *, most_kept: float = inf) -> StageSequence | None:
        """The fastest sequence with others * K + P <= limit and K <= most_kept; None where none fits.

        Args:
            limit_bytes: for the activations of all micro-batches in flight.
            others: of these, beside the running one.
            most_kept: by one micro-batch.
        """
        return min(self.under([limit_bytes], [others], [most_kept]), key=lambda one: one.seconds, default=None)

    def under(self, limits_bytes: Sequence[float], others: Sequence[float], most_kept: Sequence[float]) -> list[StageSequence]:
        """The distinct sequences that are the `fastest` under each of several limits, blocks inside runs one way or another."""
        limits, beside = np.array(limits_bytes, np.float64), np.array(others, np.float64)
        found: dict[tuple[float, ...], StageSequence] = {}
        for number, beginnings in enumerate(self._beginnings):
            joins = fastest_joins(self._fronts, self._runs, beginnings, limits, beside, np.array(most_kept, np.float64))
            rooms = limits - beside * joins.kept_bytes if number else np.full(len(limits), inf)  # the fastest are so anyway
            keys = zip(joins.beginning, joins.excess, joins.behind, joins.runs, joins.point, rooms, strict=True)
            for place, key in enumerate(keys):
                if isfinite(joins.seconds[place]) and (number, *key) not in found:
                    found[number, *key] = self._sequence(number, joins, place, float(rooms[place]))
        return list(found.values())

    def leanest(self, others: float) -> StageSequence:
        """The sequence of least others * K + P."""
        made = [leanest_join(self._fronts, self._runs, beginnings, float(others)) for beginnings in self._beginnings]
        number = min(range(len(made)), key=lambda one: others * made[one].kept_bytes[0] + made[one].peak_bytes[0])
        return self._sequence(number, made[number], 0, float(made[number].peak_bytes[0]))

    @cached_property
    def ways(self) -> list[StageSequence]:
        """Sequences for a stage that shares its rank with others: the fastest for evenly spread budgets of what is kept, with and without limits of the peak, none as slow and as large as another; fastest first."""
        whole, least = self.fastest(inf, 0.0), self.leanest(1.0)
        assert whole is not None, "without a limit everything fits"
        budgets = np.linspace(least.kept_bytes, whole.kept_bytes, NUM_BUDGETS)
        asked = [(peak, 0.0, budget) for peak in (inf, *(part * whole.peak_bytes for part in PEAKS)) for budget in budgets]
        limits, others, kept = zip(*asked, strict=True)
        return undominated([self.leanest(0.0), least, self.leanest(LARGE_OTHERS), *self.under(limits, others, kept)])

    @cached_property
    def least_peak_bytes(self) -> int:
        """P of the sequence that needs least, blocks run again as often as it takes."""
        need, _ = least_memory(self._chain, 1)
        return self.problem.boundary_bytes[0] + int(need[self.problem.num_stages - 1])

    @cached_property
    def _runs(self) -> Runs:
        every = np.arange(self.problem.num_stages)
        needs = [run_needs(self._chain, options) for options in self._inside]
        tables = [cut_runs(self._chain, need, first) for first in self._firsts for need in needs]
        twice_s = [self._chain.discard_s + self._chain.option_s[every, options] for options in self._inside]
        seconds = [np.concatenate(([0.0], np.cumsum(own))) for own in twice_s] * len(self._firsts)
        peaks, kept, starts = (np.stack(part) for part in zip(*tables, strict=True))
        return Runs(peaks, kept, starts, np.stack(seconds))

    @cached_property
    def _beginnings(self) -> list[Beginnings]:
        """For each way of the blocks inside runs."""
        below = [self._below(choices) for _, choices in self._lowest]
        places = [self._firsts.index(first) * len(self._inside) for first, _ in self._lowest]
        return [
            Beginnings(
                np.array([first for first, _ in self._lowest], np.int64), np.array(places, np.int64) + number, np.array([own[0] for own in below], np.float64),
                np.array([own[1] for own in below], np.int64), np.array([own[2] for own in below], np.int64),
            )
            for number in range(len(self._inside))
        ]  # fmt: skip

    @property
    def _leanest_options(self) -> Ints:
        valid = np.arange(self._widest) < self._chain.num_options[:, None]
        leanest: Ints = np.where(valid, self._chain.saved_bytes, np.iinfo(np.int64).max).argmin(axis=1)
        return leanest

    def _lowest_choices(self, first: int) -> Iterator[tuple[int, ...]]:
        """Choices of the blocks below the runs: all of one block; of more, the fastest of each, and those that keep least."""
        seconds, kept = self._choices.seconds[:first], self._choices.kept_bytes[:first]
        if first == 1:
            yield from ((choice,) for choice in np.flatnonzero(np.isfinite(seconds[0])).tolist())
            return
        lean = np.where(np.isfinite(seconds), kept, np.iinfo(np.int64).max)
        yield from dict.fromkeys((tuple(seconds.argmin(axis=1).tolist()), tuple(lean.argmin(axis=1).tolist())))

    def _below(self, choices: tuple[int, ...]) -> tuple[float, int, int]:
        """Seconds, bytes kept (what the stage received among them) and peak of the lowest blocks."""
        seconds, kept, peak = 0.0, self.problem.boundary_bytes[0], 0
        for block, choice in enumerate(choices):
            seconds += float(self._choices.seconds[block, choice])
            peak = max(peak, kept + int(self._choices.need_bytes[block, choice]))
            kept += int(self._choices.kept_bytes[block, choice])
        return seconds, kept, peak

    @cached_property
    def _fronts(self) -> Fronts:
        usable, excesses = np.isfinite(self._choices.seconds), self._excesses()
        whole = int(np.where(usable, self._choices.kept_bytes, 0).max(axis=1).sum())
        made = [choice_front(self._choices, excess, max(1, whole // GRAINS), MOST_POINTS) for excess in excesses]
        offsets, *columns = zip(*made, strict=True)
        begins = np.cumsum([0, *(len(kept) for kept in columns[0][:-1])])
        return Fronts(
            np.array(excesses, np.int64), np.stack(offsets) + begins[:, None], *(np.concatenate(column) for column in columns)
        )

    def _excesses(self) -> list[int]:
        """What peaks of single blocks may exceed their kept bytes by: the values that occur, thinned evenly.

        **Model**: from the last block down, a choice's own excess is its need less what it and the blocks above it keep; of equal excesses that which keeps most counts.
        """
        most_kept = {0: 0}
        seconds, kept, need = self._choices.seconds, self._choices.kept_bytes, self._choices.need_bytes
        for block in reversed(range(self.problem.num_stages)):
            following: dict[int, int] = {}
            for choice in np.flatnonzero(np.isfinite(seconds[block])).tolist():
                own, left = int(kept[block, choice]), int(need[block, choice] - kept[block, choice])
                for excess, above in most_kept.items():
                    reached = max(excess, left - above)
                    following[reached] = max(following.get(reached, 0), above + own)
            most_kept = following
        found = sorted(most_kept)
        places = np.linspace(0, len(found) - 1, min(len(found), MOST_EXCESSES)).round().astype(int)
        return [found[place] for place in dict.fromkeys(places.tolist())]

    def _sequence(self, number: int, joins: Joins, place: int, room_bytes: float) -> StageSequence:
        """A join as operations, the blocks inside its runs as fast as the running micro-batch's room allows."""
        lowest = self._lowest[joins.beginning[place]][1]
        table = self._beginnings[number].table[joins.beginning[place]]
        edges = [int(joins.behind[place])]
        for count in range(int(joins.runs[place]), 0, -1):
            edges.insert(0, int(self._runs.start[table, edges[0], count]))
        choices, point = list(lowest), int(joins.point[place])
        for block in range(edges[-1], self.problem.num_stages):
            choices.append(int(self._fronts.choice[point]))
            point = int(self._fronts.offsets[joins.excess[place], block + 1] + self._fronts.parent[point])
        writer = _Writer(self.problem, self._chain, self._choices, room_bytes)
        for choice in choices[: len(lowest)]:
            writer.single(choice)
        for end in edges[1:]:
            writer.run(end, self._inside[number][writer.block : end])
        for choice in choices[len(lowest) :]:
            writer.single(choice)
        return StageSequence(
            operations=writer.operations, seconds=float(joins.seconds[place]) - writer.saved_s, kept_bytes=int(joins.kept_bytes[place]), peak_bytes=writer.peak_bytes
        )  # fmt: skip


class _Writer:
    """Operations of segments, lowest first, with the peak that they come to."""

    def __init__(self, problem: ChainProblem, chain: ChainArrays, choices: Choices, room_bytes: float) -> None:
        self._names, self._chain, self._choices, self._room_bytes = problem.option_names, chain, choices, room_bytes
        self._forward: list[Operation] = []
        self._backward: list[tuple[Operation, ...]] = []
        self._kept_bytes = problem.boundary_bytes[0]
        self.block, self.peak_bytes, self.saved_s = 0, 0, 0.0
        """Block that comes next, peak so far, and seconds by which blocks inside runs are faster than they were asked for."""

    @property
    def operations(self) -> tuple[Operation, ...]:
        """The whole sequence."""
        return (*self._forward, *chain.from_iterable(reversed(self._backward)))

    def run(self, end: int, options: Ints) -> None:
        """Blocks up to ``end`` without graphs, and again with graphs, under options as fast as the room allows."""
        first, own = self.block, self._chain.option_s
        blocks = np.arange(first, end)
        if (options != self._chain.fastest[first:end]).any():
            faster = fastest_inside(self._chain, first, end, self._room_bytes - self._kept_bytes, MOST_INSIDE)
            if faster[0] >= 0:
                self.saved_s += float((own[blocks, options] - own[blocks, faster]).sum())
                options = faster
        self._forward += [Operation("F_ck" if block == first else "F_e", block) for block in range(first, end)]
        again = [Operation("F_all", block, self._names[block][option]) for block, option in enumerate(options.tolist(), first)]
        self._backward.append((*again, *(Operation("B", block) for block in reversed(range(first, end)))))
        behind = int(self._chain.boundary_bytes[end]) if end < len(self._names) else 0
        self._close(end, int(need_of_run(self._chain, first, options)), behind)

    def single(self, choice: int) -> None:
        """The next block by a choice of `run_kernels.Choices`."""
        widest = self._chain.option_s.shape[1]
        if choice >= widest:
            self.run(self.block + 1, np.array([choice - widest], np.int64))
            return
        self._forward.append(Operation("F_all", self.block, self._names[self.block][choice]))
        self._backward.append((Operation("B", self.block),))
        need, kept = self._choices.need_bytes[self.block, choice], self._choices.kept_bytes[self.block, choice]
        self._close(self.block + 1, int(need), int(kept))

    def _close(self, end: int, need: int, kept: int) -> None:
        self.peak_bytes = max(self.peak_bytes, self._kept_bytes + need)
        self._kept_bytes += kept
        self.block = end
