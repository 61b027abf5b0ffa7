"""Plans that experts would set by hand: the baselines of a search, and its first incumbents."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

from hardware_models.errors import InputError
from search.joint.space import JointRequest, splits_sequences
from search.trainers import violations
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime, check_model


@dataclass(frozen=True, slots=True, kw_only=True)
class Expert:
    """A named rule and the plans that it allows; the fastest that fits is the rule's answer."""

    name: str
    source: str
    plans: tuple[Plan, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Degrees that a paper used for a model."""

    tp: int
    pp: int
    virtual_stages: int
    micro_batch: int
    recompute: str
    zero_stage: int
    source: str


PUBLISHED = MappingProxyType(
    {
        "gpt3-175b": Published(
            tp=8, pp=8, virtual_stages=3, micro_batch=1, recompute="selective", zero_stage=0, source="Korthikanti et al. 2022 (arXiv 2205.05198), table 3"
        ),
        "megatron-530b": Published(
            tp=8, pp=35, virtual_stages=1, micro_batch=1, recompute="full", zero_stage=0, source="Smith et al. 2022 (arXiv 2201.11990), section 4.3"
        ),
        "llama3-405b": Published(
            tp=8, pp=16, virtual_stages=1, micro_batch=1, recompute="none", zero_stage=1, source="Dubey et al. 2024 (arXiv 2407.21783), table 4"
        ),
    }
)  # fmt: skip
"""By the preset's name."""


def experts(request: JointRequest) -> tuple[Expert, ...]:
    """The rules that hold for a request and its trainer, without those that no plan satisfies.

    **Source**: Narayanan et al. 2021 (arXiv 2104.04473), section 5.4 (tensor parallelism inside a node, then as few pipeline stages as fit, data parallelism
    for the rest); Zhao et al. 2023 (arXiv 2304.11277; full sharding, each block checkpointed); Rajbhandari et al. 2020 (ZeRO 3); papers in `PUBLISHED`.
    """
    found = [
        Expert(
            name=f"Megatron's rule, {recompute} recompute",
            source="arXiv 2104.04473, section 5.4",
            plans=tuple(_megatron(request, recompute)),
        )
        for recompute in ("no", "selective", "full")
    ]
    sharded = _sharded(request)
    found += [
        Expert(
            name="full sharding, each block recomputed",
            source="arXiv 2304.11277",
            plans=tuple(_with_recompute(sharded, "full")),
        ),
        Expert(
            name="full sharding, nothing recomputed",
            source="arXiv 1910.02054 (ZeRO 3)",
            plans=tuple(_with_recompute(sharded, "none")),
        ),
    ]
    paper = PUBLISHED.get(request.config.name)
    if paper is not None:
        found.append(Expert(name="published plan", source=paper.source, plans=tuple(_published(request, paper))))
    legal = [replace(expert, plans=tuple(plan for plan in expert.plans if _legal(plan, request))) for expert in found]
    return tuple(expert for expert in legal if expert.plans)


def _legal(plan: Plan, request: JointRequest) -> bool:
    config = request.config
    try:
        check_model(plan, heads=config.heads, kv_heads=config.num_kv_heads, layers=config.layers, seq_len=request.seq_len)
    except InputError:
        return False
    return not violations(plan, request.trainer, layers=config.layers)


def _megatron(request: JointRequest, recompute: str) -> Iterator[Plan]:
    gpus, config = request.cluster.num_gpus, request.config
    tp = max(
        degree for degree in range(1, request.cluster.devices_per_node + 1) if config.heads % degree == 0 and gpus % degree == 0
    )
    memory = Memory(
        zero_stage=1 if 1 in request.trainer.zero_stages_pipelined else 0, recompute="none" if recompute == "no" else recompute
    )
    for pp in range(1, config.layers + 1):
        if (gpus // tp) % pp or config.layers % pp:
            continue
        dp = gpus // tp // pp
        for micro_batch in (1, 2, 4, 8):
            if request.global_batch % (dp * micro_batch):
                continue
            for chunks in {1, config.layers // pp} if pp > 1 else {1}:
                yield from _plan(request, tp=tp, pp=pp, dp=dp, chunks=chunks, micro_batch=micro_batch, memory=memory)


def _sharded(request: JointRequest) -> tuple[Plan, ...]:
    dp = request.cluster.num_gpus
    share = request.global_batch // dp if request.global_batch % dp == 0 else 0
    sizes = [size for size in (1, 2, 4, 8, 16) if share and share % size == 0]
    return tuple(
        plan
        for size in sizes
        for plan in _plan(request, tp=1, pp=1, dp=dp, chunks=1, micro_batch=size, memory=Memory(zero_stage=3 if dp > 1 else 0))
    )


def _with_recompute(plans: tuple[Plan, ...], recompute: str) -> Iterator[Plan]:
    for plan in plans:
        yield replace(plan, memory=replace(plan.memory, recompute=recompute))


def _published(request: JointRequest, paper: Published) -> Iterator[Plan]:
    dp, rest = divmod(request.cluster.num_gpus, paper.tp * paper.pp)
    if rest or not dp or request.global_batch % (dp * paper.micro_batch):
        return
    memory = Memory(zero_stage=paper.zero_stage if dp > 1 else 0, recompute=paper.recompute)  # type: ignore[arg-type]
    yield from _plan(
        request, tp=paper.tp, pp=paper.pp, dp=dp, chunks=paper.virtual_stages, micro_batch=paper.micro_batch, memory=memory
    )


def _plan(request: JointRequest, *, tp: int, pp: int, dp: int, chunks: int, micro_batch: int, memory: Memory) -> Iterator[Plan]:
    """The plan of these degrees, or nothing where the schedule does not exist at them."""
    try:
        yield Plan(
            parallel=Parallel(tp=tp, pp=pp, dp=dp, virtual_stages=chunks, sequence_parallel=splits_sequences(request, tp, 1)),
            batch=Batch(global_batch=request.global_batch, micro_batch=micro_batch, seq_len=request.seq_len),
            pipeline=Pipeline(schedule="interleaved" if chunks > 1 else "1f1b"),
            memory=replace(memory, budget_bytes=request.budget_bytes, zero_stage=memory.zero_stage if dp > 1 else 0),
            precision=Precision(compute=request.computes[0]),  # type: ignore[arg-type]
            runtime=Runtime(framework=request.trainer.framework),
        )  # fmt: skip
    except InputError:
        return
