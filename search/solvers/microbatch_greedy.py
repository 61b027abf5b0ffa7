"""A quick choice of options for `search.solvers.microbatch_recompute`: spares memory where it is short, gives back what is not needed."""

from __future__ import annotations

from search.solvers.microbatch_problem import Choice, MicrobatchProblem, PassOption, makespan_s, pass_bytes, pass_s, peak_bytes
from simulator.pipeline.action import Action

_BUSY_WEIGHT = 1e-3
"""Of changes that delay the end alike, that which makes its rank least busy wins."""


def greedy_choice(problem: MicrobatchProblem) -> Choice | None:
    """Options that fit every rank; None where changing one micro-batch after the other leads to none.

    Every micro-batch begins with its stage's fastest option. Where a rank's memory is first exceeded, the change of one micro-batch is
    made that costs the least makespan a byte. At last each change is undone where all still fits.
    """
    search = _Greedy(problem)
    if not all(search.make_fit(rank) for rank in range(problem.order.num_ranks)):
        return None
    search.give_back()
    return search.frozen()


def fastest_choice(problem: MicrobatchProblem) -> Choice:
    """The fastest option of every micro-batch, whatever memory it needs."""
    fastest = [min(range(len(row)), key=lambda o: (_whole_s(row[o]), row[o].saved_bytes)) for row in problem.options]
    return tuple((option,) * problem.order.num_microbatches for option in fastest)


def _whole_s(option: PassOption) -> float:
    return option.forward_s + option.input_gradient_s + option.weight_gradient_s


class _Greedy:
    """Options that are changed one by one."""

    def __init__(self, problem: MicrobatchProblem) -> None:
        self.problem, self.arrays = problem, problem.arrays()
        self.fastest = [row[0] for row in fastest_choice(problem)]
        self.choice = [list(row) for row in fastest_choice(problem)]

    def frozen(self) -> Choice:
        """The options now."""
        return tuple(tuple(row) for row in self.choice)

    def make_fit(self, rank: int) -> bool:
        """Changes options until the rank's memory suffices; whether it does."""
        budget = self.problem.budget_bytes[rank]
        while (excess := self._first_excess(rank)) is not None:
            changes = self._changes(rank, excess, self._levels(rank)[excess] - budget)
            if not changes:
                return False
            _, stage, batch, option = min(changes)
            self.choice[stage][batch] = option
        return True

    def _changes(self, rank: int, excess: int, needed: int) -> list[tuple[float, int, int, int]]:
        """Cost a spared byte, stage, micro-batch and option of each single change that lowers pass ``excess`` and no earlier one breaks."""
        before, found = self._levels(rank)[excess], []
        seen = list(self.problem.passes(rank))[: excess + 1]
        for stage, batch in dict.fromkeys((action.stage, action.micro_batch) for action in seen):
            now = self.choice[stage][batch]
            for option in range(len(self.problem.options[stage])):
                self.choice[stage][batch] = option
                spared = before - self._levels(rank)[excess]
                if spared > 0 and self._first_excess(rank, stop=excess) is None:
                    cost_s = makespan_s(self.problem, self.frozen(), self.arrays) + _BUSY_WEIGHT * self._busy_s(rank)
                    found.append((cost_s / min(spared, needed), stage, batch, option))
            self.choice[stage][batch] = now
        return found

    def give_back(self) -> None:
        """Undoes changes that later ones made needless."""
        best_s = makespan_s(self.problem, self.frozen(), self.arrays)
        for stage, row in enumerate(self.choice):
            for batch, option in enumerate(row):
                if option == self.fastest[stage]:
                    continue
                row[batch] = self.fastest[stage]
                peaks = peak_bytes(self.problem, self.frozen())
                tried_s = makespan_s(self.problem, self.frozen(), self.arrays)
                if tried_s > best_s or any(p > b for p, b in zip(peaks, self.problem.budget_bytes, strict=True)):
                    row[batch] = option
                else:
                    best_s = tried_s

    def _option(self, action: Action) -> int:
        return self.choice[action.stage][action.micro_batch]

    def _levels(self, rank: int) -> list[int]:
        held, levels = 0, []
        for action in self.problem.passes(rank):
            during, after = pass_bytes(action, self.problem.options[action.stage][self._option(action)])
            levels.append(held + max(during, after))
            held += after
        return levels

    def _first_excess(self, rank: int, stop: int | None = None) -> int | None:
        budget = self.problem.budget_bytes[rank]
        return next((i for i, level in enumerate(self._levels(rank)[:stop]) if level > budget), None)

    def _busy_s(self, rank: int) -> float:
        return sum(
            pass_s(action, self.problem.options[action.stage][self._option(action)]) for action in self.problem.passes(rank)
        )
