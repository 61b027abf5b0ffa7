"""What recompute keeps on a pipeline stage: whole layers checkpointed, or the core of attention run again as Megatron does."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from simulator.parallel.early_stop import option_again
from simulator.parallel.framework import FUSED_ACCUMULATION, TRANSFORMER_ENGINE, operators_of, with_spare_gradient
from simulator.parallel.fused_kernels import accumulating, fuse_kernels, without
from simulator.parallel.memory import GRADIENT_BYTES
from simulator.parallel.stages import LAYER_ENDS, Stage
from simulator.plan import Plan
from simulator.plan_sections import plan_refusal
from simulator.presets import TransformerConfig
from simulator.presets.attention import attention_half
from simulator.presets.passes import Section, block_of
from simulator.presets.setting import Setting
from simulator.presets.tape import Storage, Tape
from simulator.recompute import operations_of
from simulator.sequence import Operation, check_sequence
from simulator.workload import Block, BlockOption, Pass, Workload

MEGATRON = ("megatron-lm@2021", "megatron-core", "megatron-core@2023")
"""Frameworks whose ``selective`` runs the core of attention again and nothing else."""
WHOLE_LAYERS = ("none", "full")
"""Values of ``memory.recompute`` under which layers keep all or nothing."""
_CORE_ENDS = frozenset({"bmm", "attention"})
"""Operators that begin and end the core of attention."""
_GRADIENTS = frozenset({"gradient", "shared_gradient"})
_COPIES = frozenset({"clone", "repeat"})
"""Operators that lay queries, keys and values out for the core; what they copy is kept instead."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class CoreAttentionSection(Section):
    """The attention half of a layer, whose ``selective`` keeps all but what lies between queries, keys, values and the mixed values.

    **Model**: scores, softmax and dropout run again in the backward pass; of a layer ``34 s b h`` bytes stay (divided over tp with sequence parallelism).

    **Not modelled**: the second run of the product with the values, whose result is there.

    **Source**: Korthikanti et al. 2022 (arXiv 2205.05198), section 5.
    """

    @property
    def products(self) -> tuple[Storage, ...]:
        """Storages that ``selective`` keeps."""
        steps = self.tape.steps
        places = [place for place, step in enumerate(steps) if step.op in _CORE_ENDS]
        first, last = places[0], places[-1]
        if first == last:  # one kernel: its rows' sums go, and its result unless the next product saves it as it is
            later = {value.storage for step in steps[last + 1 :] for value in step.saved}
            core = {value.storage for value in steps[first].outputs} - later
            return tuple(storage for storage in self.saved if storage not in core)
        while steps[first - 1].op in _COPIES:
            first -= 1
        core = {value.storage for step in steps[first:last] for value in step.outputs}
        entering = [value.storage for step in steps[first:last] if step.op in _COPIES for value in step.inputs]
        kept = (storage for storage in (*self.saved, *entering) if storage not in core and storage.role == "activation")
        return tuple(dict.fromkeys(kept))


def fit_framework(
    workload: Workload, plan: Plan, config: TransformerConfig, *, dtype: str, seq_len: int, architecture: str = ""
) -> Workload:
    """The workload as a plan's framework runs it: what its ``selective`` keeps, how it adds gradients up.

    Its fused kernels: `simulator.parallel.fused_kernels`.
    """
    if plan.runtime.framework not in MEGATRON:
        return workload
    made: dict[int, Block] = {}
    for block in workload.blocks:
        if id(block) not in made:
            made[id(block)] = _fitted(block, plan, config, dtype=dtype, seq_len=seq_len, architecture=architecture)
    return replace(workload, blocks=tuple(made[id(block)] for block in workload.blocks))


def _fitted(block: Block, plan: Plan, config: TransformerConfig, *, dtype: str, seq_len: int, architecture: str) -> Block:
    options = block.options[:1]
    if block.name == "attention" and _recomputes_cores(plan):
        options = _core_attention(plan, config, dtype=dtype, seq_len=seq_len).options
    if plan.runtime.framework in FUSED_ACCUMULATION:
        width = GRADIENT_BYTES[plan.precision.grads]
        grouped = block.name == "experts"
        options = tuple(
            accumulating(option, block.parameter_elements, width=width, architecture=architecture, grouped=grouped)
            for option in options
        )
        if block.name == "head" and plan.runtime.framework in TRANSFORMER_ENGINE:
            size_bytes = max(
                (event.delta_bytes for event in options[0].backward.memory if event.buffer in _GRADIENTS), default=0
            )
            options = tuple(with_spare_gradient(option, size_bytes=size_bytes) for option in options)
    return fuse_kernels(replace(block, options=options))


def _recomputes_cores(plan: Plan) -> bool:
    """Whether some blocks may run less than a layer again."""
    return plan.memory.recompute not in WHOLE_LAYERS or any(one.recompute == "selective" for one in plan.memory.block)


