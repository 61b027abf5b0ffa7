"""Simulate a named model under a plan on a cluster: checks what the plan asks for, then `simulate_parallel`."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from simulator.model_source import DEFAULT_SEQ_LEN, ModelSource
from simulator.parallel.orders import order_of
from simulator.parallel.rank_times import TIMED_SCHEDULES, rank_times, relative_times
from simulator.parallel.simulate_parallel import simulate_parallel, step_parts
from simulator.parallel.simulation import ParallelSimulation
from simulator.pipeline.action import Order
from simulator.plan import FILE_PREFIX, Plan, check_gpus, check_model, resolve_batch
from simulator.plan_parallel import check_parallel
from simulator.plan_sections import BLOCK_RECOMPUTES
from simulator.precision import STORED_AS
from simulator.presets import TransformerConfig
from simulator.recompute import read_sequence
from simulator.sequence import Operation


def simulate_source(
    source: ModelSource, plan: Plan, cluster: Cluster, *, gpus: int | None = None, folder: Path | None = None, engine: str = "compiled", reserved: bool = True,
    device: DeviceProfile | None = None, sequence: Sequence[Operation] | None = None,
) -> ParallelSimulation:  # fmt: skip
    """A plan's prediction on a cluster.

    Args:
        source: a model that is generated from a configuration.
        plan: its degrees say how many GPUs of the cluster it uses.
        cluster: with any number of GPUs.
        gpus: what the plan's degrees must give; None: whatever they give.
        folder: where relative files of the plan begin.
        engine: one of `simulate.ENGINES`.
        reserved: whether to replay the caching allocator of each rank; else reserved bytes are the live ones.
        device: in place of the catalogue's profile of the cluster's devices.
        sequence: what ``recompute = "optimal"`` stands for, blocks counted over the whole model; a ``file:SEQ`` is read here.

    Raises:
        InputError: names the rule that the plan breaks.
    """
    case = parallel_case(source, plan, cluster, gpus=gpus, folder=folder, device=device)
    if plan.memory.recompute.startswith(FILE_PREFIX):
        sequence = read_sequence(plan.memory.recompute, folder or Path())
    return simulate_parallel(
        case.config, case.plan, case.cluster, case.device, case.order, seq_len=case.seq_len, engine=engine, reserved=reserved, sequence=sequence
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class ParallelCase:
    """What `simulate_parallel` takes, checked and resolved."""

    config: TransformerConfig
    plan: Plan
    cluster: Cluster
    device: DeviceProfile
    order: Order
    seq_len: int


def parallel_case(
    source: ModelSource, plan: Plan, cluster: Cluster, *, gpus: int | None = None, folder: Path | None = None, device: DeviceProfile | None = None
) -> ParallelCase:  # fmt: skip
    """The case of a model, a plan and a cluster; arguments and errors as in `simulate_source`."""
    config = source.config
    if config is None:
        raise InputError(
            source="--model", key="name", value=source.name, rule="on several devices a model is generated from its configuration, not traced",
            remedy="name a preset ('schedlab models') or a Hugging Face config.json",
        )  # fmt: skip
    check_gpus(plan, gpus or plan.num_gpus)
    check_parallel(plan, compute=tuple(STORED_AS))
    seq_len = plan.batch.seq_len or source.seq_len or min(config.max_positions, DEFAULT_SEQ_LEN)
    check_model(
        plan, heads=config.heads, kv_heads=config.num_kv_heads, layers=config.layers, experts=config.experts.num_experts if config.experts else None,
        seq_len=seq_len,
    )  # fmt: skip
    whole = source.global_batch if source.batch or plan.parallel.dp == 1 else max(source.global_batch, plan.parallel.dp)
    resolved = resolve_batch(plan, batch=whole, seq_len=seq_len)
    if plan.batch.micro_batch is None and plan.parallel.pp > 1:
        resolved = replace(resolved, batch=replace(resolved.batch, micro_batch=1))
    sized = cluster.with_gpus(plan.num_gpus)
    profile = device or load_hardware(sized.device)
    return ParallelCase(
        config=config, plan=resolved, cluster=sized, device=profile, order=_order(config, resolved, sized, profile, seq_len, folder), seq_len=seq_len
    )  # fmt: skip


def _order(
    config: TransformerConfig, plan: Plan, cluster: Cluster, device: DeviceProfile, seq_len: int, folder: Path | None
) -> Order:
    """The plan's order; one that is made for the times of passes gets those of its stages, without recompute where that is solved for or read later."""
    if plan.pipeline.schedule not in TIMED_SCHEDULES:
        return order_of(plan, folder=folder)
    known = plan if plan.memory.recompute in BLOCK_RECOMPUTES else replace(plan, memory=replace(plan.memory, recompute="none"))
    first = order_of(replace(plan, pipeline=replace(plan.pipeline, schedule="1f1b", memory_limit=None)))
    times = rank_times(step_parts(config, known, cluster, device, first, seq_len=seq_len))
    return order_of(plan, relative_times(times), folder=folder)
