"""Sequences on a chain: what one takes in time and memory, and the usual ones to compare with."""

from __future__ import annotations

import math
from collections.abc import Sequence

from hardware_models.errors import InputError, UnknownNameError
from search.chain_problem import ChainProblem
from simulator.sequence import Operation, check_sequence, checkpoint_blocks


class _Held:
    """Bytes that a walk over a sequence holds: boundaries of their own and graphs, without gradients."""

    def __init__(self, problem: ChainProblem) -> None:
        self.problem = problem
        self.pinned = {0}
        self.loose: int | None = None
        self.graphs: dict[int, int] = {}
        self.size_bytes = problem.boundary_bytes[0]

    def drop_unused(self, stage: int) -> None:
        """Lets go of the boundary made last, unless it is kept or is the input of ``stage``."""
        if self.loose is not None and self.loose != stage:
            self.size_bytes -= self.problem.boundary_bytes[self.loose]
            self.loose = None

    def pin(self, boundary: int) -> None:
        """Keeps a boundary; one that is part of the graph below it is kept anyway."""
        if boundary == self.loose:
            self.pinned.add(boundary)
            self.loose = None

    def release(self, boundary: int) -> None:
        """Lets go of a boundary of its own; never of the chain's input."""
        if boundary == self.loose:
            self.loose = None
        elif boundary in self.pinned and boundary:
            self.pinned.remove(boundary)
        else:
            return
        self.size_bytes -= self.problem.boundary_bytes[boundary]

    def produce(self, boundary: int) -> None:
        """Takes in the output of a run without a graph; a copy that is held already takes its place."""
        if boundary not in self.pinned and boundary - 1 not in self.graphs:
            self.loose = boundary
            self.size_bytes += self.problem.boundary_bytes[boundary]


def evaluate(problem: ChainProblem, operations: Sequence[Operation]) -> tuple[float, int]:
    """Time and peak memory of a sequence on a chain.

    Args:
        problem: the chain.
        operations: any legal sequence, not only a memory-persistent one.

    Returns:
        Seconds, and the most bytes held at once, boundary 0 and lasting bytes among them.

    Raises:
        InputError: the sequence is illegal; names the step and the rule.

    Model:
        Before step s on stage k, with stages up to l still to run backward, these are held: boundary 0; every boundary that F_ck kept
        or that a live graph has as its input, and the output made last if step s uses it (each unless it is part of the graph below);
        saved_bytes of live graphs; held(l). A forward step peaks at that sum plus its own peak; B k peaks at the sum without
        held(k) and without the graph of k, plus resident_bytes[k] + backward_peak_bytes[k]. B k lets go of boundary k.
    """
    stages = problem.num_stages
    check_sequence(operations, stages)
    held = _Held(problem)
    seconds: list[float] = []
    peak_bytes, last = 0, stages - 1
    for step, (kind, stage, option_name) in enumerate(operations, start=1):
        held.drop_unused(stage)
        if kind == "B":
            option = held.graphs.pop(stage)
            held.size_bytes -= problem.saved_bytes[stage][option]
            step_bytes = problem.resident_bytes[stage] + problem.backward_peak_bytes[stage][option]
            seconds.append(problem.backward_s[stage][option])
            peak_bytes = max(peak_bytes, held.size_bytes + step_bytes)
            held.release(stage)
            last = stage - 1
        elif kind == "F_all":
            option = _option(problem, step, stage, option_name)
            if stage in held.graphs:
                rule = f"stage {stage} has a graph that waits for its backward"
                raise InputError(source="sequence", key=f"operation {step}", value=str(operations[step - 1]), rule=rule)
            seconds.append(problem.forward_s[stage][option])
            peak_bytes = max(peak_bytes, held.size_bytes + problem.held_bytes(last) + problem.forward_peak_bytes[stage][option])
            held.pin(stage)
            if stage + 1 not in held.graphs:
                held.release(stage + 1)
            held.graphs[stage] = option
            held.size_bytes += problem.saved_bytes[stage][option]
        else:
            seconds.append(problem.discard_s[stage])
            peak_bytes = max(peak_bytes, held.size_bytes + problem.held_bytes(last) + problem.discard_peak_bytes[stage])
            if kind == "F_ck" or stage in held.graphs:
                held.pin(stage)
            else:
                held.release(stage)
            held.produce(stage + 1)
    return math.fsum(seconds), peak_bytes


def _option(problem: ChainProblem, step: int, stage: int, name: str) -> int:
    names = problem.option_names[stage]
    if name not in names:
        raise UnknownNameError(source="sequence", key=f"operation {step}", value=f"F_all {stage}:{name}", known=names)
    return names.index(name)


def fastest_options(problem: ChainProblem) -> tuple[int, ...]:
    """Per stage, the option of least time forward and backward; of equal ones, that which saves least."""
    return tuple(
        min(
            range(len(names)),
            key=lambda option: (problem.forward_s[i][option] + problem.backward_s[i][option], problem.saved_bytes[i][option]),
        )
        for i, names in enumerate(problem.option_names)
    )


def leanest_options(problem: ChainProblem) -> tuple[int, ...]:
    """Per stage, the option that saves least; of equal ones, the fastest."""
    return tuple(
        min(
            range(len(names)),
            key=lambda option: (problem.saved_bytes[i][option], problem.forward_s[i][option] + problem.backward_s[i][option]),
        )
        for i, names in enumerate(problem.option_names)
    )


def _names(problem: ChainProblem, options: Sequence[int] | None) -> list[str]:
    chosen = fastest_options(problem) if options is None else options
    return [problem.option_names[stage][option] for stage, option in enumerate(chosen)]


def store_all(problem: ChainProblem, options: Sequence[int] | None = None) -> tuple[Operation, ...]:
    """Every stage runs forward once, with a graph; ``options`` per stage, the fastest if not given."""
    return checkpoint_blocks(problem.num_stages, (), _names(problem, options))


def checkpoint_every_stage(problem: ChainProblem, options: Sequence[int] | None = None) -> tuple[Operation, ...]:
    """Every stage keeps its input and runs again before its backward, as `torch.utils.checkpoint` around each stage does."""
    return checkpoint_blocks(problem.num_stages, range(problem.num_stages), _names(problem, options))


def checkpoint_segments(
    problem: ChainProblem, num_segments: int, options: Sequence[int] | None = None
) -> tuple[Operation, ...]:
    """Equal segments that keep their input only; the last one, which takes the remainder, runs with graphs.

    Raises:
        InputError: 1 <= num_segments <= stages does not hold.

    Source:
        The order of `torch.utils.checkpoint.checkpoint_sequential`.
    """
    stages = problem.num_stages
    if not 1 <= num_segments <= stages:
        rule = f"1 <= num_segments <= num_stages must hold, but got {num_segments} and {stages} stages"
        raise InputError(source="checkpoint_segments", key="num_segments", value=num_segments, rule=rule)
    names, size = _names(problem, options), stages // num_segments
    starts = [size * segment for segment in range(num_segments)]
    ends = [*starts[1:], stages]
    operations: list[Operation] = []
    for start, end in zip(starts[:-1], ends[:-1], strict=True):
        operations += [Operation("F_ck" if stage == start else "F_e", stage) for stage in range(start, end)]
    for start, end in reversed(list(zip(starts, ends, strict=True))):
        operations += [Operation("F_all", stage, names[stage]) for stage in range(start, end)]
        operations += [Operation("B", stage) for stage in reversed(range(start, end))]
    return tuple(operations)
