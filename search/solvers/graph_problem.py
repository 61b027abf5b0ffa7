"""GraphProblem: what one block may keep, send to the host or recompute between its forward and its backward pass."""

from __future__ import annotations

import math
from collections.abc import Collection
from dataclasses import dataclass

from hardware_models.errors import InputError
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from simulator.tensor_graph import TensorGraph


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedOperation:
    """An operator of the forward pass."""

    name: str
    time_s: float
    reads: tuple[int, ...]
    """Tensors of the graph."""
    writes: tuple[int, ...]
    is_repeatable: bool = True


@dataclass(frozen=True, slots=True, kw_only=True)
class GraphProblem:
    """A block's forward operators and tensors, and how much the link can move beside the block's passes.

    A tensor is there in the backward pass if it is kept, comes back from the host, or is made again; an operator that is made to run
    again needs all it reads in the same way. Boundaries are always there. What is made again is made before the backward pass, in
    the order of the forward pass, each operator once.

    Model:
        keep[e], send[e], again[v] in {0, 1}::

            keep[e] + send[e] + again[maker(e)] >= 1            for every tensor that the backward pass needs
            keep[e] + send[e] + again[maker(e)] >= again[v]     for every tensor that v reads
            sum of size * keep <= budget

        Minimised is the sum of time_s * again + max(0, sent bytes - out_bytes) / out rate + max(0, sent bytes - in_bytes) / in rate.

    Source:
        Checkmate (Jain et al., MLSys 2020) restricted to one recomputation before the backward pass, as a block's options in
        Rockmate (ICML 2023) mostly are; offload beside compute: OffMate.

    Not modelled:
        Making again just in time, several times, or in another order, which lower the peak inside the backward pass and nothing else.
    """

    operations: tuple[TimedOperation, ...]
    size_bytes: tuple[int, ...]
    """Per tensor."""
    needed: frozenset[int]
    """Tensors that the backward pass reads."""
    boundaries: frozenset[int]
    """Tensors that are always there and count nothing."""
    out_bytes: float = 0.0
    """What the link can send beside the rest of the forward pass."""
    in_bytes: float = 0.0
    """What it can bring back beside the rest of the backward pass."""
    out_bytes_per_s: float = math.inf
    """Rate of what is sent beyond that."""
    in_bytes_per_s: float = math.inf
    """Rate of what is brought back beyond that."""
    can_send: bool = False
    """Whether tensors may go to the host at all."""

    def __post_init__(self) -> None:
        makers: dict[int, int] = {}
        known = set(self.boundaries)
        for number, operation in enumerate(self.operations):
            unknown = [tensor for tensor in operation.reads if tensor not in known]
            if unknown:
                rule = f"operators read what boundaries or operators before them gave, but {operation.name} reads tensor {unknown[0]}"
                raise InputError(source="graph problem", key=f"operations[{number}]", value=None, rule=rule)
            twice = [tensor for tensor in operation.writes if tensor in makers]
            if twice:
                rule = f"a tensor is made once, but tensor {twice[0]} is made by {operation.name} too"
                raise InputError(source="graph problem", key=f"operations[{number}]", value=None, rule=rule)
            makers.update(dict.fromkeys(operation.writes, number))
            known.update(operation.writes)
        if not self.needed <= known or not known <= set(range(len(self.size_bytes))):
            rule = "every tensor that is needed has a maker and a size"
            raise InputError(source="graph problem", key="needed", value=None, rule=rule)

    @property
    def maker(self) -> dict[int, int]:
        """Operator of every tensor that one makes."""
        return {tensor: number for number, operation in enumerate(self.operations) for tensor in operation.writes}


def again_for(problem: GraphProblem, there: Collection[int]) -> tuple[int, ...] | None:
    """Operators that run again if just these tensors and the boundaries are there; None where one that cannot would have to."""
    have, makers, again = problem.boundaries | set(there), problem.maker, set[int]()
    pending = [tensor for tensor in problem.needed if tensor not in have]
    while pending:
        number = makers[pending.pop()]
        if number in again:
            continue
        if not problem.operations[number].is_repeatable:
            return None
        again.add(number)
        pending += [tensor for tensor in problem.operations[number].reads if tensor not in have]
    return tuple(sorted(again))


def graph_cost_s(problem: GraphProblem, again: Collection[int], sent: Collection[int]) -> float:
    """Seconds of what runs again and of transfers that nothing hides."""
    moved = sum(problem.size_bytes[tensor] for tensor in sent)
    late_s = (
        max(0.0, moved - problem.out_bytes) / problem.out_bytes_per_s
        + max(0.0, moved - problem.in_bytes) / problem.in_bytes_per_s
    )
    return math.fsum(problem.operations[number].time_s for number in again) + late_s


def backward_start_bytes(problem: GraphProblem, there: Collection[int], again: Collection[int]) -> int:
    """Most bytes of tensors, boundaries apart, from the first operator that runs again to the begin of the backward pass.

    What was kept or sent is there from the start; what only recomputation reads goes after its last reader.
    """
    numbers = sorted(again)
    last = {tensor: step for step, number in enumerate(numbers) for tensor in problem.operations[number].reads}
    live = {tensor for tensor in there if tensor not in problem.boundaries}
    size = sum(problem.size_bytes[tensor] for tensor in live)
    peak = size
    for step, number in enumerate(numbers):
        made = [
            tensor for tensor in problem.operations[number].writes if tensor not in problem.boundaries and tensor not in live
        ]
        live.update(made)
        size += sum(problem.size_bytes[tensor] for tensor in made)
        peak = max(peak, size)
        gone = [tensor for tensor in live if tensor not in problem.needed and last.get(tensor, -1) <= step]
        live.difference_update(gone)
        size -= sum(problem.size_bytes[tensor] for tensor in gone)
    return peak


def graph_of_block(graph: TensorGraph, device: DeviceProfile) -> GraphProblem:
    """The problem of a recorded block, without offload.

    Args:
        graph: from `simulator.tracing.record_graph`.
        device: prices its kernels.
    """
    return GraphProblem(
        operations=tuple(
            TimedOperation(
                name=operation.name,
                time_s=float(price(operation.kernels, device).sum()) if operation.kernels else 0.0,
                reads=operation.reads,
                writes=operation.writes,
                is_repeatable=operation.is_repeatable,
            )
            for operation in graph.operations
        ),
        size_bytes=tuple(tensor.size_bytes for tensor in graph.tensors),
        needed=frozenset(number for number, tensor in enumerate(graph.tensors) if tensor.is_saved),
        boundaries=frozenset(number for number, tensor in enumerate(graph.tensors) if tensor.is_boundary),
    )
