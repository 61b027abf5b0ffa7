"""The outer space of a traced model over several devices: every legal combination of degrees, order, micro-batch, ZeRO stage, placement and precision."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import product
from typing import NamedTuple

from hardware_models.errors import InfeasibleError
from search.joint.space import divisors, order_exists
from search.traced.request import TracedRequest
from simulator.plan import SCHEDULES_TWO_WAYS, Batch, Memory, Parallel, Pipeline, Plan, Precision
from simulator.plan_sections import SCHEDULES, SCHEDULES_TWO_CHUNKS

ALONE = "1f1b"
"""The schedule's name where there is one stage: it has no effect."""
SPACE_SCHEDULES = tuple(name for name in SCHEDULES if name not in {*SCHEDULES_TWO_WAYS, "pipedream-2bw"})
"""Orders that keep a stage on one rank and compute with the present weights."""
ANY_CHUNKS = frozenset({"interleaved", "looped-bfs"})
MOST_CHUNKS = 8
"""Of a rank."""
PLACEMENTS = ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp")
"""Replicas are neighbours, or stages are."""
ZERO_STAGES = (0, 1, 2, 3)


class TracedPoint(NamedTuple):
    """Outer decisions of many plans."""

    pp: int
    dp: int
    schedule: str
    chunks: int
    micro_batch: int
    zero_stage: int
    placement: str
    compute: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedSpace:
    """Points of a request."""

    request: TracedRequest
    points: tuple[TracedPoint, ...]

    def __len__(self) -> int:
        return len(self.points)

    def num_microbatches(self, index: int) -> int:
        """Of a replica."""
        point = self.points[index]
        return self.request.global_batch // (point.dp * point.micro_batch)

    def plan(self, index: int) -> Plan:
        """The plan of a point that saves no memory and leaves the cut to the simulator."""
        return plan_of(self.request, self.points[index])


def plan_of(
    request: TracedRequest, point: TracedPoint, *, recompute: str = "none", partition: tuple[int, ...] | None = None
) -> Plan:
    """The plan of a point.

    Args:
        request: that it answers.
        point: outer decisions.
        recompute: inner one.
        partition: blocks of each stage; None: the simulator's.

    Raises:
        InputError: the point breaks a rule of plans.
    """
    return Plan(
        parallel=Parallel(pp=point.pp, dp=point.dp, virtual_stages=point.chunks, order=point.placement),
        batch=Batch(global_batch=request.global_batch, micro_batch=point.micro_batch, seq_len=request.source.seq_len),
        pipeline=Pipeline(schedule=point.schedule, partition=partition),
        memory=Memory(zero_stage=point.zero_stage, recompute=recompute, budget_bytes=request.budget_bytes),  # type: ignore[arg-type]
        precision=Precision(compute=point.compute),  # type: ignore[arg-type]
    )  # fmt: skip


def traced_space(request: TracedRequest, *, num_blocks: int, mixes_samples: bool) -> TracedSpace:
    """All points that pass divisibility; memory is not looked at.

    **Left out**: orders of two directions and of older weights, which the simulator refuses for traced models; more chunks of a rank than `MOST_CHUNKS`; buckets and overlap other than
    torch's; partial sharding; micro-batches of a model that mixes samples, unless they are allowed.

    Args:
        request: what is asked for.
        num_blocks: of the model's chain.
        mixes_samples: whether one sample's result depends on others.

    Raises:
        InfeasibleError: no combination divides batch and devices.
    """
    whole_only = mixes_samples and not request.splits_batch
    points = tuple(_points(request, num_blocks, whole_only=whole_only))
    if not points:
        gpus = request.cluster.num_gpus
        text = (
            f"no pp * dp == {gpus} divides {num_blocks} blocks of {request.source.name} and a batch of {request.global_batch}"
        )
        raise InfeasibleError(limit=text, smallest_change=f"a global batch that {gpus} divides always has dp = {gpus}")
    return TracedSpace(request=request, points=points)


def _points(request: TracedRequest, num_blocks: int, *, whole_only: bool) -> Iterator[TracedPoint]:
    gpus, batch = request.cluster.num_gpus, request.global_batch
    for pp in divisors(gpus):
        dp = gpus // pp
        if pp > num_blocks or batch % dp:
            continue
        share = batch // dp
        sizes = (share,) if whole_only else divisors(share)
        stages = ZERO_STAGES if dp > 1 else (0,)
        ways = product(_pipelines(pp, num_blocks), sizes, stages, _placements(request, pp, dp), request.computes)
        for (schedule, chunks), size, zero, placement, compute in ways:
            if pp == 1 or order_exists(schedule, pp, share // size, chunks):
                yield TracedPoint(pp, dp, schedule, chunks, size, zero, placement, compute)


def _pipelines(pp: int, num_blocks: int) -> list[tuple[str, int]]:
    """Schedules, each with the chunks of a rank that the model's blocks fill."""
    if pp == 1:
        return [(ALONE, 1)]
    found = []
    for name in SPACE_SCHEDULES:
        chunks: Sequence[int] = (2,) if name in SCHEDULES_TWO_CHUNKS else (1,)
        if name in ANY_CHUNKS:
            chunks = range(2, MOST_CHUNKS + 1)
        found += [(name, count) for count in chunks if pp * count <= num_blocks]
    return found


def _placements(request: TracedRequest, pp: int, dp: int) -> tuple[str, ...]:
    """Those in which groups lie differently: all do alike on one node, where there is one group."""
    if pp == 1 or dp == 1 or request.cluster.num_gpus <= request.cluster.devices_per_node:
        return PLACEMENTS[:1]
    return PLACEMENTS
