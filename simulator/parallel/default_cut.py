"""The layers of each stage where a plan leaves ``pipeline.partition`` open."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from hardware_models.profile import DeviceProfile
from simulator.lower import PassPrices
from simulator.parallel.memory import static_memory
from simulator.parallel.partition import (
    ENDS_AS_LAYERS,
    EVEN,
    PartitionProblem,
    best_partition,
    ends_as_layers,
    even_partition,
)
from simulator.parallel.stages import layers_of
from simulator.pipeline.action import Order, actions_of
from simulator.plan import Plan
from simulator.workload import Block, Workload


def partition_of(
    workload: Workload, plan: Plan, prices: PassPrices, order: Order, device: DeviceProfile, *, dtype: str
) -> tuple[int, ...]:
    """Layers of each stage.

    **Model**: frameworks that cut by a rule of their own keep it; else the cut whose slowest stage is fastest among those that fit the device (`best_partition`). A layer
    takes its passes' time, that of a second forward pass with full recompute; it holds its share of ZeRO's table and what each micro-batch in flight keeps. How much
    ``optimal`` recomputes is decided later, so it counts as none here.

    Args:
        workload: one micro-batch.
        plan: without a partition.
        prices: of passes.
        order: of the pipeline.
        device: its memory bounds stages.
        dtype: of parameters.
    """
    stages, framework = plan.num_stages, plan.runtime.framework
    if plan.pipeline.partition is not None:
        return plan.pipeline.partition
    count = len(layers_of(workload))
    if stages == 1 or framework in EVEN:
        return even_partition(count, stages)
    own = ends_as_layers(count, stages, back=ENDS_AS_LAYERS[framework]) if framework in ENDS_AS_LAYERS else None
    if own is not None:
        return own
    full = plan.memory.recompute == "full"
    each = static_memory(1.0, 0.0, plan, dtype=dtype)
    element_bytes = (each.parameters + each.gradients + each.states) * order.weight_versions
    room_bytes = (plan.memory.budget_bytes or device.memory_bytes - device.context_bytes) // plan.parallel.virtual_stages
    asked = (id(workload), full, element_bytes, stages, in_flight(order), room_bytes)
    return prices.once(("cut", asked), lambda: _fastest_cut(workload, prices, order, full, element_bytes, stages, room_bytes))


def _fastest_cut(
    workload: Workload, prices: PassPrices, order: Order, full: bool, element_bytes: float, stages: int, room_bytes: int
) -> tuple[int, ...]:
    _, sizes = prices.once(
        (id(workload), full), lambda: (workload, _sizes(workload, prices, full=full))
    )  # kept, so that no other one gets its id
    bytes_of = {own: round(element_bytes * own) for own in {*sizes.layer_elements, *sizes.end_elements}}
    problem = PartitionProblem(
        layer_s=sizes.layer_s, front_s=sizes.end_s[0], back_s=sizes.end_s[1], layer_bytes=tuple(bytes_of[own] for own in sizes.layer_elements),
        kept_bytes=sizes.kept_bytes, front_bytes=bytes_of[sizes.end_elements[0]], back_bytes=bytes_of[sizes.end_elements[1]],
        in_flight=in_flight(order), room_bytes=room_bytes,
    )  # fmt: skip
    return best_partition(problem, stages)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Sizes:
    """Of each layer, and of the embedding and the head."""

    layer_s: tuple[float, ...]
    layer_elements: tuple[int, ...]
    kept_bytes: tuple[int, ...]
    end_s: tuple[float, ...]
    end_elements: tuple[int, ...]


def _sizes(workload: Workload, prices: PassPrices, *, full: bool) -> _Sizes:
    inner = [
        [block for block in workload.blocks[first:end] if block.name not in {"embedding", "head"}]
        for first, end in layers_of(workload)
    ]
    ends = [[block for block in workload.blocks if block.name == name] for name in ("embedding", "head")]

    def elements(blocks: Sequence[Block]) -> int:
        return sum(block.parameter_elements for block in blocks)

    return _Sizes(
        layer_s=tuple(_seconds(own, prices, again=full) for own in inner), layer_elements=tuple(map(elements, inner)),
        kept_bytes=tuple(_kept(own, full=full) for own in inner), end_s=tuple(_seconds(own, prices, again=False) for own in ends),
        end_elements=tuple(map(elements, ends)),
    )  # fmt: skip


def _seconds(blocks: Sequence[Block], prices: PassPrices, *, again: bool) -> float:
    """Of forward and backward passes, and of a second forward pass."""
    return sum(
        prices.seconds(option.forward)
        + prices.seconds(option.backward_accumulate)
        + (prices.seconds(block.discard) if again else 0.0)
        for block in blocks
        for option in block.options[:1]
    )


def _kept(blocks: Sequence[Block], *, full: bool) -> int:
    """Bytes that a micro-batch keeps of a layer between its passes."""
    if full:
        return blocks[0].input_bytes if blocks else 0
    return sum(block.options[0].saved_internal_bytes + block.input_bytes * block.options[0].keeps_input for block in blocks)


def in_flight(order: Order) -> tuple[float, ...]:
    """Per stage, most micro-batches that a rank holds between their forward and backward passes; found once an order."""
    return order.once("in flight", lambda: _in_flight(order))


def _in_flight(order: Order) -> tuple[float, ...]:
    most = [0.0] * order.num_stages
    for cells in order.ranks:
        held = [0.0] * order.num_stages
        for action in actions_of(cells):
            if action.kind == "F":
                held[action.stage] += 1.0 / order.microbatch_parts
                most[action.stage] = max(most[action.stage], held[action.stage])
            elif action.kind in {"BW", "W"}:
                held[action.stage] -= 1.0 / order.microbatch_parts
    return tuple(most)
