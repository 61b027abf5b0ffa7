"""Steps of equal stages without kernels, and small models on a cluster of A100s, for the tests beside."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster import Cluster
from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.overlap import OverlapFactors
from simulator import engine_compiled
from simulator.parallel.communication import Exposed, StageCommunication
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.lower_step import StepParts, lower_step
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_parallel import simulate_parallel
from simulator.parallel.simulation import ParallelSimulation
from simulator.parallel.stages import PassCost, StageCost
from simulator.pipeline.action import Order
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.presets import TransformerConfig, preset
from simulator.program import Kind, MemoryClass, Program, no_slowdown
from simulator.timeline import MemoryProfile, Timeline

FORWARD_S, BACKWARD_S, WEIGHT_S = 3.0, 7.0, 2.0
"""Of a stage; the backward pass in full."""
FORWARD_RISE, BACKWARD_RISE, NET = 1400, 300, 1000
"""Bytes of a micro-batch on a stage."""
FAST_BYTES_PER_S = 1e30
NO_SYNC = GradientSync(chunks=1, reduce_s=0.0, gather_s=0.0)
NOTHING = StageCommunication(forward=Exposed(), backward=Exposed(), message_bytes=1.0)
SEQ_LEN = 512
NO_SLOWDOWN = OverlapFactors(
    compute_under_collectives=1.0, compute_under_copies=1.0, collectives_under_compute=1.0, evidence="measured", source="a test"
)


def equal_cost() -> StageCost:
    """A stage of round numbers."""
    return StageCost(
        forward=PassCost(seconds=((Kind.FORWARD, FORWARD_S),), rise_bytes=FORWARD_RISE, net_bytes=NET),
        backward=PassCost(seconds=((Kind.BACKWARD, BACKWARD_S),), rise_bytes=BACKWARD_RISE, net_bytes=-NET),
        weight_s=WEIGHT_S, recomputed=(), recomputed_flops=0,
    )  # fmt: skip


def parts_of(
    order: Order, *, communication: Sequence[StageCommunication] | None = None, sync: Sequence[GradientSync] | None = None, optimizer_s: float = 0.0,
    tied_s: float = 0.0, rate: float = FAST_BYTES_PER_S, latency_s: float = 0.0, waits: bool = False, weight_share: float = 0.5,
) -> StepParts:  # fmt: skip
    """A step of equal stages; without arguments nothing but computing takes time."""
    stages = order.num_stages
    return StepParts(
        order=order, costs=[equal_cost()] * stages, communication=communication or [NOTHING] * stages, sync=sync or [NO_SYNC] * stages,
        optimizer_s=[optimizer_s] * order.num_ranks, tied_s=tied_s, message_limit_bytes_per_s=rate, message_latency_s=latency_s,
        link_bytes_per_s=[rate] * (2 * order.num_ranks), waits_for_messages=waits, weight_share=weight_share,
    )  # fmt: skip


def lowered(parts: StepParts) -> Program:
    """The step's program on ranks that hold nothing at its start."""
    return lower_step(parts, [(0,) * len(MemoryClass)] * parts.order.num_ranks, no_slowdown())


def ran(parts: StepParts) -> tuple[Timeline, tuple[MemoryProfile, ...]]:
    """What happens in the step."""
    return engine_compiled.run(lowered(parts))


def small_config(**changes: object) -> TransformerConfig:
    """A GPT of eight layers."""
    base = replace(
        preset("megatron-22b"), name="small", layers=8, hidden=1024, heads=16, ffn=4096, vocab=4096, max_positions=SEQ_LEN
    )
    return replace(base, **changes)  # type: ignore[arg-type]


def plan_of(
    *, tp: int = 1, pp: int = 1, dp: int = 1, cp: int = 1, ep: int = 1, num_microbatches: int = 8, micro_batch: int = 1, schedule: str = "1f1b",
    virtual_stages: int = 1, partition: tuple[int, ...] | None = None, zero_stage: int = 0, recompute: str = "none", framework: str = "megatron-core",
    flash: bool = True, sequence_parallel: bool = False, overlap: bool = True, cp_method: str = "ring", grads: str = "fp32", optimizer: str = "adamw",
) -> Plan:  # fmt: skip
    """A plan in bfloat16."""
    return Plan(
        parallel=Parallel(tp=tp, pp=pp, dp=dp, cp=cp, ep=ep, virtual_stages=virtual_stages, sequence_parallel=sequence_parallel, cp_method=cp_method),  # type: ignore[arg-type]
        batch=Batch(global_batch=num_microbatches * micro_batch * dp, micro_batch=micro_batch, seq_len=SEQ_LEN),
        pipeline=Pipeline(schedule=schedule, partition=partition), memory=Memory(zero_stage=zero_stage, recompute=recompute),
        precision=Precision(compute="bf16", grads=grads, optimizer=optimizer),  # type: ignore[arg-type]
        runtime=Runtime(framework=framework, flash_attention=flash, overlap_grad_reduce=overlap),
    )  # fmt: skip


def cluster_of(plan: Plan, name: str = "selene") -> Cluster:
    """As many A100s as the plan uses."""
    return load_cluster(name).with_gpus(plan.num_gpus)


def simulated(plan: Plan, config: TransformerConfig | None = None, engine: str = "compiled") -> ParallelSimulation:
    """A plan of a small model."""
    cluster = cluster_of(plan)
    return simulate_parallel(
        config or small_config(), plan, cluster, load_hardware(cluster.device), order_of(plan), seq_len=SEQ_LEN, engine=engine
    )
