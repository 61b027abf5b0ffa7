"""What trainers do that a table does not say: facts of each framework and version, each with its source, never of a row."""

from __future__ import annotations

import re
from dataclasses import dataclass
from typing import Literal

from hardware_models.errors import InputError

GradientFormat = Literal["fp32", "half"]
FlashPort = Literal["cuda", "triton"]
ContextMethod = Literal["ring", "all-to-all"]


@dataclass(frozen=True, slots=True, kw_only=True)
class FrameworkFacts:
    """How a framework of some version runs a plan; what a row states goes before."""

    name: str
    pattern: str
    """Of the row's ``framework``, without case; the first that matches counts."""
    runtime: str
    """One of `simulator.plan.FRAMEWORKS`."""
    source: str
    grads: GradientFormat = "fp32"
    """Format in which gradients accumulate and travel in half-precision runs."""
    bf16_grads: GradientFormat = "fp32"
    """The same in bfloat16 runs."""
    overlap_grad_reduce: bool = True
    overlap_param_gather: bool = True
    flash_attention: bool = True
    """Where a row says ``unknown`` or nothing."""
    flash_generation: int = 2
    """Of its flash attention kernels, where a row does not say: 1, 2 or 3 (the third, or cuDNN's, which are as fast)."""
    flash_port: FlashPort = "cuda"
    """In which its first FlashAttention was written."""
    overlap_tp: bool = False
    """Tensor-parallel collectives travel beside the products that they feed."""
    cp_method: ContextMethod = "ring"
    """How context parallel ranks exchange what attention needs."""
    selective_is: str = "selective"
    """What its word ``selective`` means: that, or ``full`` where it checkpoints whole layers."""
    sequence_parallel: bool = True
    """Where a row with tensor parallelism does not say."""
    dropout: float = 0.0
    """Of models whose family has dropout."""
    vocab: int = 0
    """Where the row is blank; 0: nothing is assumed."""
    vocab_source: str = ""
    heads: int = 0
    """Attention heads where the row is blank; 0: of a usual width."""
    heads_source: str = ""
    vocab_multiple: int = 1
    """The vocabulary is padded to a multiple of this and tp."""
    tied: bool | None = None
    """Head and embedding share a matrix; None: as the model family has it."""
    micro_batches_per_stage: int = 0
    """Micro-batches per pipeline rank where a row states neither them nor their size; 0: one sample each."""
    zero_stage_in_pipelines: int | None = None
    """Sharding where there are pipeline stages, if it is another than the row's for all."""
    precision: str = ""
    """In which it computes where the source of a row does not state it, whatever the row assumes; empty: as the row says."""
    validates_afterwards: bool = False
    """Orders that split the backward pass step before gradients' norms are agreed on."""
    fused_norm_runtime: str = ""
    """Runtime of rows that name a norm's kernel; empty: the same."""
    product_library: str = ""
    """Version of the product library, one of `hardware_models.alignment`'s; empty: the newest."""
    recompute: str = ""
    """What is recomputed where a row does not say; empty: the least that fits."""
    not_simulated: str = ""
    """Why runs of this framework cannot be expressed; empty if they can."""


_MEGATRON_ARGUMENTS = "NVIDIA/Megatron-LM megatron/arguments.py"

