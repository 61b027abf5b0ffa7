"""Simulate a plan over many devices: model configuration x plan x cluster -> step time, memory per pipeline rank, and what explains them."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import replace
from itertools import chain

import numpy as np
from numpy.typing import NDArray

from hardware_models.caching_allocator import AllocatorPeaks
from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from hardware_models.units import DTYPE_BYTES
from simulator.parallel.allocations import rank_peaks, rank_resident, stage_tensors
from simulator.parallel.batch_copy import copy_seconds
from simulator.parallel.communication import Behind, Beside, Communication
from simulator.parallel.default_cut import partition_of
from simulator.parallel.eight_bit import kept_weight_bytes, weight_cast_seconds, weight_elements
from simulator.parallel.experts import expert_elements
from simulator.parallel.framework import FUSED_ACCUMULATION, allocator_of, kept_bytes
from simulator.parallel.gradient_sync import PARAMETERS_SHARDED, GradientSync, StageLoad, gradient_sync, tied_seconds
from simulator.parallel.host_python import NO_STALLS, HostStalls, stalls_of
from simulator.parallel.interference import overlap_of, slowdown_of
from simulator.parallel.lower_step import Exceptions, StageVariant, StepParts, lower_step
from simulator.parallel.memory import static_memory
from simulator.parallel.mesh import Mesh, mesh_of
from simulator.parallel.messages import message_link, waits_for_messages
from simulator.parallel.offload import Offload
from simulator.parallel.offload_memory import host_peaks, node_peak
from simulator.parallel.offload_plan import offload_of, weights_away
from simulator.parallel.optimizer_step import gradient_check, optimizer_seconds
from simulator.parallel.overlapped_products import TensorOverlap, half_products
from simulator.parallel.parameter_gathers import Unit, gathered_elements, list_seconds, prefetched_units, unit_seconds, units_of
from simulator.parallel.priced_model import PricedModel, priced_model
from simulator.parallel.recompute import stage_sequences
from simulator.parallel.shared_adapters import crossing_streams
from simulator.parallel.simulation import ParallelSimulation
from simulator.parallel.stages import ChunkCost, Stage, stages_of
from simulator.parallel.torch_buffers import pipeline_bytes, stream_pool_bytes, with_pool
from simulator.parallel.variants import stage_variants
from simulator.parallel.wire_format import WireFormat
from simulator.pipeline.action import Order
from simulator.plan import Memory, Parallel, Pipeline, Plan
from simulator.precision import PRODUCTS_IN, STORED_AS
from simulator.presets import TransformerConfig
from simulator.presets.tape import copy
from simulator.program import Program
from simulator.reserved_memory import reserved_peaks
from simulator.run_record import RunRecord, check_complete, profiles_of
from simulator.sequence import Operation
from simulator.simulate import ENGINES
from simulator.workload import Block, Workload

WEIGHT_SHARE = 0.5
"""Part of the activations that only weight gradients need: as the Zero Bubble paper takes it for its memory limits (arXiv 2401.10241, section 2)."""
STAGING_CHUNKS = 8
"""Most chunks of a pass beside which offloaded bytes travel: more change little and cost events."""


def simulate_parallel(
    config: TransformerConfig, plan: Plan, cluster: Cluster, device: DeviceProfile, order: Order, *, seq_len: int, engine: str = "compiled",
    reserved: bool = False, sequence: Sequence[Operation] | None = None,
) -> ParallelSimulation:  # fmt: skip
    """One training step of a transformer on a cluster.

    Args:
        config: of the model.
        plan: with its batch resolved.
        cluster: with as many GPUs as the plan uses.
        device: profile of the cluster's devices.
        order: of the plan's schedule.
        seq_len: tokens per sample.
        engine: one of `simulate.ENGINES`.
        reserved: whether to replay the caching allocator (tens of milliseconds a rank).
        sequence: in which each stage runs its blocks, indices of the whole model (`stage_sequence`), in place of what ``memory.recompute`` says.

    **Not modelled**: the host's dispatch, the data loader, gradient clipping.

    Raises:
        InputError: a degree, stage or dtype that breaks a rule.
    """
    return Assembly(config, plan, cluster, device, order, seq_len, sequence).simulate(engine, reserved=reserved)


def step_parts(
    config: TransformerConfig, plan: Plan, cluster: Cluster, device: DeviceProfile, order: Order, *, seq_len: int
) -> StepParts:  # fmt: skip
    """What the step consists of, priced, before it is lowered; arguments and errors as in `simulate_parallel`."""
    return Assembly(config, plan, cluster, device, order, seq_len).parts()


class Assembly:
    """What `simulate_parallel` puts together."""

    def __init__(
        self,
        config: TransformerConfig,
        plan: Plan,
        cluster: Cluster,
        device: DeviceProfile,
        order: Order,
        seq_len: int,
        sequence: Sequence[Operation] | None = None,
        *,
        is_open: bool = False,
    ) -> None:
        self.config, self.plan, self.cluster, self.device, self.order, self.seq_len = (
            config,
            plan,
            cluster,
            device,
            order,
            seq_len,
        )
        self.dtype = STORED_AS[plan.precision.compute]
        self.mesh: Mesh = mesh_of(plan, cluster)
        self.model: PricedModel = priced_model(config, plan, device, seq_len=seq_len)
        self.price, self.prices, self.workload = self.model.price, self.model.prices, self.model.workload
        cut = partition_of(self.workload, plan, self.prices, order, device, dtype=self.dtype)
        self.stages: tuple[Stage, ...] = stages_of(self.workload, plan, cut)
        self.variants = [stage_variants(plan, stage) for stage in self.stages] if sequence is None and not is_open else []
        """How micro-batches run each stage; empty where a sequence says it for all."""
        self.operations = (
            [own.operations[0] for own in self.variants] if sequence is None
            else stage_sequences(sequence, self.stages, source=plan.memory.recompute)
        )  # fmt: skip
        self.chunks: tuple[tuple[ChunkCost, ...], ...] = (
            self._chunks() if plan.memory.activation_offload or plan.memory.weight_offload else ((),) * len(self.stages)
        )
        self._syncs: dict[tuple[StageLoad, int], GradientSync] = {}
        self._replays: dict[Hashable, AllocatorPeaks] = {}
        self.communication = Communication(
            plan,
            self.mesh,
            config,
            dtype=self.dtype,
            seq_len=seq_len,
            factors=overlap_of(device, cluster),
            behind=self._behind(),
            beside=self._beside(),
            copy_s=self._copy_s,
        )

    def _copy_s(self, size_bytes: float) -> float:
        """Seconds of a kernel that copies so many bytes."""
        elements = max(1, round(size_bytes / DTYPE_BYTES[self.dtype]))
        return self.prices.once(("copy", elements), lambda: float(self.price([copy("cat", elements, self.dtype)])[0]))

    def _chunks(self) -> tuple[tuple[ChunkCost, ...], ...]:
        """Passes of each stage as offloaded bytes travel beside them."""
        return tuple(
            self.model.chunk_costs(stage, own, most=STAGING_CHUNKS)
            for stage, own in zip(self.stages, self.operations, strict=True)
        )

    def _behind(self) -> Behind | None:
        """What sums over tensor parallel ranks hide behind; Megatron-LM of 2021 waited for them."""
        product_s = self.model.product_s()
        return None if product_s is None else Behind(product_s=product_s, factors=overlap_of(self.device, self.cluster))

    @property
    def _tokens(self) -> int:
        """Of a micro-batch on a context-parallel rank."""
        return (self.plan.batch.micro_batch or 1) * self.seq_len // self.plan.parallel.cp

    def _beside(self) -> Beside | None:
        """What collectives of tensor parallelism travel beside, where the plan overlaps them."""
        if not self.plan.runtime.overlap_tp:
            return None
        found = {
            block.name: half_products(block, hidden=self.config.hidden, tokens=self._tokens) for block in self.workload.blocks
        }
        overlap = TensorOverlap(
            price=self.price, factors=overlap_of(self.device, self.cluster), ranks=self.plan.parallel.tp,
            chunked_scatter=self.plan.runtime.framework in FUSED_ACCUMULATION,
        )  # fmt: skip
        return Beside(overlap=overlap, products={name: products for name, products in found.items() if products})

    def _whole_workload(self) -> Workload:
        """Of the model on one device, as model FLOPs count it: without padding of experts."""
        experts, plan = self.config.experts, self.plan
        config = self.config if experts is None else replace(self.config, experts=experts.uniform)
        alone = replace(plan, parallel=Parallel(), pipeline=Pipeline(), memory=Memory())
        return priced_model(
            config, replace(alone, runtime=replace(plan.runtime, compile=False)), self.device, seq_len=self.seq_len
        ).workload

    def parts(self) -> StepParts:
        """What the step consists of, priced."""
        operations = self.operations
        attention_s = self.model.attention_s()

        known: dict[tuple[object, ...], StageVariant] = {}

        def priced(stage: Stage, own: Sequence[Operation]) -> StageVariant:
            """A stage whose micro-batches run its blocks in this order; stages of the same blocks share it."""
            key = (tuple(map(id, stage.blocks)), stage.receives, stage.sends, tuple(own))
            if key not in known:
                known[key] = price_stage(stage, own)
            return known[key]

        def price_stage(stage: Stage, own: Sequence[Operation]) -> StageVariant:
            cost = self.model.stage_cost(stage, own)
            sent = self.communication.stage(stage, recomputed=cost.recomputed, attention_s=attention_s)
            return StageVariant(cost=cost, communication=sent)

        usual = [priced(stage, own) for stage, own in zip(self.stages, operations, strict=True)]
        others = [
            tuple(priced(stage, own) for own in variants.operations[1:])
            for stage, variants in zip(self.stages, self.variants, strict=False)
        ]
        limit, latency_s = message_link(self.mesh)
        tied = 0 if self._ends_together else self.stages[0].shared_elements
        return StepParts(
            order=self.order, costs=[own.cost for own in usual], communication=[own.communication for own in usual],
            exceptions=Exceptions(variants=others, variant_of=self._variant_of()) if any(others) else None, sync=[self._sync(stage) for stage in self.stages],
            optimizer_s=[
                optimizer_seconds(self.plan, self.device, elements=self._elements(rank), dtype=self.dtype)
                + weight_cast_seconds(self.plan, self.device, weight_elements(self._blocks(rank), self.config))
                for rank in range(self.order.num_ranks)
            ],
            tied_s=tied_seconds(self.plan, self.mesh, tied), message_limit_bytes_per_s=limit,
            message_latency_s=latency_s, link_bytes_per_s=[limit] * (2 * self.order.num_ranks), weight_share=WEIGHT_SHARE,
            waits_for_messages=waits_for_messages(self.plan), stalls=self._stalls(),
            attention_runs=[self._attention_runs(stage, own.cost.recomputed) for stage, own in zip(self.stages, usual, strict=True)], offload=self._offload(), adapter_streams=crossing_streams(self.mesh),
            check=gradient_check(self.plan, self.mesh, self.device, [self._elements(rank) for rank in range(self.order.num_ranks)]),
            load_s=copy_seconds(self.order, self.cluster, self.workload.batch_bytes),
        )  # fmt: skip

    def _blocks(self, rank: int) -> list[Block]:
        """Of a pipeline rank's stages."""
        return [block for stage in self.order.stages_of_rank[rank] for block in self.stages[stage].blocks]

    def _stalls(self) -> HostStalls:
        """Of the plan's framework, on a device that its host launches kernels on."""
        return stalls_of(self.plan.runtime.framework, self.device.architecture) if self.device.kind == "cuda" else NO_STALLS

    def _attention_runs(self, stage: Stage, again: Sequence[int]) -> tuple[int, int]:
        """Runs of fused attention in a forward pass, and again in a backward pass."""
        if not self.plan.runtime.flash_attention:
            return 0, 0
        attends = [block.name == "attention" for block in stage.blocks]
        return sum(attends), sum(attends[index] for index in again)

    def _variant_of(self) -> NDArray[np.int64]:
        """[stages, micro-batches of the order]: which of a stage's variants it is."""
        count = self.order.num_microbatches
        places = np.arange(count) * self.plan.num_microbatches // count
        if not self.variants:
            return np.zeros((len(self.stages), count), dtype=np.int64)
        return np.stack([own.variant_of[places] for own in self.variants])

    def _offload(self) -> Offload | None:
        elements = [self._stage_elements(stage) for stage in self.stages]
        return offload_of(self.plan, self.cluster, self.order, self.chunks, elements, width=DTYPE_BYTES[self.dtype])

    def simulate(self, engine: str, *, reserved: bool) -> ParallelSimulation:
        """The step."""
        parts = self.parts()
        program = lower_step(parts, self.resident_bytes(), slowdown_of(overlap_of(self.device, self.cluster)))
        host_bytes = parts.offload.resident_bytes if parts.offload else ()
        result = self._result(program, ENGINES[engine](program), self._recomputed_flops(parts), host_bytes)
        if not reserved or self.device.kind == "cpu":
            return result
        peaks = self._allocators(result)
        return replace(result, allocators=tuple(with_pool(own, self._pool_bytes(rank)) for rank, own in enumerate(peaks)))

    def _allocators(self, result: ParallelSimulation) -> tuple[AllocatorPeaks, ...]:
        """Replays of the allocator: tensor by tensor, or rise by rise where chunks of tensors travel to the host."""
        stages = [[self.stages[stage] for stage in own] for own in self.order.stages_of_rank]
        resident = [
            rank_resident(own, sizes, self.plan, dtype=self.dtype)
            for own, sizes in zip(stages, result.program.resident_bytes, strict=True)
        ]
        if any(self.chunks):
            end_s = result.step_time_s
            return tuple(
                reserved_peaks(*own, update_s=end_s, settings=allocator_of(self.plan))
                for own in zip(result.profiles, resident, strict=True)
            )
        every = [own.operations for own in self.variants] or [(own,) for own in self.operations]
        tensors = [
            [stage_tensors(stage, own, self.prices) for own in each] for stage, each in zip(self.stages, every, strict=True)
        ]
        variant_of = self._variant_of()
        return rank_peaks(
            self.order, lambda action: tensors[action.stage][variant_of[action.stage, action.micro_batch]], resident, weight_share=WEIGHT_SHARE,
            settings=allocator_of(self.plan), known=self._replays,
        )  # fmt: skip

    def _pool_bytes(self, rank: int) -> int:
        """Of streams of FSDP's."""
        own = [self.stages[stage] for stage in self.order.stages_of_rank[rank]]
        units = [unit for stage in own for unit in units_of(stage, self.plan.runtime.framework)]
        return stream_pool_bytes(units, self.plan, dtype=self.dtype)

    def _recomputed_flops(self, parts: StepParts) -> float:
        """Of a micro-batch on all stages, the mean."""
        shares = [np.bincount(own) / len(own) for own in self._variant_of()]
        others = parts.exceptions.variants if parts.exceptions else [()] * len(shares)
        return sum(
            float(share @ [cost.recomputed_flops, *(one.cost.recomputed_flops for one in more)][: len(share)])
            for share, cost, more in zip(shares, parts.costs, others, strict=True)
        )

    def _result(self, program: Program, record: RunRecord, again: float, host_bytes: Sequence[float]) -> ParallelSimulation:
        plan, whole = self.plan, self._whole_workload()
        check_complete(program, record)
        steps = plan.num_microbatches * plan.parallel.dp
        split = plan.parallel.tp * plan.parallel.cp
        options = [block.options[0] for stage in self.stages for block in stage.blocks]
        kernels = tuple(chain.from_iterable((*option.forward.kernels, *option.backward.kernels) for option in options))
        return ParallelSimulation(
            plan=plan, cluster=self.cluster, device=self.device, order=self.order, program=program, record=record, profiles=profiles_of(program, record),
            kernels=kernels, tokens=whole.tokens * steps, model_flops=whole.model_flops * steps,
            peak_host_bytes=node_peak(host_peaks(program, record, host_bytes), self.mesh),
            hardware_flops=whole.model_flops * steps + round(again * split * steps), peak_flops_per_s=self.device.peak(PRODUCTS_IN.get(plan.precision.compute, self.dtype)),
        )  # fmt: skip

    def _sync(self, stage: Stage) -> GradientSync:
        plan, holders, units = self.plan, self.order.ranks_of_stage[stage.index], self._units(stage)
        forward_s, backward_s = unit_seconds(stage, self.operations[stage.index], self.prices, units)
        load = StageLoad(
            elements=self._stage_elements(stage), expert_elements=expert_elements(stage, self.config, plan.parallel), units=units,
            forward_s=forward_s, backward_s=backward_s, lists=list_seconds(plan.runtime.framework, self.device),
        )  # fmt: skip
        distance = holders[-1] - holders[0]
        if (load, distance) not in self._syncs:  # of like stages
            wire = WireFormat(comm=plan.precision.comm, price=self.price)
            self._syncs[load, distance] = gradient_sync(
                plan, self.communication, load, wire, distance=distance, dtype=self.dtype
            )
        return self._syncs[load, distance]

    def _units(self, stage: Stage) -> tuple[Unit, ...]:
        """What ZeRO 3 gathers at once."""
        return units_of(stage, self.plan.runtime.framework) if self.plan.memory.zero_stage >= PARAMETERS_SHARDED else ()

    def _gathered_elements(self, stage: Stage) -> int:
        """Most parameters of a stage that ZeRO 3 has gathered at once."""
        units = self._units(stage)
        return gathered_elements(units, prefetched_units(units, self.plan.runtime))

    def _elements(self, rank: int) -> float:
        return float(sum(self._stage_elements(self.stages[stage]) for stage in self.order.stages_of_rank[rank]))

    @property
    def _ends_together(self) -> bool:
        """First and last stage on the same ranks: they use one tied table."""
        holders = self.order.ranks_of_stage
        return holders[0] == holders[-1]

    def _stage_elements(self, stage: Stage) -> int:
        """Parameters of a stage; a tied table counts with the first stage only where the last one is on the same rank."""
        again = self._ends_together and stage.index == len(self.stages) - 1 > 0
        return stage.parameter_elements - (stage.shared_elements if again else 0)

    def resident_bytes(self) -> list[tuple[int, ...]]:
        """Per rank and `MemoryClass`: alive through the step."""
        plan, resident = self.plan, []
        copies = float(self.order.weight_versions)
        for rank in range(self.order.num_ranks):
            stages = [self.stages[stage] for stage in self.order.stages_of_rank[rank]]
            expert = float(sum(expert_elements(stage, self.config, plan.parallel) for stage in stages))
            working = float(max(self._gathered_elements(stage) for stage in stages))
            memory = static_memory(
                self._elements(rank) - expert, expert, plan, dtype=self.dtype, copies=copies, working=working
            )
            ends = {0, self.order.num_stages - 1} & set(self.order.stages_of_rank[rank])
            batch = plan.num_microbatches * self.workload.batch_bytes if ends else 0  # tokens at the front, labels at the back
            memory = replace(
                memory,
                parameters=memory.parameters
                - copies * weights_away(plan, self.order, self.chunks, rank, width=DTYPE_BYTES[self.dtype]),
            )
            kept = kept_bytes(self._blocks(rank), plan, self.device, dtype=self.dtype)
            kept += kept_weight_bytes(plan, self.device, weight_elements(self._blocks(rank), self.config))
            kept += pipeline_bytes(self.order, rank, stages, plan, dtype=self.dtype)
            resident.append(memory.by_class(batch + (self.workload.buffer_bytes if 0 in ends else 0), kept))
        return resident
