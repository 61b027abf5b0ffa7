"""What a layer that is checkpointed whole runs again: no more than its backward pass reads. Its last product is not among it."""

from __future__ import annotations

from dataclasses import replace

from simulator.plan import Plan
from simulator.workload import Block, BlockOption, Pass, Workload

STOPPED = "stopped"
"""Name of the option whose forward run ends before the layer's last product."""
_LAST = "network"
"""Blocks that end a layer with a product; experts end it with a sum of what several ranks computed."""
_STOPS = ("torchtitan",)


def stops_early(plan: Plan) -> bool:
    """Whether layers that run again in the backward pass stop where nothing that follows is read.

    **Source**: ``torch.utils.checkpoint`` without reentrant autograd ends the second run when the last saved tensor is there (``_StopRecomputationError``, 2.1 and
    later), as torchtitan calls it (``ptd_checkpoint_wrapper``); a compiled layer's graph holds no operator whose result nobody reads. Megatron-LM and DeepSpeed run the whole layer.

    **Not modelled**: plans that recompute some blocks only (``memory.block``); frameworks named "pytorch" when they run eagerly, of which some are older.
    """
    return (
        plan.memory.recompute == "full"
        and not plan.memory.block
        and (plan.runtime.framework in _STOPS or (plan.runtime.framework == "pytorch" and plan.runtime.compile))
    )


def with_early_stop(workload: Workload) -> Workload:
    """The workload whose layers have an option that stops before their last product, for the run inside the backward pass."""
    made = {id(block): _stopping(block) if block.name == _LAST else block for block in workload.blocks}
    return replace(workload, blocks=tuple(made[id(block)] for block in workload.blocks))


def option_again(block: Block) -> str:
    """The option under which a block of a checkpointed layer runs again."""
    return next((option.name for option in block.options if option.name == STOPPED), block.options[0].name)


def _stopping(block: Block) -> Block:
    option = block.options[0]
    return replace(block, options=(*block.options, _stopped(option)))


def _stopped(option: BlockOption) -> BlockOption:
    return replace(option, name=STOPPED, forward=_before_last_product(option.forward))


def _before_last_product(run: Pass) -> Pass:
    """The run up to its last product; memory that comes or goes behind that does so at its end."""
    end = max((n for n, kernel in enumerate(run.kernels) if kernel.kernel_class == "gemm"), default=len(run.kernels))
    memory = tuple(replace(event, kernel=min(event.kernel, end)) for event in run.memory)
    return Pass(kernels=run.kernels[:end], memory=memory)
