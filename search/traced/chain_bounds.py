"""Bounds of points of a traced model before any simulation: no plan of a point takes less time than these say, whatever it recomputes and however its blocks are cut.

**Model**: the chain of blocks in the place of embedding, layers and head (`search.joint.bounds` has the equations): for one chunk a rank the least over all cuts, under the memory of a rank
that holds its part of parameters and optimizer states and recomputes at the least price a byte; for several chunks the mean over ranks and one micro-batch's way. Beside it stands what the
replicas of a rank exchange, one collective after the other: with whole parameters one sum of the gradients, with split ones a sum for each micro-batch and the gathers of its passes. Of all
pipeline ranks the mean counts, which the busiest one is not below.

**Not counted**: exchanges beside compute slow both; gradients where memory is bounded (they come as activations go); tables that blocks share; messages' bytes beyond the least boundary's.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from hardware_models.network.cluster import Cluster
from hardware_models.network.collectives import collective_seconds
from search.joint.bounds import SPLIT, PipelineShape
from search.joint.bounds_kernels import CLOSE, Case, Limits, Tables, least_times
from search.traced.space import TracedPoint, TracedSpace
from simulator.lower import PassPrices
from simulator.optimizer_states import OPTIMIZER_STATES
from simulator.parallel.mesh import mesh_of
from simulator.parallel.messages import message_link
from simulator.parallel.traced_shards import PARAMETERS_SPLIT
from simulator.plan import Plan
from simulator.tracing.simulate_stages import StageSimulator
from simulator.tracing.stage_chain import StageLibrary
from simulator.workload import Block, SplitBackward

Floats = NDArray[np.float64]
UNBOUNDED_S = 1e9
"""Seconds up to which bounds are looked for where no plan is known."""
_UPDATE_PASSES = 2.0
"""Bytes that an optimizer moves at least for each byte of its states: they are read and written."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainTable:
    """Sums over the blocks before each one, of one micro-batch; shape (blocks + 3,): a chain has no embedding and no head apart, both are pieces that cost nothing."""

    forward_s: Floats
    backward_s: Floats
    """In full, or the least of that and of both its parts, where the order may split it."""
    weight_s: Floats
    parameter_bytes: Floats
    """Of parameters that one block alone uses."""
    kept_bytes: Floats
    """From a micro-batch's forward to its backward pass, where nothing is recomputed."""
    again_s: float
    """Least seconds for a byte that is not kept."""
    message_bytes: float
    """Of the least boundary."""


def chain_table(library: StageLibrary, prices: PassPrices, *, split: bool) -> ChainTable:
    """The table of a traced model.

    Args:
        library: of its stages.
        prices: of passes.
        split: whether the order makes weights' gradients in passes of their own.
    """
    blocks = library.whole.workload.blocks
    halves: Sequence[SplitBackward | None] = [None] * len(blocks)
    if split and len(blocks) > 1:  # the first block is on the first stage, whose backward pass is never split
        halves = [None, *library.split(1, len(blocks))]
    forward, backward, weight = [], [], []
    for block, half in zip(blocks, halves, strict=True):
        option = block.options[0]
        whole_s = min(prices.seconds(option.backward), prices.seconds(option.backward_accumulate))
        forward.append(prices.seconds(option.forward))
        if half is None:
            backward.append(whole_s)
            weight.append(whole_s if split else 0.0)
            continue
        weights_s = min(prices.seconds(half.weights), prices.seconds(half.weights_accumulate))
        backward.append(min(whole_s, prices.seconds(half.inputs) + weights_s))
        weight.append(min(weights_s, backward[-1]))
    inner = [block.output_bytes for block in blocks[:-1]]
    return ChainTable(
        forward_s=_sums(forward), backward_s=_sums(backward), weight_s=_sums(weight), parameter_bytes=_sums([block.parameter_bytes for block in blocks]),
        kept_bytes=_sums([_kept_bytes(block) for block in blocks]), again_s=min((_again_s(block, prices) for block in blocks), default=0.0),
        message_bytes=float(min(inner, default=0)),
    )  # fmt: skip


def _sums(values: Sequence[float]) -> Floats:
    return np.concatenate(([0.0, 0.0], np.cumsum(np.array(values, np.float64)), [float(sum(values))]))


def _kept_bytes(block: Block) -> int:
    option = block.options[0]
    return option.saved_internal_bytes + block.input_bytes * option.keeps_input


def _again_s(block: Block, prices: PassPrices) -> float:
    """Least seconds for each byte that a block does not keep: it runs again, or under another option."""
    kept, first = _kept_bytes(block), block.options[0]
    if kept <= 0:
        return np.inf
    least_s = prices.seconds(first.forward) + prices.seconds(first.backward_accumulate)
    ways = [(kept, prices.seconds(block.discard))]
    for option in block.options[1:]:
        more_s = prices.seconds(option.forward) + prices.seconds(option.backward_accumulate) - least_s
        ways.append((kept - option.saved_internal_bytes - block.input_bytes * option.keeps_input, more_s))
    return max(0.0, min((seconds / size for size, seconds in ways if size > 0), default=np.inf))