def _core_attention(plan: Plan, config: TransformerConfig, *, dtype: str, seq_len: int) -> Block:
    split = plan.parallel
    setting = Setting(
        config=config, micro_batch=plan.batch.micro_batch or 1, seq_len=seq_len, dtype=dtype, tp=split.tp, cp=split.cp, ep=split.ep,
        sequence_parallel=split.sequence_parallel and split.tp > 1, flash_attention=plan.runtime.flash_attention,
        operators=operators_of(plan),
    )  # fmt: skip
    tape = Tape()
    entering = tape.new("input", (setting.stream_tokens, config.hidden), dtype)
    leaving = attention_half(tape, setting, entering)
    block = block_of(CoreAttentionSection(name="attention", tape=tape, entering=entering, leaving=leaving))
    return replace(block, options=tuple(_without_norms(option) for option in block.options))


def _without_norms(option: BlockOption) -> BlockOption:
    """Results of norms before the core are kept: a backward pass that begins with them need not."""

    def spared(run: Pass) -> Pass:
        core = next((n for n, kernel in enumerate(run.kernels) if kernel.kernel_class in {"batched_gemm", "attention"}), 0)
        return without(run, [n for n in range(core) if run.kernels[n].op in {"native_layer_norm", "_fused_rms_norm"}])

    return replace(option, backward=spared(option.backward), backward_accumulate=spared(option.backward_accumulate))


def stage_operations(plan: Plan, stage: Stage) -> tuple[Operation, ...]:
    """The order in which a micro-batch runs a stage's blocks.

    **Model**: ``full`` keeps the input of each layer and runs all layers of every stage again, the last one too: other micro-batches pass between a
    layer's forward and backward pass. Embedding and head run once (Megatron-LM's ``recompute_method=uniform`` with one layer, torchtitan's ``full``).
    Where the framework stops a layer's second run early, that is another option of its last block (`simulator.parallel.early_stop`). Other values are those of
    `simulator.recompute`.
    """
    if not stage.blocks:
        return ()
    if plan.memory.recompute != "full":
        return operations_of(plan, stage.workload)
    runs = layer_runs(stage.blocks)
    forward: list[Operation] = []
    backward: list[Operation] = []
    for first, end, layer in runs:
        blocks = range(first, end)
        taped = [
            Operation("F_all", block, option_again(stage.blocks[block]) if layer else stage.blocks[block].options[0].name)
            for block in blocks
        ]
        back = [Operation("B", block) for block in reversed(blocks)]
        if layer:
            forward += [Operation("F_ck" if block == first else "F_e", block) for block in blocks]
            backward = [*taped, *back, *backward]
        else:
            forward += taped
            backward = [*back, *backward]
    return (*forward, *backward)


def stage_sequences(sequence: Sequence[Operation], stages: Sequence[Stage], *, source: str) -> list[tuple[Operation, ...]]:
    """Each stage's own part of a sequence over the whole model's blocks (`stage_sequence`).

    Raises:
        InputError: as `stage_sequence`, and where a block is beyond the model's last.
    """
    count = sum(len(stage.blocks) for stage in stages)
    for number, operation in enumerate(sequence, start=1):
        if operation.block >= count:
            raise plan_refusal(
                "memory.recompute", f"{source}: operation {number}: {operation}", f"0 <= block < {count} must hold"
            )
    return [stage_sequence(sequence, stage, source=source) for stage in stages]


def stage_sequence(sequence: Sequence[Operation], stage: Stage, *, source: str) -> tuple[Operation, ...]:
    """A stage's own part of a sequence over the whole model's blocks, blocks counted from the stage's first.

    **Model**: operations of other stages are left out, whichever way they are mixed. What a stage has received stays until its first block runs for the last time, as if
    its first run had kept it.

    Args:
        sequence: with the model's indices.
        stage: of the model.
        source: begins every message.

    Raises:
        InputError: the part is no legal sequence of the stage's blocks, or names an option that a block does not have.
    """
    if not stage.blocks:
        return ()
    end = stage.first + len(stage.blocks)
    own = [
        operation._replace(block=operation.block - stage.first)
        for operation in sequence
        if stage.first <= operation.block < end
    ]
    runs = [place for place, operation in enumerate(own) if operation.block == 0 and operation.kind != "B"]
    for place in runs[:-1] if stage.receives else ():
        own[place] = Operation("F_ck", 0)
    named = f"{source}, stage {stage.index} (blocks {stage.first} to {end - 1})"
    check_sequence(own, len(stage.blocks), source=named)
    for operation in own:
        known = [option.name for option in stage.blocks[operation.block].options]
        if operation.kind == "F_all" and operation.option not in known:
            shown = operation._replace(block=operation.block + stage.first)
            raise plan_refusal(
                "memory.recompute", f"{named}: {shown}", f"block {shown.block} has the options {', '.join(known)}"
            )
    return tuple(own)


def layer_runs(blocks: tuple[Block, ...]) -> list[tuple[int, int, bool]]:
    """First and last + 1 block of each layer, and of each block that belongs to none, and whether it is a layer."""
    runs: list[tuple[int, int, bool]] = []
    first = 0
    for index, block in enumerate(blocks):
        if block.name in LAYER_ENDS:
            runs.append((first, index + 1, True))
        elif block.name != "attention":
            runs.append((index, index + 1, False))
        else:
            continue
        first = index + 1
    return runs
