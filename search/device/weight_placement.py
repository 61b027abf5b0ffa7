"""Which blocks' parameters live on the host, whole blocks in place of a fraction of each: placements worth trying beside one sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np
from numpy.typing import NDArray

from search.solvers.offload_problem import HostLink
from search.solvers.weight_offload import solve_weight_offload
from search.solvers.weight_problem import Residency, WeightProblem
from simulator.lower import PassPrices
from simulator.sequence import Operation
from simulator.workload import Workload

AMOUNTS = 16
"""Numbers of blocks on the host that are tried of each order of blocks, evenly spread up to all."""
Placement = tuple[float, ...]
"""Per block, the fraction of its parameters that lives on the host."""


def placements(workload: Workload, operations: Sequence[Operation], prices: PassPrices, link: HostLink, room_bytes: int) -> tuple[Placement, ...]:  # fmt: skip
    """Placements worth trying, each once.

    **Model**: a block's parameters come beside the one moment before each run of theirs (`simulator.host_planner`), so that a block waits for what that moment does not hide. Blocks go
    in the order of what they wait for a byte, evenly spread, from the front and from the back; and as `search.solvers.weight_offload` says for the room that is left.

    Args:
        workload: one micro-batch.
        operations: its sequence.
        prices: of passes on the device.
        link: to the host.
        room_bytes: for parameters, beside all else that is on the device; what passes hold more or less of counts as equal.
    """
    sizes = [block.parameter_bytes for block in workload.blocks]
    owners = [block for block, size in enumerate(sizes) if size]
    if not owners:
        return ()
    waits = _waits(workload, operations, prices, link)
    found: dict[Placement, None] = {}
    for order in (sorted(owners, key=lambda block: (waits[block] / sizes[block], block)), owners, owners[::-1]):
        for count in _amounts(len(owners)):
            found.setdefault(_placement(order[:count], len(sizes)))
    for count in _amounts(len(owners)):
        found.setdefault(_placement([owners[int((place + 0.5) * len(owners) / count)] for place in range(count)], len(sizes)))
    found.setdefault(_solved(workload, operations, prices, link, room_bytes))
    return tuple(found)


def _amounts(count: int) -> Iterator[int]:
    """Numbers of blocks from few to all."""
    yield from sorted({max(1, round(count * step / AMOUNTS)) for step in range(1, AMOUNTS + 1)})


def _placement(away: Sequence[int], count: int) -> Placement:
    gone = set(away)
    return tuple(1.0 if block in gone else 0.0 for block in range(count))


def _durations(workload: Workload, operations: Sequence[Operation], prices: PassPrices) -> NDArray[np.float64]:
    """Seconds of each operation of a later micro-batch."""
    options: dict[int, str] = {}
    seconds: list[float] = []
    for kind, index, name in operations:
        block = workload.blocks[index]
        if kind == "F_all":
            options[index] = name
        run = (
            block.option(options[index]).backward_accumulate
            if kind == "B"
            else block.option(name).forward
            if kind == "F_all"
            else block.discard
        )
        seconds.append(prices.seconds(run))
    return np.array(seconds)


def _waits(workload: Workload, operations: Sequence[Operation], prices: PassPrices, link: HostLink) -> list[float]:
    """Seconds of a micro-batch that each block waits for its parameters if it is the only one whose parameters come."""
    seconds = _durations(workload, operations, prices)
    waits = [0.0] * len(workload.blocks)
    for place, operation in enumerate(operations):
        before = operations[place - 1]
        if before.block != operation.block:
            coming_s = workload.blocks[operation.block].parameter_bytes / link.in_bytes_per_s
            waits[operation.block] += max(0.0, coming_s - float(seconds[place - 1]))
    return waits


def _solved(
    workload: Workload, operations: Sequence[Operation], prices: PassPrices, link: HostLink, room_bytes: int
) -> Placement:
    """Where the solver of weights would leave each block's, what runs again counted with the backward pass that follows. Two blocks' parameters always have room, so that its rule finds an answer."""
    seconds = _durations(workload, operations, prices)
    count = len(workload.blocks)
    forward, backward, waiting = [0.0] * count, [0.0] * count, 0.0
    seen: set[int] = set()
    for operation, one in zip(operations, seconds.tolist(), strict=True):
        if operation.kind != "B" and operation.block not in seen:
            seen.add(operation.block)
            forward[operation.block] = one
            continue
        waiting += one
        if operation.kind == "B":
            backward[operation.block], waiting = waiting, 0.0
    sizes = tuple(block.parameter_bytes for block in workload.blocks)
    problem = WeightProblem(
        forward_s=tuple(forward), backward_s=tuple(backward), weight_bytes=sizes, gradient_bytes=(0,) * count,
        room_bytes=(max(room_bytes, 2 * max(sizes)),) * (2 * count), link=link,
    )  # fmt: skip
    found = solve_weight_offload(problem, time_limit_s=0.0).residencies
    return tuple(0.0 if way == Residency.RESIDENT else 1.0 for way in found)
