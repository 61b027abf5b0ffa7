"""What a block keeps, sends to the host and recomputes: an integer program, and the options that it gives a chain."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import TypeVar

from hardware_models.errors import InfeasibleError, InputError
from search.chain_problem import ChainProblem
from search.solvers.graph_problem import GraphProblem, again_for, backward_start_bytes, graph_cost_s
from search.solvers.integer_program import IntegerProgram
from search.solvers.proof import Proof

T = TypeVar("T")
TIME_LIMIT_S = 60.0
"""Of one integer program."""
_SENT_COST = 1e-9
"""Of sending everything, as part of the time of making everything again: of equal answers that which sends least."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphSolution:
    """What happens to a block's tensors."""

    proof: Proof
    """Of the time beyond forward and backward."""
    kept: tuple[int, ...]
    sent: tuple[int, ...]
    again: tuple[int, ...]
    """Operators that run again."""
    saved_bytes: int
    """Kept between forward and backward, boundaries apart."""
    start_bytes: int
    """Most bytes, boundaries apart, while operators run again before the backward pass."""

    @property
    def extra_s(self) -> float:
        """Time beyond forward and backward."""
        return self.proof.objective_s


def solve_graph(problem: GraphProblem, budget_bytes: int, *, time_limit_s: float = TIME_LIMIT_S) -> GraphSolution:
    """The cheapest way to have all that the backward pass needs, keeping at most so many bytes.

    Args:
        problem: operators, tensors and link.
        budget_bytes: for kept tensors, boundaries apart.
        time_limit_s: of the integer program.

    Raises:
        InfeasibleError: what cannot be made again or sent does not fit; names the least budget.

    Model, Source: see `GraphProblem`.
    """
    tensors = sorted(problem.maker.keys() - problem.boundaries)
    unit_s = sum(operation.time_s for operation in problem.operations) or 1.0
    unit = max(1, *(problem.size_bytes[tensor] for tensor in tensors), 1)
    rows, keep, send = _program(problem, tensors, unit_s, unit)
    rows.at_most({keep[tensor]: problem.size_bytes[tensor] / unit for tensor in tensors}, budget_bytes / unit)
    answer = rows.solve(time_limit_s=time_limit_s).times(unit_s)
    if answer.values is None:
        least = least_kept_bytes(problem)
        raise InfeasibleError(
            limit=f"a block of {len(problem.operations)} operators keeps more than budget_bytes = {budget_bytes}",
            smallest_change=f"the least that fits is {least} bytes" if least > budget_bytes else "a longer time limit would do",
            needed_bytes=least,
        )
    chosen = answer.values
    kept = [tensor for tensor in tensors if chosen[keep[tensor]] > 0.5]  # noqa: PLR2004 - zero or one
    sent = [tensor for tensor in tensors if tensor in send and chosen[send[tensor]] > 0.5 and tensor not in kept]  # noqa: PLR2004
    return _solution(problem, kept, sent, answer.bound_for)


def least_kept_bytes(problem: GraphProblem) -> int:
    """The least that a block can keep, whatever time it takes; exact."""
    if problem.can_send:
        return 0
    tensors = sorted(problem.maker.keys() - problem.boundaries)
    unit = max(1, *(problem.size_bytes[tensor] for tensor in tensors), 1)
    rows, keep, _ = _program(problem, tensors, 1.0, unit, timed=False)
    answer = rows.solve()
    assert answer.values is not None, "keeping everything is allowed"
    return sum(problem.size_bytes[tensor] for tensor in tensors if answer.values[keep[tensor]] > 0.5)  # noqa: PLR2004 - zero or one


