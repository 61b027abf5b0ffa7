"""Plans that experts would set by hand: the baselines of a search, and its first incumbents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace

from hardware_models.errors import InputError
from search.joint.published_plans import PUBLISHED, PublishedPlan
from search.joint.space import JointRequest, splits_sequences
from search.trainers import violations
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime, check_model

PIPELINED_MICRO_BATCHES = (1, 2, 4, 8)
"""Samples of a micro-batch that rules with pipelines try."""
SHARDED_MICRO_BATCHES = (1, 2, 4, 8, 16)
"""The same without."""
_RULE = "Narayanan et al. 2021 (arXiv 2104.04473), section 5.4"
_MIXTURES = "megatron-core 0.16, transformer/moe/README.md: experts over the ranks of a node before tensor parallelism, pipeline stages across nodes"


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """A named rule and the plans that it allows; the fastest that fits is the rule's answer."""

    name: str
    source: str
    plans: tuple[Plan, ...]


def experts(request: JointRequest) -> tuple[Expert, ...]:
    """The rules that hold for a request and its trainer, without those that no plan satisfies.

    Megatron's rule: tensor parallelism inside a node, then as few pipeline stages as fit, data parallelism for the rest, its optimizer sharded where the trainer can; mixtures spread
    their experts over the replicas, which take the place of tensor ranks. Full sharding: one replica a device, blocks checkpointed or not, model states on the device or the host.
    Papers' own plans: `search.joint.published_plans`. All of them run with the trainer's framework, as every other plan of the request does.

    **Source**: Narayanan et al. 2021 (arXiv 2104.04473), section 5.4; Zhao et al. 2023 (arXiv 2304.11277; FSDP, each block checkpointed); Rajbhandari et al. 2020 (arXiv 1910.02054;
    ZeRO 3, as DeepSpeed runs it); Ren et al. 2021 (arXiv 2101.06840; ZeRO-Offload: optimizer states and gradients on the host) and Rajbhandari et al. 2021 (arXiv 2104.07857; parameters too).
    """
    found = [
        *(_expert(f"Megatron's rule, {name} recompute", _RULE, _megatron(request, name)) for name in ("no", "selective", "full")),
        *(_expert(f"Megatron's rule for mixtures, {name} recompute", _MIXTURES, _mixtures(request, name)) for name in ("no", "full")),
        _expert("full sharding, each block recomputed (FSDP)", "arXiv 2304.11277", _sharded(request, Memory(recompute="full"))),
        _expert("full sharding, nothing recomputed (ZeRO 3)", "arXiv 1910.02054", _sharded(request, Memory())),
        _expert("full sharding, optimizer on the host (ZeRO-Offload)", "arXiv 2101.06840", _offloaded(request, 0.0)),
        _expert("full sharding, model states on the host (ZeRO-Infinity)", "arXiv 2104.07857", _offloaded(request, 1.0)),
        *(_expert(paper.name, paper.source, _published(request, paper)) for paper in PUBLISHED.get(request.config.name, ())),
    ]  # fmt: skip
    legal = (replace(one, plans=tuple(plan for plan in one.plans if _legal(plan, request))) for one in found)
    return tuple(one for one in legal if one.plans)


def _expert(name: str, source: str, plans: Iterator[Plan]) -> Expert:
    return Expert(name=name, source=source, plans=tuple(plans))


def _legal(plan: Plan, request: JointRequest) -> bool:
    config = request.config
    experts = config.experts.num_experts if config.experts else None
    try:
        check_model(
            plan,
            heads=config.heads,
            kv_heads=config.num_kv_heads,
            layers=config.layers,
            experts=experts,
            seq_len=request.seq_len,
        )
    except InputError:
        return False
    return not violations(plan, request.trainer, layers=config.layers)


def _megatron(request: JointRequest, recompute: str) -> Iterator[Plan]:
    """Tensor ranks fill a node; experts, if there are any, stay whole."""
    gpus, config = request.cluster.num_gpus, request.config
    tp = max(tp for tp in range(1, request.cluster.devices_per_node + 1) if config.heads % tp == 0 and gpus % tp == 0)
    yield from _pipelined(request, recompute, tp=tp, ep=1)