FRAMEWORKS_KNOWN: tuple[FrameworkFacts, ...] = (
    FrameworkFacts(
        name="MegaScale", pattern=r"megascale", runtime="megatron-core", source="Jiang et al. 2024 (arXiv 2402.15627), section 3.1",
        not_simulated="MegaScale trains another model: attention and network in parallel, sliding windows (arXiv 2402.15627, section 3.1)",
    ),
    FrameworkFacts(
        name="Megatron-LM with DeepSpeed ZeRO-3, 2021", pattern=r"megatron.*2021.*(deepspeed|z)", runtime="deepspeed@2021", grads="half", overlap_grad_reduce=False, flash_attention=False,
        sequence_parallel=False, dropout=0.1, vocab_multiple=128,
        source="Narayanan et al. 2021 (arXiv 2104.04473), section 5.2 and table 2; DeepSpeed keeps gradients in the model's format; overlap_comm is off unless set "
        "(v0.3.13 deepspeed/runtime/zero/stage3.py)",
    ),
    FrameworkFacts(
        name="Megatron-DeepSpeed of BigScience", pattern=r"megatron-deepspeed.*(bigscience|bloom)", runtime="megatron-lm@2021", grads="half", overlap_grad_reduce=False, overlap_param_gather=False,
        flash_attention=False, heads=64,
        product_library="cublas-11.6", heads_source="'all NHEADS=64 (above too)', bigscience train/tr11-176B-ml/chronicles-prequel.md", sequence_parallel=False, dropout=0.1, vocab=50257,
        vocab_source="GPT-2's tokenizer, the default of VIA-Research/vTrain's configuration and of Megatron's examples", vocab_multiple=128,
        source="microsoft/Megatron-DeepSpeed, a fork of Megatron-LM v2.4: its fused kernels; DeepSpeed's pipeline engine reduces gradients after the last backward "
        "pass (runtime/pipe/engine.py, _exec_reduce_grads) in the model's format; bf16 adds them up in fp32 (runtime/bf16_optimizer.py); CUDA 11.5 (bigscience/bloom model card)",
    ),
    FrameworkFacts(
        name="Megatron-DeepSpeed", pattern=r"megatron-deepspeed", runtime="megatron-lm@2021", grads="half", overlap_grad_reduce=False, overlap_param_gather=False,
        flash_attention=False, sequence_parallel=False, dropout=0.1, vocab=50257,
        vocab_source="GPT-2's tokenizer, the default of VIA-Research/vTrain's configuration and of Megatron's examples", vocab_multiple=128,
        source="microsoft/Megatron-DeepSpeed, a fork of Megatron-LM v2.4: its fused kernels; DeepSpeed's pipeline engine reduces gradients after the last backward "
        "pass (runtime/pipe/engine.py, _exec_reduce_grads) in the model's format; bf16 adds them up in fp32 (runtime/bf16_optimizer.py)",
    ),
    FrameworkFacts(
        name="Megatron-LM fork of Zero Bubble", pattern=r"(sail-sg|zero.?bubble)", runtime="megatron-core@2023", precision="fp16", validates_afterwards=True, grads="half", overlap_grad_reduce=False,
        overlap_param_gather=False, flash_attention=False, sequence_parallel=False, dropout=0.1, vocab=32000,
        vocab_source="printed sizes of 1.5, 6.2, 14.6 and 28.3 billion are 12 L h^2 and one table of 32,000 rows (arXiv 2401.10241, table 3)", vocab_multiple=128,
        source="sail-sg/zero-bubble-pipeline-parallelism, a fork of Megatron-LM of 10/2023, whose weight gradients are added inside products (gradient_accumulation_fusion); "
        "examples/pretrain_zero_bubble.sh, first release: --fp16, no --use-flash-attn, dropout as by default, --no-overlap-p2p-communication; "
        "section 4 of arXiv 2401.10241: optimizer post-validation in orders that split the backward pass",
    ),
    FrameworkFacts(
        name="Megatron-LM of 2021 and 2022", pattern=r"megatron-lm.*202[0-2]", runtime="megatron-lm@2021", grads="half", overlap_grad_reduce=False,
        overlap_param_gather=False, flash_attention=False, sequence_parallel=False, dropout=0.1, vocab=50257,
        vocab_source="GPT-2's tokenizer, padded to 51,200 (Narayanan et al. 2021, section 5.1)", vocab_multiple=128,
        source=f"{_MEGATRON_ARGUMENTS} v2.5: accumulate_allreduce_grads_in_fp32 is set for bf16 only; megatron/model/distributed.py reduces after the last backward pass",
    ),
    FrameworkFacts(
        name="Megatron-LM of 2023", pattern=r"megatron-lm 285068c8", runtime="megatron-core@2023", overlap_grad_reduce=False, overlap_param_gather=False,
        flash_attention=False, dropout=0.1, vocab_multiple=128,
        source="Jiang et al. 2024 (arXiv 2402.15627), section 6.1 (commit 285068c8) and table 3 with sections 3.2 and 3.3: overlap of tensor, pipeline and data parallel communication (in this order 2.2, 2.5 and "
        "1.5 points of MFU) and efficient operators (FlashAttention-2, norms and GeLU fused: 1.7) are what MegaScale adds to this baseline, so it waits for its messages, in interleaved orders too; "
        f"section 3.6: eight 200 Gb/s adapters a server; {_MEGATRON_ARGUMENTS}: dropout 0.1, --use-flash-attn off, --transformer-impl local",
    ),
    FrameworkFacts(
        name="Megatron-Bridge", pattern=r"(megatron-bridge|nemo)", runtime="megatron-core", bf16_grads="half", flash_generation=3, overlap_tp=True, recompute="none", vocab_multiple=128,
        source="NVIDIA-NeMo/Megatron-Bridge scripts/performance/configs: grad_reduce_in_fp32 = False in every model's common settings (llama/llama3_llm_pretrain.py, "
        "qwen/qwen3_llm_pretrain.py), user buffers for tensor parallelism (llama/llama31_llm_pretrain.py: userbuffers_fp8_h100_h16384_tp8_cp2_mbs1_seqlen8192), recompute_granularity "
        "None (qwen3; no recompute_* in WorkloadBaseConfig of H100's Llama 3 70B and 405B); CUDA graphs of H100's runs are off, or of networks only (cuda_graph_scope); "
        "attention by cuDNN, as fast as the third FlashAttention",
    ),
    FrameworkFacts(
        name="Megatron-core of SimuMax", pattern=r"megatron-lm 0\.14.*23e00ed", runtime="megatron-core", flash_generation=3, cp_method="all-to-all", vocab_multiple=128,
        source="MooreThreads/SimuMax simu_tools/megatron_scripts/scripts/run_pretrain_deepseekv2.sh and run_pretrain_llama3.sh @1b8ca90bec: --cp-comm-type a2a, --accumulate-allreduce-grads-in-fp32, "
        "--clip-grad 1.0, experts' input padded to a capacity factor of 1; else as Megatron-core",
    ),
    FrameworkFacts(
        name="Megatron-core", pattern=r"megatron(?!-style)", runtime="megatron-core", flash_generation=3, vocab_multiple=128,
        source=f"{_MEGATRON_ARGUMENTS} core_r0.8: gradients in fp32 for bf16, --overlap-grad-reduce and --overlap-param-gather with the distributed optimizer; Transformer Engine's "
        "attention is cuDNN's on Hopper and later (transformer_engine/pytorch/attention.py, get_attention_backend)",
    ),
    FrameworkFacts(
        name="AA-Scaling", pattern=r"(aa-scaling|aleph)", runtime="aa-scaling", fused_norm_runtime="aa-scaling@fused-norm", grads="half", bf16_grads="half", overlap_grad_reduce=False, overlap_param_gather=False, sequence_parallel=False,
        source="Hagemann et al. 2023 (arXiv 2311.05610), section 3: 1F1B and ZeRO-1; Aleph-Alpha/scaling @01b9d21dba: every replica keeps all gradients in the model's format "
        "(src/scaling/core/optimizer/parameter_group.py), torch's own cross entropy on logits in float32 (src/scaling/transformer/model/losses/cross_entropy.py)",
    ),
    FrameworkFacts(
        name="torchtitan", pattern=r"torchtitan", runtime="torchtitan", micro_batches_per_stage=1, zero_stage_in_pipelines=1,
        source="pytorch/torchtitan docs/fsdp.md (fp32 reduction, bf16 parameters), torchtitan/config_manager.py of 12/2024: pipeline micro-batches default to the number of "
        "stages; torchtitan/parallelisms/parallelize_llama.py, apply_fsdp: with pipeline stages parameters stay gathered after the forward pass, and gradients are reduced once a step",
    ),
    FrameworkFacts(
        name="llm-foundry", pattern=r"(llm-foundry|composer|mosaic)", runtime="pytorch", sequence_parallel=False, flash_generation=1, flash_port="triton",
        source="mosaicml/llm-foundry scripts/train/benchmarking/README.md: FSDP, mixed_precision DEFAULT (reduces in fp32), limit_all_gathers; torch's FSDP prefetches one block; "
        "scripts/train/benchmarking/submit_benchmarks.py: torch 1.13, attn_impl triton, a port of the first FlashAttention",
    ),
    FrameworkFacts(
        name="FMS-FSDP", pattern=r"fms-fsdp", runtime="pytorch", sequence_parallel=False, selective_is="full",
        source="foundation-model-stack/fms-fsdp fms_fsdp/policies/ac_handler.py: selective checkpointing keeps nothing of the layers that it picks; fms_fsdp/config/training.py: "
        "selective_checkpointing = 1, all of them; README.md: torch's SDPA, FlashAttention v2",
    ),
    FrameworkFacts(
        name="PyTorch FSDP", pattern=r"(fsdp|pytorch|ddp|accelerate|hugging|transformers|lightning|meta internal)", runtime="pytorch", sequence_parallel=False,
        source="torch.distributed.fsdp: gathers one block ahead, reduces behind the backward pass",
    ),
    FrameworkFacts(
        name="DeepSpeed", pattern=r"(deepspeed|zero)", runtime="deepspeed", grads="half", bf16_grads="half", sequence_parallel=False,
        source="microsoft/DeepSpeed docs/_pages/config-json.md: overlap_comm, gradients in the model's format unless data_types.grad_accum_dtype says otherwise",
    ),
)  # fmt: skip
"""In the order in which they are tried."""


def facts_of(framework: str) -> FrameworkFacts:
    """The facts of a row's framework.

    Raises:
        InputError: no framework of that name is known, or its runs cannot be expressed.
    """
    text = framework.lower()
    found = next((facts for facts in FRAMEWORKS_KNOWN if re.search(facts.pattern, text)), None)
    if found is None:
        known = ", ".join(facts.name for facts in FRAMEWORKS_KNOWN)
        raise InputError(
            source="row", key="framework", value=framework, rule=f"no facts of this framework are known; known are {known}"
        )
    if found.not_simulated:
        raise InputError(source="row", key="framework", value=framework, rule=found.not_simulated)
    return found
