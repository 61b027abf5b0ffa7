"""Cuts of a traced model's chain into stages that are tried beside the simulator's own, which counts FLOPs: by seconds, and by seconds with recompute under each stage's memory."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import suppress
from functools import partial

from hardware_models.errors import InfeasibleError
from search.solvers.stage_knapsack import StageOption
from search.solvers.stage_partition import PartitionProblem, in_flight_of, solve_partition
from search.traced.plans import budget_bytes
from simulator.lower import PassPrices
from simulator.optimizer_states import OPTIMIZER_STATES
from simulator.parallel import partition as by_time
from simulator.parallel.traced_shards import PARAMETERS_SPLIT
from simulator.plan import Plan
from simulator.tracing.plan_stages import block_partition
from simulator.tracing.simulate_stages import StagesCase
from simulator.tracing.stage_chain import StageLibrary
from simulator.workload import Block

Cut = tuple[int, ...] | None
"""Blocks of each stage; None: the simulator's."""
MOST_BLOCKS = 128
"""Of a chain that is cut with recompute in mind: the solver's work grows with the cube."""


def cuts_of(plain: StagesCase, library: StageLibrary) -> tuple[Cut, ...]:
    """Different cuts for a plan, the simulator's first.

    **Model**: the slowest stage as fast as can be (`simulator.parallel.partition`); for one chunk a rank also the least Σ t + (m - 1) max t with the recompute that the order's
    micro-batches in flight ask for (`search.solvers.stage_partition`: exact for options block by block).

    Args:
        plain: the plan without recompute.
        library: of its blocks.
    """
    plan = plain.plan
    if plan.num_stages == 1:
        return (None,)
    blocks, prices = library.whole.workload.blocks, plain.prices
    default = block_partition(plan, library.whole.workload)
    seconds = prices.once(("block seconds", id(library)), lambda: tuple(_seconds(block, prices) for block in blocks))
    even = by_time.best_partition(by_time.PartitionProblem(layer_s=seconds, front_s=0.0, back_s=0.0), plan.num_stages)
    found: list[Cut] = [None, even if even != default else None]
    if plan.parallel.virtual_stages == 1 and len(blocks) <= MOST_BLOCKS:
        solved = _under_memory(plain, library)
        found.append(solved if solved != default else None)
    return tuple(dict.fromkeys(found))


def _under_memory(plain: StagesCase, library: StageLibrary) -> Cut:
    """None where no cut fits block by block."""
    plan, blocks = plain.plan, library.whole.workload.blocks
    options = plain.prices.once(
        ("block options", id(library)), lambda: tuple(_options(block, plain.prices) for block in blocks)
    )
    static = tuple(_static_bytes(block, plan) for block in blocks)
    flight, budget = in_flight_of(plain.order), budget_bytes(plain)
    least = min((block.output_bytes for block in blocks[:-1]), default=0)
    comm_s = plain.step.link.latency_s + least / plain.step.link.bytes_per_s
    key = ("cut", id(library), static, flight, budget, plan.num_microbatches, comm_s)
    return plain.prices.once(key, partial(_solved, options, static, flight, budget, plan.num_microbatches, comm_s))


def _solved(
    options: Sequence[tuple[StageOption, ...]], static: tuple[int, ...], flight: tuple[int, ...], budget: int, batches: int, comm_s: float
) -> Cut:  # fmt: skip
    problem = PartitionProblem(
        blocks=tuple(options), static_bytes=static, in_flight=flight, budget_bytes=(budget,) * len(flight), num_microbatches=batches, comm_s=comm_s
    )  # fmt: skip
    with suppress(InfeasibleError):
        return solve_partition(problem).partition
    return None


def _seconds(block: Block, prices: PassPrices) -> float:
    option = block.options[0]
    return prices.seconds(option.forward) + prices.seconds(option.backward_accumulate)


def _options(block: Block, prices: PassPrices) -> tuple[StageOption, ...]:
    """Kept whole, or run again from its input."""
    option = block.options[0]
    forward_s, backward_s = prices.seconds(option.forward), prices.seconds(option.backward_accumulate)
    kept, entering = option.saved_internal_bytes, block.input_bytes
    return (
        StageOption(name=option.name, forward_s=forward_s, backward_s=backward_s, saved_bytes=kept + entering * option.keeps_input),
        StageOption(
            name="again", forward_s=prices.seconds(block.discard), backward_s=forward_s + backward_s, saved_bytes=entering, transient_bytes=max(0, kept)
        ),
    )  # fmt: skip


def _static_bytes(block: Block, plan: Plan) -> int:
    """Parameters, gradients and optimizer states of a block on a rank."""
    zero, dp = plan.memory.zero_stage, plan.parallel.dp
    whole = block.parameter_bytes + block.gradient_bytes
    states = OPTIMIZER_STATES[plan.precision.optimizer] * block.gradient_bytes
    return (whole // dp if zero >= PARAMETERS_SPLIT else whole) + (states // dp if zero else states)