class ChainBounds:
    """Bounds of the points of a space.

    Args:
        space: whose points are bounded.
        simulator: of its model on its cluster.
    """

    def __init__(self, space: TracedSpace, simulator: StageSimulator) -> None:
        self.space, self.simulator = space, simulator
        self._tables: dict[tuple[str, int, bool], int] = {}
        self._found: list[ChainTable] = []
        self._exchanges: dict[tuple[object, ...], float] = {}

    def seconds(self, *, most_s: float = UNBOUNDED_S) -> Floats:
        """Of each point; shape (points,).

        Args:
            most_s: above which no bound is looked for: the time of a plan that is known.
        """
        points, request = self.space.points, self.space.request
        plans = [self.space.plan(index) for index in range(len(points))]
        rows = [self._row(point, plan) for point, plan in zip(points, plans, strict=True)]
        shapes = [
            PipelineShape(schedule=point.schedule, num_ranks=point.pp, chunks=point.chunks, num_microbatches=plan.num_microbatches).kind
            for point, plan in zip(points, plans, strict=True)
        ]  # fmt: skip
        states = OPTIMIZER_STATES[plans[0].precision.optimizer]
        message = [self._message_s(plan, self._found[row]) for plan, row in zip(plans, rows, strict=True)]
        nothing = np.zeros(len(points))
        case = Case(
            table=np.array(rows, np.int64), entry=np.full(len(points), -1, np.int64), ranks=np.array([point.pp for point in points], np.int64),
            chunks=np.array([point.chunks for point in points], np.int64), share=np.array([float(plan.num_microbatches) for plan in plans]),
            shape=np.array([shape for shape, _, _ in shapes], np.int64), split=np.array([split for _, split, _ in shapes]),
            flight=np.array([flight for _, _, flight in shapes], np.int64), message_s=np.array(message),
            parameter_bytes=np.array([1.0 / point.dp if point.zero_stage >= PARAMETERS_SPLIT else 1.0 for point in points]),
            gradient_bytes=nothing, state_bytes=np.array([states / (point.dp if point.zero_stage else 1) for point in points]),
            away_gradient_bytes=nothing, away_s=nothing,
        )  # fmt: skip
        limits = Limits(
            room_bytes=float(request.room_bytes), activation_bytes_per_s=0.0, parameter_bytes_per_s=0.0, states_leave=False, activations_leave=False,
            parameters_leave=False, recomputes=True, update_s=_UPDATE_PASSES / request.device.memory_bandwidth_bytes_per_s, slow_compute=0.0, slow_collectives=0.0,
        )  # fmt: skip
        computed = least_times(self._stacked(), case, limits, most_s, CLOSE)
        exchanged = [
            self._exchanged_s(point, plan, self._found[row]) for point, plan, row in zip(points, plans, rows, strict=True)
        ]
        found: Floats = np.minimum(most_s, np.maximum(computed, exchanged))
        return found

    def _row(self, point: TracedPoint, plan: Plan) -> int:
        key = (point.compute, point.micro_batch, point.pp > 1 and point.schedule in SPLIT)
        if key not in self._tables:
            library, prices = self.simulator.stage_library(plan), self.simulator.prices(plan)
            self._tables[key] = len(self._found)
            self._found.append(chain_table(library, prices, split=key[2]))
        return self._tables[key]

    def _stacked(self) -> Tables:
        def rows(name: str) -> Floats:
            return np.stack([getattr(one, name) for one in self._found])

        again = np.array([one.again_s if np.isfinite(one.again_s) else 0.0 for one in self._found])
        elements, kept, both = rows("parameter_bytes"), rows("kept_bytes"), rows("forward_s") + rows("backward_s")
        return Tables(
            forward_s=rows("forward_s"), backward_s=rows("backward_s"), weight_s=rows("weight_s"), compute_s=both, elements=elements, moved_elements=elements,
            kept_bytes=kept, cheap_bytes=kept, cheap_s=again, dear_s=again, sharded_s=np.zeros((1, elements.shape[1])),
        )  # fmt: skip

    def _message_s(self, plan: Plan, table: ChainTable) -> float:
        if plan.parallel.pp == 1:
            return 0.0
        rate, latency_s = message_link(mesh_of(plan, self._cluster))
        return latency_s + table.message_bytes / rate

    def _exchanged_s(self, point: TracedPoint, plan: Plan, table: ChainTable) -> float:
        """Collectives among replicas, of the mean pipeline rank; one of all bytes is no slower than many of their parts."""
        if point.dp == 1:
            return 0.0
        size = float(table.parameter_bytes[-1]) / point.pp
        if point.zero_stage < PARAMETERS_SPLIT:
            summed = self._collective_s("reduce_scatter" if point.zero_stage else "all_reduce", size, plan)
            return summed + (self._collective_s("all_gather", size, plan) if point.zero_stage else 0.0)
        batches = plan.num_microbatches
        gathers = 1 if point.zero_stage == PARAMETERS_SPLIT else 2 * batches
        return batches * self._collective_s("reduce_scatter", size, plan) + gathers * self._collective_s(
            "all_gather", size, plan
        )

    def _collective_s(self, name: str, size_bytes: float, plan: Plan) -> float:
        key = (name, size_bytes, plan.parallel.pp, plan.parallel.dp, plan.parallel.order)
        if key not in self._exchanges:
            group = mesh_of(plan, self._cluster).gradient_group()
            self._exchanges[key] = collective_seconds(name, size_bytes, group, self._cluster)
        return self._exchanges[key]

    @property
    def _cluster(self) -> Cluster:
        return self.space.request.cluster