def graph_options(problem: GraphProblem, *, most: int, time_limit_s: float = TIME_LIMIT_S) -> tuple[GraphSolution, ...]:
    """Answers from keeping all that is needed down to the least, none of which another beats in both time and bytes.

    Args:
        problem: operators, tensors and link.
        most: answers at most; where there are more, budgets are spread evenly.
        time_limit_s: of each integer program.

    Raises:
        InputError: most < 1.
    """
    if most < 1:
        raise InputError(source="graph_options", key="most", value=most, rule="most >= 1 must hold")
    everything = sorted(problem.needed - problem.boundaries)
    found = [_solution(problem, everything, [], lambda objective: objective)]
    least = least_kept_bytes(problem)
    step = max(1, (found[0].saved_bytes - least) // most)
    while len(found) < most and found[-1].saved_bytes > least:
        answer = solve_graph(problem, max(least, found[-1].saved_bytes - step), time_limit_s=time_limit_s)
        if answer.extra_s <= found[-1].extra_s:
            found.pop()
        found.append(answer)
    return tuple(found)


def with_graph_options(
    chain: ChainProblem, stage: int, problem: GraphProblem, answers: tuple[GraphSolution, ...]
) -> ChainProblem:
    """The chain with more options for a stage, named ``graph0``, ``graph1``, ... (Rockmate's scheme).

    Args:
        chain: whose option 0 of the stage keeps all that autograd keeps.
        stage: of the block.
        problem: its graph.
        answers: of `graph_options` without offload (what is sent would need the link's other traffic).

    **Model**: forward as with option 0; backward takes ``extra_s`` longer, and peaks higher by what running again needs beyond all that
    option 0 saves.
    """
    if any(answer.sent for answer in answers):
        rule = "a chain's options keep or recompute"
        raise InputError(source="with_graph_options", key="answers", value=None, rule=rule, remedy="leave can_send out")
    needed = sum(problem.size_bytes[tensor] for tensor in problem.needed - problem.boundaries)
    outputs = chain.saved_bytes[stage][0] - needed
    more = [max(0, answer.start_bytes - needed) for answer in answers]

    def longer(rows: tuple[tuple[T, ...], ...], values: list[T]) -> tuple[tuple[T, ...], ...]:
        return (*rows[:stage], (*rows[stage], *values), *rows[stage + 1 :])

    return replace(
        chain,
        option_names=longer(chain.option_names, [f"graph{number}" for number in range(len(answers))]),
        forward_s=longer(chain.forward_s, [chain.forward_s[stage][0]] * len(answers)),
        backward_s=longer(chain.backward_s, [chain.backward_s[stage][0] + answer.extra_s for answer in answers]),
        saved_bytes=longer(chain.saved_bytes, [outputs + answer.saved_bytes for answer in answers]),
        forward_peak_bytes=longer(chain.forward_peak_bytes, [chain.forward_peak_bytes[stage][0]] * len(answers)),
        backward_peak_bytes=longer(chain.backward_peak_bytes, [chain.backward_peak_bytes[stage][0] + size for size in more]),
    )


def _solution(problem: GraphProblem, kept: list[int], sent: list[int], bound_for: Callable[[float], float]) -> GraphSolution:
    """The answer with just what must run again, and without what nobody reads then."""
    again = again_for(problem, (*kept, *sent))
    assert again is not None, "the program asks for what is needed"
    read = problem.needed.union(*(problem.operations[number].reads for number in again))
    kept, sent = [tensor for tensor in kept if tensor in read], [tensor for tensor in sent if tensor in read]
    cost_s = graph_cost_s(problem, again, sent)
    return GraphSolution(
        proof=Proof.of(cost_s, bound_for(cost_s)), kept=tuple(kept), sent=tuple(sent), again=again,
        saved_bytes=sum(problem.size_bytes[tensor] for tensor in kept), start_bytes=backward_start_bytes(problem, (*kept, *sent), again),
    )  # fmt: skip


Columns = dict[int, int]
"""Variable of each tensor or operator."""


def _program(
    problem: GraphProblem, tensors: list[int], unit_s: float, unit: int, *, timed: bool = True
) -> tuple[IntegerProgram, Columns, Columns]:
    """The rows but for the budget, and the variables keep and send; ``timed`` minimises time, else kept bytes."""
    rows, makers = IntegerProgram(), problem.maker
    sizes = {tensor: problem.size_bytes[tensor] / unit for tensor in tensors}
    total = sum(sizes.values()) or 1.0
    keep = {tensor: rows.choice(cost=0.0 if timed else sizes[tensor]) for tensor in tensors}
    send = {tensor: rows.choice(cost=_SENT_COST * sizes[tensor] / total) for tensor in tensors} if problem.can_send else {}
    again = {
        number: rows.choice(cost=operation.time_s / unit_s if timed else 0.0)
        for number, operation in enumerate(problem.operations)
        if operation.is_repeatable
    }

    def there(tensor: int) -> dict[int, float]:
        columns = [keep.get(tensor), send.get(tensor), again.get(makers[tensor])]
        return {column: 1.0 for column in columns if column is not None}

    for tensor in sorted(problem.needed - problem.boundaries):
        rows.at_least(there(tensor), 1.0)
    for number, column in again.items():
        for tensor in problem.operations[number].reads:
            if tensor not in problem.boundaries:
                terms = there(tensor)
                rows.at_least(terms | {column: terms.get(column, 0.0) - 1.0}, 0.0)
    if problem.can_send:
        for room, rate in ((problem.out_bytes, problem.out_bytes_per_s), (problem.in_bytes, problem.in_bytes_per_s)):
            late = rows.variable(cost=1.0)
            moved = {send[tensor]: sizes[tensor] * unit / (rate * unit_s) for tensor in tensors}
            rows.at_most(moved | {late: -1.0}, room / (rate * unit_s))
    return rows, keep, send