def _mixtures(request: JointRequest, recompute: str) -> Iterator[Plan]:
    """Experts fill a node, or as many devices as there are experts; no tensor parallelism."""
    experts, gpus = request.config.experts, request.cluster.num_gpus
    if experts is None or not request.trainer.expert_parallel:
        return
    node = min(request.cluster.devices_per_node, gpus)
    for ep in range(node, experts.num_experts + 1, node):
        if experts.num_experts % ep == 0 and gpus % ep == 0:
            yield from _pipelined(request, recompute, tp=1, ep=ep)


def _pipelined(request: JointRequest, recompute: str, *, tp: int, ep: int) -> Iterator[Plan]:
    """Every number of equal stages, without interleaving and with one layer a chunk; stages of mixtures may differ by a layer, as their odd numbers of layers ask for."""
    gpus, layers = request.cluster.num_gpus, request.config.layers
    sharded = 1 if 1 in request.trainer.zero_stages_pipelined else 0
    memory = Memory(zero_stage=sharded, recompute="none" if recompute == "no" else recompute)  # type: ignore[arg-type]
    uneven = ep > 1 and not request.trainer.even_stages
    for pp in range(1, layers + 1):
        dp, rest = divmod(gpus, tp * pp)
        if rest or dp % ep or (layers % pp and not uneven):
            continue
        parallel = Parallel(tp=tp, pp=pp, dp=dp, ep=ep, sequence_parallel=splits_sequences(request, tp, 1))
        for chunks in sorted({1, layers // pp}) if pp > 1 and layers % pp == 0 else [1]:
            pipeline = Pipeline(schedule="interleaved" if chunks > 1 else "1f1b")
            for micro_batch in PIPELINED_MICRO_BATCHES:
                yield from _plan(request, replace(parallel, virtual_stages=chunks), pipeline, memory, micro_batch)


def _sharded(request: JointRequest, memory: Memory) -> Iterator[Plan]:
    """One replica a device, parameters shared by all of them."""
    dp = request.cluster.num_gpus
    for micro_batch in SHARDED_MICRO_BATCHES:
        yield from _plan(request, Parallel(dp=dp), Pipeline(), replace(memory, zero_stage=3), micro_batch)


def _offloaded(request: JointRequest, weights: float) -> Iterator[Plan]:
    """Full sharding with blocks checkpointed, optimizer states and gradients on the host, parameters too or not."""
    memory = Memory(recompute="full", optimizer_offload=1.0, grad_offload=1.0, weight_offload=weights)
    yield from _sharded(request, memory)


def _published(request: JointRequest, paper: PublishedPlan) -> Iterator[Plan]:
    """A paper's plan on the devices of the request."""
    dp, rest = divmod(request.cluster.num_gpus, paper.tp * paper.cp * paper.pp)
    if rest or not dp or (dp * paper.cp) % paper.ep or paper.seq_len not in {None, request.seq_len}:
        return
    memory = Memory(zero_stage=paper.zero_stage, recompute=paper.recompute)  # type: ignore[arg-type]
    for chunks in paper.chunks:
        partition = paper.partition(request.config.layers, chunks)
        if paper.spared_ends and partition is None:
            continue
        parallel = Parallel(
            tp=paper.tp, pp=paper.pp, dp=dp, cp=paper.cp, ep=paper.ep, virtual_stages=chunks, sequence_parallel=paper.sequence_parallel
        )  # fmt: skip
        yield from _plan(request, parallel, Pipeline(schedule=paper.schedule_of(chunks), partition=partition), memory, 1)


def _plan(request: JointRequest, parallel: Parallel, pipeline: Pipeline, memory: Memory, micro_batch: int) -> Iterator[Plan]:
    """The plan of these decisions, or nothing where it breaks a rule of plans: the batch does not divide, the schedule does not run at the sizes."""
    sharded = memory.zero_stage if parallel.dp * parallel.cp > 1 else 0
    orders = request.trainer.orders
    order = parallel.order if not orders or parallel.order in orders else orders[0]
    try:
        yield Plan(
            parallel=replace(parallel, order=order),
            batch=Batch(global_batch=request.global_batch, micro_batch=micro_batch, seq_len=request.seq_len), pipeline=pipeline,
            memory=replace(memory, budget_bytes=request.budget_bytes, zero_stage=sharded),
            precision=Precision(compute=request.computes[0]),  # type: ignore[arg-type]
            runtime=Runtime(framework=request.trainer.framework),
        )  # fmt: skip
    except InputError:
        return
