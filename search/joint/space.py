"""The outer space: every legal combination of degrees, order, micro-batch, ZeRO stage, placement and precision for the devices asked for."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, fields, replace
from functools import cache
from itertools import permutations, product

import numpy as np
from numpy.typing import NDArray

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.network.cluster import Cluster
from search.joint.points import Points, crossed, points_of
from search.trainer_rules import SPECIAL_RULES
from search.trainers import TRAINERS, Trainer, broken_rules, violations
from simulator.pipeline.sizes import check_sizes
from simulator.plan import FILE_PREFIX, Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.plan_sections import SCHEDULES_TWO_CHUNKS
from simulator.presets import TransformerConfig

ALONE = "1f1b"
"""The schedule's name where there is one stage: it has no effect."""
MOST_UNEVEN_CHUNKS = 2
"""Chunks of a rank up to which its stages may hold unequal numbers of layers."""
_PLACED_AXES = ("tp", "cp", "dp", "pp")


@dataclass(frozen=True, slots=True, kw_only=True)
class JointRequest:
    """What is asked for; everything else is found."""

    config: TransformerConfig
    seq_len: int
    global_batch: int
    cluster: Cluster
    """With exactly the devices to use."""
    trainer: Trainer
    computes: tuple[str, ...] = ("bf16",)
    """Number formats that the user allows for products."""
    budget_bytes: int | None = None
    """Most bytes allocated on a device; None: what it has."""
    extra_schedules: tuple[str, ...] = ()
    """Allowed by name: orders that change what is computed."""


@dataclass(frozen=True, slots=True, kw_only=True)
class JointSpace:
    """Points and what their indices mean."""

    request: JointRequest
    points: Points
    schedules: tuple[str, ...]
    placements: tuple[str, ...]
    cp_methods: tuple[str, ...]

    @property
    def computes(self) -> tuple[str, ...]:
        """Number formats by index."""
        return self.request.computes

    def __len__(self) -> int:
        return len(self.points)

    def plan(self, index: int, *, memory: Memory | None = None) -> Plan:
        """The plan of a point; ``memory`` holds its inner decisions, whose ZeRO stage and budget are the point's."""
        row, request = self.points.row(index), self.request
        parallel = Parallel(
            tp=row["tp"], pp=row["pp"], dp=row["dp"], cp=row["cp"], ep=row["ep"], virtual_stages=row["virtual_stages"],
            sequence_parallel=splits_sequences(request, row["tp"], row["cp"]), order=self.placements[row["placement"]],
            cp_method=self.cp_methods[row["cp_method"]],  # type: ignore[arg-type]
        )  # fmt: skip
        own = memory or Memory()
        return Plan(
            parallel=parallel, batch=Batch(global_batch=request.global_batch, micro_batch=row["micro_batch"], seq_len=request.seq_len),
            pipeline=Pipeline(schedule=self.schedules[row["schedule"]]),
            memory=_with_stage(own, row["zero_stage"], request.budget_bytes),
            precision=Precision(compute=self.computes[row["compute"]]),  # type: ignore[arg-type]
            runtime=Runtime(framework=request.trainer.framework),
        )  # fmt: skip


def splits_sequences(request: JointRequest, tp: int, cp: int) -> bool:
    """Whether plans of these degrees split norms and dropout over tp: wherever trainer and length allow."""
    return tp > 1 and request.seq_len % (tp * cp) == 0 and _sequences_allowed(request.trainer.name)


@cache
def _sequences_allowed(trainer: str) -> bool:
    probe = Plan(parallel=Parallel(tp=2, sequence_parallel=True))
    return all(found.key != "parallel.sequence_parallel" for found in broken_rules(probe, TRAINERS[trainer]))


def _with_stage(memory: Memory, zero_stage: int, budget_bytes: int | None) -> Memory:
    return replace(memory, zero_stage=zero_stage, budget_bytes=budget_bytes)  # type: ignore[arg-type]


def joint_space(request: JointRequest) -> JointSpace:
    """All points that pass divisibility and the trainer's rules; memory is not looked at.

    **Left out** as never better or as another computation: sequence parallelism off where tp > 1 (more memory, the same traffic); pipeline orders that
    compute with older weights, unless allowed; tensor-parallel ranks that are not neighbours (their collectives are the ones that wait); ranks of two axes that could be exchanged without any group lying differently.

    Raises:
        InfeasibleError: no combination divides model, batch and devices.
    """
    named = (name for name in request.trainer.schedules if not name.startswith(FILE_PREFIX))
    schedules = tuple(dict.fromkeys((ALONE, *named, *request.extra_schedules)))
    placements = request.trainer.orders or tuple("-".join(order) for order in _placements())
    cp_methods = request.trainer.cp_methods or ("ring",)
    rows = list(_rows(request, schedules, placements, cp_methods))
    points = crossed(points_of(rows), "compute", range(len(request.computes)))
    space = JointSpace(request=request, points=points, schedules=schedules, placements=placements, cp_methods=cp_methods)
    legal = replace(space, points=points.take(_legal(space))) if rows else space
    if not len(legal):
        gpus, batch = request.cluster.num_gpus, request.global_batch
        text = f"no tp * cp * pp * dp == {gpus} divides {request.config.name} (heads {request.config.heads}, layers {request.config.layers}), batch {batch}"
        raise InfeasibleError(limit=text, smallest_change=f"a global batch that {gpus} divides always has dp = {gpus}")
    return legal


