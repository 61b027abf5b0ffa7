"""A model as one rank runs it, with the prices of its passes on a device: what plans of one split, micro-batch, precision and framework share."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import lru_cache
from types import MappingProxyType

from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from simulator.lower import PassPrices, Price
from simulator.parallel.compiled_kernels import compiled_workload
from simulator.parallel.early_stop import stops_early, with_early_stop
from simulator.parallel.eight_bit import eight_bit_workload, without_timed_casts
from simulator.parallel.framework import FUSED_ACCUMULATION, operators_of
from simulator.parallel.fused_kernels import column_products
from simulator.parallel.host_dispatch import dispatch_of, host_seconds, with_dispatch
from simulator.parallel.host_python import python_seconds
from simulator.parallel.recompute import fit_framework
from simulator.parallel.stages import ChunkCost, Stage, StageCost, chunk_costs, stage_cost
from simulator.plan import Batch, Memory, Parallel, Plan, Precision, Runtime
from simulator.plan_sections import MemoryBlock
from simulator.precision import STORED_AS, price_in
from simulator.presets import TransformerConfig, build_workload
from simulator.sequence import Operation
from simulator.workload import Workload

PRICED_IN: Mapping[str, str] = MappingProxyType({"fp8": "bf16"})
"""Precisions whose workloads name the format of each product and hold its casts (`simulator.parallel.eight_bit`): kernels are priced as they stand."""
MOST_MODELS = 1024
"""Priced models that are kept: a search compares plans that share some hundreds."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class PricedModel:
    """One micro-batch's blocks on one rank, and what running them costs; costs are worked out when first asked for."""

    plan: Plan
    """One whose split, micro-batch, precision, framework and recompute these are; nothing else of it counts."""
    config: TransformerConfig
    device: DeviceProfile
    seq_len: int
    workload: Workload
    price: Price
    prices: PassPrices
    _costs: dict[Hashable, StageCost] = field(default_factory=dict)
    _chunks: dict[Hashable, tuple[ChunkCost, ...]] = field(default_factory=dict)
    _once: dict[str, object] = field(default_factory=dict)

    def stage_cost(self, stage: Stage, operations: Sequence[Operation]) -> StageCost:
        """Of a stage's passes, the host's time to launch them included; stages of the same blocks share it."""
        key = (tuple(map(id, stage.blocks)), stage.receives, stage.sends, tuple(operations))
        if key not in self._costs:
            runtime = self.plan.runtime
            python = python_seconds(runtime.framework, self.device.architecture)
            host = host_seconds(stage, operations, dispatch_of(self.device), runtime, python)
            self._costs[key] = with_dispatch(stage_cost(stage, operations, self.prices), host)
        return self._costs[key]

    def chunk_costs(self, stage: Stage, operations: Sequence[Operation], *, most: int) -> tuple[ChunkCost, ...]:
        """Of a stage's passes in at most so many chunks (`stages.chunk_costs`); stages of the same blocks share them."""
        key = (tuple(map(id, stage.blocks)), stage.receives, stage.sends, tuple(operations), most)
        if key not in self._chunks:
            self._chunks[key] = chunk_costs(stage, operations, self.prices, most=most)
        return self._chunks[key]

    def attention_s(self) -> float:
        """Seconds of one layer's attention kernels, forward."""
        if "attention" not in self._once:
            block = next((block for block in self.workload.blocks if block.name == "attention"), None)
            kernels = [kernel for kernel in block.discard.kernels if kernel.kernel_class == "attention"] if block else []
            self._once["attention"] = float(price(kernels, self.device).sum()) if kernels else 0.0
        return self._once["attention"]  # type: ignore[return-value]

    def product_s(self) -> Mapping[str, float] | None:
        """Seconds of the weights' gradients of each kind of block that the framework makes beside a sum over tensor-parallel ranks; None: it waits for these."""
        if self.plan.runtime.framework not in FUSED_ACCUMULATION:
            return None
        if "products" not in self._once:
            tokens = (self.plan.batch.micro_batch or 1) * self.seq_len // self.plan.parallel.cp
            products = {block.name: column_products(block, self.config.hidden, tokens) for block in self.workload.blocks}
            self._once["products"] = {name: float(self.price(kernels).sum()) for name, kernels in products.items() if kernels}
        return self._once["products"]  # type: ignore[return-value]


def priced_model(config: TransformerConfig, plan: Plan, device: DeviceProfile, *, seq_len: int) -> PricedModel:
    """The model of a plan on a device; plans that share it get the same one.

    Raises:
        InputError: a degree or length that breaks a rule.
    """
    split, memory = plan.parallel, plan.memory
    return _priced_model(
        config, _Same(device), seq_len, split.tp, split.cp, split.ep, split.sequence_parallel, plan.batch.micro_batch or 1, memory.recompute, memory.block,
        plan.precision, plan.runtime,
    )  # fmt: skip


@lru_cache(maxsize=MOST_MODELS)
def _priced_model(
    config: TransformerConfig, device: _Same, seq_len: int, tp: int, cp: int, ep: int, sequence_parallel: bool, micro_batch: int, recompute: str,
    block: tuple[MemoryBlock, ...], precision: Precision, runtime: Runtime,
) -> PricedModel:  # fmt: skip
    lone = tuple(replace(one, stage=0) for one in block)
    plan = Plan(
        parallel=Parallel(tp=tp, cp=cp, dp=ep, ep=ep, sequence_parallel=sequence_parallel), batch=Batch(micro_batch=micro_batch),
        memory=Memory(recompute=recompute, block=lone), precision=precision, runtime=runtime,
    )  # fmt: skip
    dtype = STORED_AS[precision.compute]
    made = build_workload(
        config, micro_batch=micro_batch, seq_len=seq_len, dtype=dtype, tp=tp, cp=cp, ep=ep,
        sequence_parallel=sequence_parallel and tp > 1, flash_attention=runtime.flash_attention, operators=operators_of(plan),
    )  # fmt: skip
    fitted = fit_framework(made, plan, config, dtype=dtype, seq_len=seq_len, architecture=device.value.architecture)
    if precision.compute == "fp8":
        tokens = micro_batch * seq_len // cp
        fitted = eight_bit_workload(fitted, plan, config, device.value, tokens=tokens)
    compiled = compiled_workload(fitted) if runtime.compile else fitted
    ready = with_early_stop(compiled) if stops_early(plan) else compiled
    own = price_in(
        PRICED_IN.get(precision.compute, precision.compute), device.value, launch="graph" if runtime.cuda_graphs else "stream"
    )
    if precision.compute == "fp8":
        own = without_timed_casts(own, device.value)
    return PricedModel(
        plan=plan, config=config, device=device.value, seq_len=seq_len, workload=ready,
        price=own, prices=PassPrices(own),
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Same:
    """A device profile by identity: its curves have no hash."""

    value: DeviceProfile

    def __hash__(self) -> int:
        return id(self.value)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Same) and self.value is other.value
