"""What a framework fuses, and what it keeps on a device beside model states and activations: facts per framework, each with its source."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import replace
from types import MappingProxyType

from hardware_models.caching_allocator import DEFAULT_SETTINGS, AllocatorSettings
from hardware_models.profile import DeviceProfile
from hardware_models.units import DTYPE_BYTES
from simulator.plan import Plan
from simulator.presets.operators import EAGER, Operators
from simulator.workload import Block, BlockOption, MemoryEvent, Pass

FUSED_ACCUMULATION = ("megatron-core", "megatron-core@2023")
"""Frameworks whose weight-gradient products add to the gradient buffer themselves (Megatron-LM's ``gradient_accumulation_fusion``, on unless switched off)."""
TRANSFORMER_ENGINE = ("megatron-core",)
"""Frameworks whose layers are Transformer Engine's; Megatron-core of 2023 was run with layers of its own (``--transformer-impl local``, then the default)."""
AA_SCALING = ("aa-scaling", "aa-scaling@fused-norm")
"""Aleph Alpha's trainer, with RMS norms of its own and with those of flash-attn's kernel."""
EIGHT_BIT_GATHERS = (*FUSED_ACCUMULATION, "torchtitan")
"""Frameworks whose tensor parallelism gathers in eight bits where products read these."""
LAID_OUT = ("torchtitan",)
"""Frameworks whose tensor parallelism is DTensor's over tokens."""
OPERATORS: Mapping[str, Operators] = MappingProxyType(
    {
        "aa-scaling": Operators(attention_inputs=True, gathered_logits=True),
        "aa-scaling@fused-norm": Operators(norm=True, attention_inputs=True, gathered_logits=True),
        "megatron-core": Operators(norm=True, gated=True, rotary=True, routed=True, attention_inputs=True, loss=True),
        "megatron-core@2023": Operators(attention_inputs=True, loss=True),
        "torchtitan": Operators(repeated_keys=True, alternate=True, gathers_once=True, sharded_loss=True),
        "megatron-lm@2021": Operators(attention_inputs=True, loss=True),
    }
)
"""Kernels of a framework where they are not those of eager torch.

**Source**: Megatron-core 0.14: ``--transformer-impl transformer_engine`` (norms, rotary positions), ``bias_swiglu_fusion`` and ``apply_rope_fusion`` are on unless switched off;
its attention makes query, key and value by one product (``linear_qkv``), its grouped experts (``TEGroupedMLP``) apply the router's weights in the activation. Megatron-LM of 2021: one such product, cross entropy over the vocabulary in place (``mpu/cross_entropy.py``).
Aleph-Alpha/scaling @01b9d21dba: ``attention_qkv_in_one`` (src/scaling/core/nn/attention/attention.py), whose head gathers its logits (``simulator.presets.ends``); Hagemann et al. 2023
(arXiv 2311.05610): RMS norm by flash-attn's kernel in the runs that name it.
torchtitan: ``selective_ac_option = "op"`` saves attention and every odd ``mm`` of a layer (torchtitan/models/llama/parallelize_llama.py, 2024-12, ``_get_custom_policy``); a layer's
attention half has an even number of them. Layers are checkpointed whole, the head is not. Inputs are gathered by DTensor, whose products save what they were given (``apply_tp``:
``PrepareModuleInput``); keys and values are repeated for each head (``repeat_kv``, torchtitan/models/llama/model.py); the loss is computed in parallel (``loss_parallel``, torch/distributed/tensor/parallel/loss.py), eagerly. Compiled layers keep no result that their backward pass does not
read, whatever the policy names (torch/_functorch/partitioners.py: a cut between what is made and what the backward pass needs).
"""
ALLOCATORS: Mapping[str, AllocatorSettings] = MappingProxyType({"torchtitan": AllocatorSettings(expandable_segments=True)})
"""PYTORCH_ALLOC_CONF of a framework's own launcher; torch's defaults elsewhere.

**Source**: torchtitan run_train.sh @0168bd518f: ``expandable_segments:True``.
"""
PRODUCTS = frozenset({"gemm", "batched_gemm"})
"""Classes of kernels that read a matrix of parameters, `bmm` excepted."""
_OWN_PRODUCTS = frozenset({"head", "embedding", "transform"})
"""Blocks whose products are the framework's own, not Transformer Engine's."""
_HOPPER = 9.0
_MIB = 2**20
_LIBRARY_BYTES = MappingProxyType({True: 32 * _MIB, False: 4 * _MIB})
"""Transformer Engine's workspace of cuBLAS, from Hopper on and before (``get_cublas_workspace_size_bytes``, transformer_engine/pytorch/cpp_extensions/gemm.py, 2.x)."""
_TORCH_LIBRARY_BYTES = MappingProxyType({True: 32 * _MIB, False: 8_519_680})
"""torch's own, per stream (``parseChosenWorkspaceSize``, aten/src/ATen/cuda/CublasHandlePool.cpp: 8 x 4 MiB on Hopper and later, else 2 x 4 MiB + 8 x 16 KiB)."""


def operators_of(plan: Plan) -> Operators:
    """The kernels of the plan's framework; what ``selective`` keeps is its own only where the plan says ``selective``."""
    found = OPERATORS.get(plan.runtime.framework, EAGER)
    return replace(
        found, alternate=found.alternate and plan.memory.recompute == "selective", unread=not plan.runtime.compile,
        eight_bit_inputs=_packs(plan),
    )  # fmt: skip


def _packs(plan: Plan) -> bool:
    """Whether Transformer Engine's linear layers run in eight bits, and keep their inputs so.

    **Source**: ``saved_inputmat`` and ``saved_inputmat_t`` (transformer_engine/pytorch/module/linear.py). torchao's keep theirs as they are
    (``matmul_with_hp_or_float8_args``, torchao/float8/float8_linear.py).

    **Not modelled**: grouped products in eight bits; scales of blocks, 1/32 of the bytes.
    """
    return plan.runtime.framework in TRANSFORMER_ENGINE and plan.precision.compute == "fp8"


def gathers_eight_bits(plan: Plan) -> bool:
    """Whether tensor parallelism gathers streams and their gradients in the eight bits that products read.

    **Source**: ``PrepareFloat8ModuleInput`` and ``Float8RowwiseParallel`` cast what enters and, in the backward pass, what left before it is gathered (torchao/float8/float8_tensor_parallel.py,
    as torchtitan's ``apply_tp`` uses them); ``gather_along_first_dim`` of a quantizer (transformer_engine/pytorch/distributed.py). Sums stay in bfloat16. Where ``precision.comm`` says
    bf16, gathers do too and each rank casts what it has gathered, as with scales by rows (torchtitan: ``PrepareModuleInput`` for the recipe ``rowwise``).
    """
    return plan.precision.compute == "fp8" and plan.runtime.framework in EIGHT_BIT_GATHERS and plan.precision.comm != "bf16"


def lays_out_gathers(plan: Plan) -> bool:
    """Whether what tensor parallelism gathers or scatters is copied into order by a kernel: tokens are split inside samples, ranks' parts come one behind the other.

    **Source**: ``all_gather_tensor`` and ``reduce_scatter_tensor`` along another axis than the first chunk and concatenate (torch/distributed/_functional_collectives.py);
    torchtitan splits ``Shard(1)`` of (samples, tokens, hidden). One sample is in order as it is; pieces of asynchronous tensor parallelism are multiplied where they lie. Megatron keeps
    tokens first.
    """
    split = plan.parallel.tp > 1 and plan.parallel.sequence_parallel
    return plan.runtime.framework in LAID_OUT and split and (plan.batch.micro_batch or 1) > 1 and not plan.runtime.overlap_tp


def gathers_again(plan: Plan) -> bool:
    """Whether the backward pass gathers a half's input again: ``selective`` saves results of products and of scattered sums, not of gathers.

    **Source**: torchtitan's ``_save_list`` (torchtitan/models/llama/parallelize_llama.py, 2024-12; what is not in it is ``PREFER_RECOMPUTE``).
    """
    return OPERATORS.get(plan.runtime.framework, EAGER).alternate and plan.memory.recompute == "selective"


def allocator_of(plan: Plan) -> AllocatorSettings:
    """What the plan's framework sets for the caching allocator."""
    return ALLOCATORS.get(plan.runtime.framework, DEFAULT_SETTINGS)


def kept_bytes(blocks: Iterable[Block], plan: Plan, device: DeviceProfile, *, dtype: str) -> int:
    """Bytes that the framework keeps on a rank through the whole step for itself: workspaces of libraries, stand-ins for gradients.

    **Model**: cuBLAS' workspace. Where products add to the gradient buffer themselves, autograd is still handed a gradient of the parameter's shape and dtype;
    Transformer Engine keeps one such tensor for each distinct shape.

    **Source**: ``get_dummy_wgrad`` (transformer_engine/pytorch/module/base.py, 2.x).

    **Not modelled**: workspaces of other streams; cuDNN's. Casts of weights: `simulator.parallel.eight_bit`.

    Args:
        blocks: of the rank.
        plan: its framework.
        device: decides what libraries take.
        dtype: of parameters.
    """
    if device.kind == "cpu":
        return 0
    recent = float(device.compute_capability or 0.0) >= _HOPPER
    library = _TORCH_LIBRARY_BYTES[recent]
    if plan.runtime.framework not in TRANSFORMER_ENGINE:
        return library
    shapes = {
        kernel.shape[-2:]
        for block in blocks
        if block.name not in _OWN_PRODUCTS
        for kernel in block.options[0].forward.kernels
        if kernel.kernel_class in PRODUCTS and kernel.op != "bmm"
    }
    return library + _LIBRARY_BYTES[recent] + sum(rows * columns for rows, columns in shapes) * DTYPE_BYTES[dtype]


def with_spare_gradient(option: BlockOption, *, size_bytes: int) -> BlockOption:
    """The option of the head, whose product hands autograd a gradient that nobody reads: as large as the parameter, made anew in each backward pass.

    **Source**: ``LinearWithGradAccumulationAndAsyncCommunication.backward`` (megatron/core/tensor_parallel/layers.py, 0.14).

    Args:
        option: one way to run the head.
        size_bytes: of its matrix.
    """

    def spared(run: Pass) -> Pass:
        made = next(
            (
                n
                for n, event in enumerate(run.memory)
                if event.buffer in {"gradient", "shared_gradient"} and event.delta_bytes == size_bytes
            ),
            None,
        )
        if made is None:
            return run
        born = MemoryEvent(kernel=run.memory[made].kernel, buffer="transient", delta_bytes=size_bytes)
        gone = MemoryEvent(kernel=len(run.kernels), buffer="transient", delta_bytes=-size_bytes)
        return replace(run, memory=(*run.memory[:made], born, *run.memory[made:], gone))

    return replace(option, backward=spared(option.backward), backward_accumulate=spared(option.backward_accumulate))