def _legal(space: JointSpace) -> NDArray[np.bool_]:
    """Which points the trainer's rules allow: asked once for all micro-batches that are on one side of the number of stages, which is all that a rule asks of them."""
    points = space.points
    if not SPECIAL_RULES[space.request.trainer.name]:
        return np.ones(len(points), dtype=np.bool_)  # the table's limits have made the points
    names = [field.name for field in fields(points) if field.name not in {"micro_batch", "num_microbatches"}]
    columns = np.stack([*(getattr(points, name) for name in names), points.num_microbatches >= points.pp], axis=1)
    _, first, inverse = np.unique(columns, axis=0, return_index=True, return_inverse=True)
    trainer, layers = space.request.trainer, space.request.config.layers
    allowed = np.array([not violations(space.plan(int(index)), trainer, layers=layers) for index in first])
    found: NDArray[np.bool_] = allowed[inverse.ravel()]
    return found


def _rows(
    request: JointRequest, schedules: Sequence[str], placements: Sequence[str], cp_methods: Sequence[str]
) -> Iterator[tuple[int, ...]]:
    """Rows in the order of the fields of `Points`, the number format aside."""
    for tp, cp, pp, dp, method in _degrees(request, cp_methods):
        pipelines = _pipelines(request, schedules, pp)
        ways = _distinct(request.cluster, tp, cp, pp, dp, placements)
        stages = _zero_stages(request.trainer, pp, dp * cp)
        share = request.global_batch // dp
        for ep in _expert_degrees(request, cp * dp):
            for (schedule, chunks), zero, way in product(pipelines, stages, ways):
                for micro_batch in divisors(share):
                    number = share // micro_batch
                    row = (tp, cp, pp, dp, ep, micro_batch, number, chunks, schedule, zero, way, method, 0)
                    if pp == 1 or order_exists(schedules[schedule], pp, number, chunks):
                        yield row


def _degrees(request: JointRequest, cp_methods: Sequence[str]) -> Iterator[tuple[int, int, int, int, int]]:
    """Degrees tp, cp, pp, dp whose product is the number of devices, and the method of context parallelism."""
    config, gpus = request.config, request.cluster.num_gpus
    for tp in divisors(gpus):
        if config.heads % tp or (config.num_kv_heads % tp and tp % config.num_kv_heads):
            continue
        for cp in divisors(gpus // tp):
            if request.seq_len % cp or (cp > 1 and not request.trainer.cp_methods):
                continue
            methods = (
                [0] if cp == 1 else [n for n, name in enumerate(cp_methods) if name == "ring" or _heads_divide(config, tp * cp)]
            )
            for pp in divisors(gpus // (tp * cp)):
                dp = gpus // (tp * cp * pp)
                if pp > config.layers or request.global_batch % dp:
                    continue
                for method in methods:
                    yield tp, cp, pp, dp, method


def _heads_divide(config: TransformerConfig, ways: int) -> bool:
    return config.heads % ways == 0 and (config.num_kv_heads % ways == 0 or ways % config.num_kv_heads == 0)


def _pipelines(request: JointRequest, schedules: Sequence[str], pp: int) -> list[tuple[int, int]]:
    """Schedules by index, each with the chunks of a rank that the model's layers allow."""
    layers = request.config.layers
    if pp == 1:
        return [(schedules.index(ALONE), 1)]
    found = []
    for index, name in enumerate(schedules):
        if name not in (*request.trainer.schedules, *request.extra_schedules):
            continue
        if name in {"interleaved", "looped-bfs"}:
            chunks: Sequence[int] = range(2, layers // pp + 1)
        else:
            chunks = (2,) if name in SCHEDULES_TWO_CHUNKS else (1,)
        for count in chunks:
            even = layers % (pp * count) == 0
            if pp * count <= layers and (even or (not request.trainer.even_stages and count <= MOST_UNEVEN_CHUNKS)):
                found.append((index, count))
    return found


def _zero_stages(trainer: Trainer, pp: int, replicas: int) -> tuple[int, ...]:
    if replicas == 1:
        return (0,)
    return trainer.zero_stages_pipelined if pp > 1 else trainer.zero_stages


def _expert_degrees(request: JointRequest, ranks: int) -> tuple[int, ...]:
    experts = request.config.experts
    if experts is None or not request.trainer.expert_parallel:
        return (1,)
    return tuple(degree for degree in divisors(ranks) if experts.num_experts % degree == 0)


@cache
def order_exists(schedule: str, num_ranks: int, num_microbatches: int, chunks: int) -> bool:
    """Whether a schedule runs at these sizes."""
    try:
        check_sizes(schedule, num_ranks=num_ranks, num_microbatches=num_microbatches, virtual_stages=chunks)
    except InputError:
        return False
    return True


@cache
def divisors(number: int) -> tuple[int, ...]:
    """Ascending."""
    return tuple(part for part in range(1, number + 1) if number % part == 0)


def _placements() -> list[tuple[str, ...]]:
    """Orders of the axes, innermost first; experts begin where the inner one of cp and dp does."""
    orders = (("tp", *order) for order in permutations(_PLACED_AXES[1:]))
    return [tuple(name for axis in order for name in ((axis, "ep") if axis == "cp" else (axis,))) for order in orders]


def _distinct(cluster: Cluster, tp: int, cp: int, pp: int, dp: int, placements: Sequence[str]) -> list[int]:
    """Placements that differ in the distance of some axis's ranks, or in how many of a group share a node."""
    degree = {"tp": tp, "cp": cp, "pp": pp, "dp": dp}
    seen: dict[tuple[tuple[str, int], ...], int] = {}
    for index, text in enumerate(placements):
        stride, found = 1, []
        for axis in text.split("-"):
            if axis == "ep" or degree[axis] == 1:
                continue
            found.append((axis, min(stride, cluster.devices_per_node)))
            stride *= degree[axis]
        seen.setdefault(tuple(sorted(found)), index)
    return sorted(seen.values())
