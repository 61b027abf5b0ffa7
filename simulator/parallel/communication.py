"""What a stage sends and waits for: tensor, context and expert parallel collectives inside its passes, messages between stages, gradients between replicas."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass

from hardware_models.network.cluster import CommGroup
from hardware_models.network.collectives import collective_seconds
from hardware_models.network.overlap import OverlapFactors
from hardware_models.units import DTYPE_BYTES
from simulator.parallel.early_stop import STOPPED, stops_early
from simulator.parallel.framework import AA_SCALING, gathers_again, gathers_eight_bits, lays_out_gathers
from simulator.parallel.mesh import Mesh, two_steps
from simulator.parallel.overlapped_products import HalfProducts, TensorOverlap, together_seconds
from simulator.parallel.parameter_gathers import DEEPSPEED
from simulator.parallel.stages import Stage
from simulator.parallel.torch_ring import FLOAT_BYTES, TORCH_RING, TorchRing
from simulator.plan import Plan
from simulator.presets import TransformerConfig
from simulator.workload import Block

_TP_BLOCKS = frozenset({"attention", "network", "experts"})
_SCATTERING = ("megatron-lm@2021",)
"""Frameworks that split a message over tp and gather it behind the wire where sequence parallelism has not split it (arXiv 2104.04473, section 4.1)."""
_LOSS_REDUCTIONS = 3
"""All-reduces of a loss over a vocabulary that is split: greatest logit, sum of exponentials, the label's logit (Megatron-LM, vocab-parallel cross entropy)."""
_LOSS_BYTES = 4
_ALL_TO_ALLS = 4
"""Of attention under all-to-all context parallelism: query, key, value, result (Jacobs et al. 2023, DeepSpeed Ulysses)."""
_COPIES_AROUND = 2
"""Of a tensor that changes between tokens and heads: parts for each rank laid out before the exchange, what came put in order behind it (``flash_attn_a2a_communicate``, NVIDIA/TransformerEngine
transformer_engine/pytorch/attention/dot_product_attention/context_parallel.py, 2.x; ``single_all_to_all``, DeepSpeed deepspeed/sequence/layer.py)."""
_EXPERT_EXCHANGES = 2
"""Dispatch and combine."""
_ATTENTION_BACKWARD = 2.5
"""Time of attention's backward pass over its forward pass: five products instead of two (Dao 2023, FlashAttention-2, section 3)."""
_HIERARCHICAL = DEEPSPEED
"""Frameworks that exchange tokens inside nodes first and then across where that is faster (Rajbhandari et al. 2022, DeepSpeed-MoE, arXiv 2201.05596, section 5.2)."""
_WAYS = 2
"""A copy reads and writes."""
_RING_BACKWARD = 2
"""Keys and values, and their gradients, go round in the backward pass (Liu et al. 2023, Ring Attention)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Exposed:
    """Seconds of collectives that a pass waits for, by axis."""

    tp_s: float = 0.0
    cp_s: float = 0.0
    ep_s: float = 0.0

    def __add__(self, other: Exposed) -> Exposed:
        return Exposed(tp_s=self.tp_s + other.tp_s, cp_s=self.cp_s + other.cp_s, ep_s=self.ep_s + other.ep_s)

    @property
    def total_s(self) -> float:
        """All axes."""
        return self.tp_s + self.cp_s + self.ep_s


@dataclass(frozen=True, slots=True, kw_only=True)
class StageCommunication:
    """Of one micro-batch on one stage."""

    forward: Exposed
    backward: Exposed
    """Recompute included."""
    message_bytes: float
    """To the next stage, from each rank; its gradient comes back in the same size."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Beside:
    """What collectives of tensor parallelism are cut into pieces beside."""

    overlap: TensorOverlap
    products: Mapping[str, HalfProducts]
    """By name of the block; a block that is not here overlaps nothing."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Behind:
    """What the collective of an input's gradient hides behind."""

    product_s: Mapping[str, float]
    """Seconds of the weights' gradient that is made at the same time, by name of the block; a block that is not here hides nothing."""
    factors: OverlapFactors

    def exposed_s(self, name: str, collective_s: float) -> float:
        """Seconds by which product and collective together are longer than the product alone: both are slower until one has ended."""
        product_s = self.product_s.get(name, 0.0)
        return together_seconds(product_s, collective_s, self.factors) - product_s


def _free(_size_bytes: float) -> float:
    """A copy that nobody prices."""
    return 0.0


class Communication:
    """Prices of a plan's communication on a mesh.

    **Model** (Megatron-LM; Korthikanti et al. 2022, sections 4.1 and 4.2): each attention and each network ends in an all-reduce over tp and begins the backward pass
    with one; with sequence parallelism an all-gather and a reduce-scatter stand for each, of the same bytes. The embedding ends in an all-reduce and needs nothing
    backward; with sequence parallelism in a reduce-scatter, whose backward pass is an all-gather. Gradients go over dp and cp together.

    Megatron-core makes the input's gradient first and sums it over tp while it makes the weights' gradient (`Behind`; on unless
    ``--no-async-tensor-model-parallel-allreduce`` is given).

    With ``overlap_tp`` collectives travel in pieces beside the products at both ends of a half (`overlapped_products`).

    What enters a half is gathered in eight bits where its products compute in them; torch's selective checkpointing gathers it once more in the backward pass, and
    DTensor copies it into order where it is split inside samples (`simulator.parallel.framework`).

    A ring of context parallelism passes keys and values on while their block of attention computes (`together_seconds`); the last block waits for nothing. Each rank holds an early and a
    late piece of the sequence, so that causal blocks take equal times (zig-zag; Brandon et al. 2023, arXiv 2311.09431; Megatron-core and torch do so). torch's ring gathers all keys first (`torch_ring`).
    Experts exchange the tokens of the busiest rank (`Experts.load`).

    **Not modelled**: the second all-gather that sequence parallelism needs for weight gradients (it is overlapped); tokens that go once to a node for several of its experts.
    """

    def __init__(
        self, plan: Plan, mesh: Mesh, config: TransformerConfig, *, dtype: str, seq_len: int, factors: OverlapFactors, behind: Behind | None = None,
        beside: Beside | None = None, copy_s: Callable[[float], float] | None = None,
    ) -> None:  # fmt: skip
        self.copy_s = copy_s if copy_s is not None and lays_out_gathers(plan) else None
        self.moved_s = copy_s or _free
        self.plan, self.mesh, self.config, self.behind, self.beside = plan, mesh, config, behind, beside
        self.element_bytes, self.factors = DTYPE_BYTES[dtype], factors
        self.tokens = (plan.batch.micro_batch or 1) * seq_len // plan.parallel.cp
        self._known: dict[tuple[str, str, float], float] = {}
        self._blocks: dict[tuple[int, float, bool, bool], tuple[Block, Exposed]] = {}
        """By a block's identity, which stands for it as long as it is kept here."""

    def seconds(self, axis: str, collective: str, size_bytes: float) -> float:
        """Of a collective over an axis; layers of one kind ask for the same ones."""
        key = (axis, collective, size_bytes)
        if key not in self._known:
            spread = self.mesh.degree(axis) > 1
            self._known[key] = (
                collective_seconds(collective, size_bytes, self.mesh.group(axis), self.mesh.cluster) if spread else 0.0
            )
        return self._known[key]

    def over(self, collective: str, size_bytes: float, group: CommGroup) -> float:
        """Of a collective over a group."""
        return collective_seconds(collective, size_bytes, group, self.mesh.cluster) if group.num_ranks > 1 else 0.0

    def stage(self, stage: Stage, *, recomputed: Iterable[int], attention_s: float) -> StageCommunication:
        """Of a stage.

        Args:
            stage: whose passes.
            recomputed: its blocks that run forward again.
            attention_s: seconds of one block's attention forward, behind which a ring of keys hides.
        """
        forward = sum((self.block(block, attention_s) for block in stage.blocks), Exposed())
        again = sum((self.block(stage.blocks[index], attention_s, again=True) for index in recomputed), Exposed())
        backward = sum((self.block(block, attention_s, backward=True) for block in stage.blocks), Exposed())
        stream = self.tokens * self.config.hidden * self.element_bytes
        parallel = self.plan.parallel
        scatters = self.plan.runtime.framework in _SCATTERING and not parallel.sequence_parallel and parallel.pp > 1
        gather = Exposed(tp_s=self.seconds("tp", "all_gather", float(stream)) if scatters else 0.0)
        forward += gather if stage.receives else Exposed()
        backward += gather if stage.sends else Exposed()
        split = parallel.tp if parallel.sequence_parallel or scatters else 1
        return StageCommunication(forward=forward, backward=backward + again, message_bytes=stream / split)

    def block(self, block: Block, attention_s: float, *, backward: bool = False, again: bool = False) -> Exposed:
        """Of one block's forward or backward pass; ``again``: its forward pass inside the backward one, which may stop before its last collective."""
        key = (id(block), attention_s, backward, again)
        if key not in self._blocks:
            self._blocks[key] = block, self._block(block, attention_s, backward=backward, again=again)
        return self._blocks[key][1]

    def _block(self, block: Block, attention_s: float, *, backward: bool, again: bool) -> Exposed:
        tp_s = cp_s = ep_s = 0.0
        stream = self.tokens * self.config.hidden * self.element_bytes
        if block.name in _TP_BLOCKS:
            stopped = again and stops_early(self.plan) and any(option.name == STOPPED for option in block.options)
            tp_s = (
                self._gradient_collective(block.name, stream) if backward
                else self._stream_collective(block.name, stream, stopped=stopped)
            )  # fmt: skip
        elif block.name == "embedding":
            tp_s = self._embedding(stream, backward=backward)
        elif block.name == "head":
            tp_s = self._head(stream, backward=backward)
        if block.name == "attention":
            cp_s = self._context(attention_s, backward=backward)
        if block.name == "experts" and self.config.experts is not None:
            experts, split = self.config.experts, self.plan.parallel
            ep_s = _EXPERT_EXCHANGES * self.routed_seconds(stream * experts.top_k / split.tp * experts.load(split.ep))
        return Exposed(tp_s=tp_s, cp_s=cp_s, ep_s=ep_s)

    def _stream_collective(self, name: str, stream: float, *, stopped: bool = False) -> float:
        """What enters a half is gathered, what leaves it summed; ``stopped``: it does not leave."""
        if not self.plan.parallel.sequence_parallel:
            return 0.0 if stopped else self.seconds("tp", "all_reduce", stream)
        gather_s = self._gathered(stream)
        scatter_s = 0.0 if stopped else self._scattered(stream)
        products = self.beside.products.get(name) if self.beside else None
        if self.beside is None or products is None:
            return gather_s + scatter_s
        overlap = self.beside.overlap
        left_s = 0.0 if stopped else overlap.scattered_s([products.row], scatter_s)
        return overlap.gathered_s(products.columns, gather_s) + left_s

    def _gathered(self, stream: float) -> float:
        """Seconds of a stream's gather around products, in eight bits where the products read these, and of laying it out."""
        size = stream / self.element_bytes if gathers_eight_bits(self.plan) else stream
        return self.seconds("tp", "all_gather", size) + (self.copy_s(size) if self.copy_s else 0.0)

    def _scattered(self, stream: float) -> float:
        """Seconds of laying a stream out and scattering it."""
        return self.seconds("tp", "reduce_scatter", stream) + (self.copy_s(stream) if self.copy_s else 0.0)

    def _gradient_collective(self, name: str, stream: float) -> float:
        """The gathered gradient that enters a half, the sum over tp of the one that leaves it, and the input where it is gathered again for the weights' gradients."""
        parallel = self.plan.parallel.sequence_parallel
        gather_s = self._gathered(stream) if parallel else 0.0
        summed_s = self._scattered(stream) if parallel else self.seconds("tp", "all_reduce", stream)
        summed_s *= 1 if parallel else self._entering_products(name)
        again_s = gather_s if parallel and gathers_again(self.plan) else 0.0
        products = self.beside.products.get(name) if self.beside else None
        if self.beside is not None and products is not None:
            again_s = self.beside.overlap.gathered_s(products.columns, again_s) if again_s else 0.0
            gather_s = self.beside.overlap.gathered_s([products.row_gradient], gather_s)
            if self.behind is None:
                return again_s + gather_s + self.beside.overlap.scattered_s(products.column_gradients, summed_s)
        return again_s + gather_s + (summed_s if self.behind is None else self.behind.exposed_s(name, summed_s))

    def _entering_products(self, name: str) -> int:
        """Products that a half begins with, where each sums its input's gradient on its own; else 1.

        **Source**: ``copy_to_tensor_model_parallel_region`` in each ``ColumnParallelLinear.forward``, two of which ``ParallelSwiGLUMLP`` begins with (Aleph-Alpha/scaling @01b9d21dba
        src/scaling/core/nn/linear/column_parallel_linear.py, mlp.py); with sequence parallelism the norm gathers once for both (norm/rms_norm.py).
        """
        gated = name == "network" and self.config.activation == "swiglu"
        return 2 if gated and self.plan.runtime.framework in AA_SCALING else 1

    def _embedding(self, stream: float, *, backward: bool) -> float:
        """Ranks hold rows of the table each: what they find is summed; the sum's backward pass is the identity."""
        if self.plan.parallel.sequence_parallel:
            return self.seconds("tp", "all_gather" if backward else "reduce_scatter", stream)
        return 0.0 if backward else self.seconds("tp", "all_reduce", stream)

    def _head(self, stream: float, *, backward: bool) -> float:
        """The final stream is gathered; the loss reduces three numbers a token, or logits are gathered; its gradient is reduced."""
        parallel = self.plan.parallel.sequence_parallel
        if backward:
            return self.seconds("tp", "reduce_scatter" if parallel else "all_reduce", stream)
        gather = self.seconds("tp", "all_gather", stream) if parallel else 0.0
        if self.plan.runtime.framework in AA_SCALING:
            return gather + self.seconds("tp", "all_gather", float(self.tokens * self.config.vocab * self.element_bytes))
        return gather + _LOSS_REDUCTIONS * self.seconds("tp", "all_reduce", float(self.tokens * _LOSS_BYTES))

    def routed_seconds(self, size_bytes: float) -> float:
        """One exchange of tokens among experts, of the busiest rank's bytes."""
        group = self.mesh.group("ep")
        flat_s = self.over("all_to_all", size_bytes, group)
        if self.plan.runtime.framework not in _HIERARCHICAL:
            return flat_s
        return min(flat_s, sum(self.over("all_to_all", size_bytes, step) for step in two_steps(group)))

    def _context(self, attention_s: float, *, backward: bool) -> float:
        cp = self.plan.parallel.cp
        if cp == 1:
            return 0.0
        config, tp = self.config, self.plan.parallel.tp
        head_bytes = self.tokens * config.dim_per_head * self.element_bytes
        keys = 2.0 * head_bytes * max(1, config.num_kv_heads // tp)
        if self.plan.parallel.cp_method == "all-to-all":
            query = head_bytes * config.heads / tp
            sizes = (query, keys / 2, keys / 2, query)
            assert len(sizes) == _ALL_TO_ALLS
            return sum(self.seconds("cp", "all_to_all", size) + _COPIES_AROUND * self.moved_s(size) for size in sizes)
        block_s = attention_s * (_ATTENTION_BACKWARD if backward else 1.0) / cp
        if self.plan.runtime.framework in TORCH_RING:
            ring = self._torch_ring()
            return ring.backward_s(block_s) if backward else ring.forward_s(block_s)
        rounds = _RING_BACKWARD if backward else 1
        step_s = collective_seconds("send_recv", keys * rounds, self.mesh.neighbours("cp"), self.mesh.cluster)
        return (cp - 1) * (together_seconds(block_s, step_s, self.factors) - block_s)

    def _torch_ring(self) -> TorchRing:
        cp, config = self.plan.parallel.cp, self.config
        elements = self.tokens * config.dim_per_head * config.heads // self.plan.parallel.tp
        passed = 2.0 * elements * FLOAT_BYTES
        return TorchRing(
            ranks=cp, elements=elements, width=self.element_bytes, compiled=self.plan.runtime.compile, factors=self.factors,
            gather_s=self.seconds("cp", "all_gather", 2.0 * elements * self.element_bytes * cp), moved_s=lambda size: self.moved_s(size / _WAYS),
            pass_s=collective_seconds("send_recv", passed, self.mesh.neighbours("cp"), self.mesh.cluster),
        )  # fmt: skip
