"""Replicas of a traced model's stages: in which buckets their gradients are summed, behind which passes, and what ZeRO 1 splits."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache

from hardware_models.kernel import Kernel
from simulator.parallel.traced_stage import Holding, TracedStage
from simulator.plan import Plan
from simulator.workload import Pass

CollectiveSeconds = Callable[[str, float, int], float]
"""Of a collective (`hardware_models.network.collectives` names them) of the bytes of the whole tensor among so many ranks."""
BUCKET_BYTES = 25 * 2**20
"""Gradients of a bucket unless the plan says.

**Source**: torch 2.13, torch/nn/parallel/distributed.py: ``bucket_cap_mb`` is 25 MiB. (Its first bucket of 1 MiB is not made.)
"""
ALIGNED_ELEMENTS = 16
"""Where parameters live in one tensor each begins at a multiple of so many elements: kernels read them as they read a tensor of its own."""
MOST_PASSES = 1 << 14
"""Passes that are kept: a search compares plans that pack some thousands of different buckets."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Bucket:
    """Gradients that replicas sum in one exchange, one after the other in one tensor."""

    names: tuple[str, ...]
    offsets: tuple[int, ...]
    """First element of each."""
    sizes: tuple[int, ...]
    """Bytes of each."""
    elements: int
    """Of the tensor, gaps included."""
    dtype: str
    size_bytes: int
    """Of the tensor."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Replicas:
    """What the replicas of a pipeline do with each other."""

    ranks: int
    """That hold the same stages."""
    buckets: tuple[tuple[Bucket, ...], ...]
    """Per pipeline rank, in the order in which they are exchanged."""
    splits: bool
    """ZeRO 1: each rank keeps the optimizer's states of its part of every bucket, updates that part, and gets the others."""
    overlaps: bool
    """A bucket goes when the last backward pass has made its gradients; else all go after the passes."""

    def part_bytes(self, bucket: Bucket) -> int:
        """What a rank updates of a bucket."""
        return bucket.size_bytes // self.ranks

    def part_elements(self, bucket: Bucket) -> int:
        """The same in elements."""
        return bucket.elements // self.ranks

    def reduce_s(self, bucket: Bucket, seconds: CollectiveSeconds) -> float:
        """The sum over the replicas, of which each rank gets its part or everything."""
        return seconds("reduce_scatter" if self.splits else "all_reduce", float(bucket.size_bytes), self.ranks)

    def gather_s(self, bucket: Bucket, seconds: CollectiveSeconds) -> float:
        """What brings all parts to every rank."""
        return seconds("all_gather", float(bucket.size_bytes), self.ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class Rings:
    """Collectives over one kind of link, as rings.

    **Source**: Patarasuk and Yuan 2009, section 3.
    """

    latency_s: float
    bytes_per_s: float

    def __call__(self, collective: str, size_bytes: float, ranks: int) -> float:
        """Each message is a rank's share of the bytes; in a sum that all get, shares go around twice."""
        rounds = 2 if collective == "all_reduce" else 1
        return rounds * (ranks - 1) * (self.latency_s + size_bytes / ranks / self.bytes_per_s)


def replicas_of(plan: Plan, stages: Sequence[TracedStage], stages_of_rank: Sequence[Sequence[int]]) -> Replicas | None:
    """The plan's replicas; None where there is one."""
    if plan.parallel.dp == 1:
        return None
    splits, limit = plan.memory.zero_stage == 1, plan.runtime.bucket_bytes or BUCKET_BYTES
    ranks = plan.parallel.dp
    multiple = ranks * ALIGNED_ELEMENTS if splits else 1
    found = []
    for own in stages_of_rank:
        early, late = trained_in_order(stages, own)
        found.append(
            (*buckets_of(early, limit_bytes=limit, multiple=multiple), *buckets_of(late, limit_bytes=limit, multiple=multiple))
        )
    return Replicas(ranks=ranks, buckets=tuple(found), splits=splits, overlaps=plan.runtime.overlap_grad_reduce)


def trained_in_order(stages: Sequence[TracedStage], own: Sequence[int]) -> tuple[Mapping[str, Holding], Mapping[str, Holding]]:
    """A rank's trained parameters: those whose gradients one block alone makes, from the last block to the first, and the rest.

    Gradients of tables that several blocks or stages share are final when all passes are over.
    """
    users = Counter(name for stage in stages for name in stage.parameters)
    early: dict[str, Holding] = {}
    held: dict[str, Holding] = {}
    for index in sorted(own, reverse=True):
        stage = stages[index]
        held |= stage.parameters
        for names in reversed(stage.parameters_of_block):
            early |= {
                name: stage.parameters[name] for name in sorted(names) if users[name] == 1 and stage.parameters[name].trained
            }
    return early, {name: one for name, one in held.items() if one.trained and name not in early}


def buckets_of(held: Mapping[str, Holding], *, limit_bytes: int, multiple: int) -> tuple[Bucket, ...]:
    """Parameters of one dtype each, in order, closed as soon as they reach the limit.

    Args:
        held: in the order in which their gradients are final.
        limit_bytes: of a bucket.
        multiple: of elements at which a bucket ends; above 1 each parameter begins at a multiple of `ALIGNED_ELEMENTS`.
    """
    open_names: dict[str, list[str]] = {}
    found: list[Bucket] = []
    for name, one in held.items():
        names = open_names.setdefault(one.dtype, [])
        names.append(name)
        if sum(held[other].size_bytes for other in names) >= limit_bytes:
            found.append(_bucket(held, open_names.pop(one.dtype), multiple))
    return (*found, *(_bucket(held, names, multiple) for names in open_names.values()))


def _bucket(held: Mapping[str, Holding], names: Sequence[str], multiple: int) -> Bucket:
    offsets, end, aligned = [], 0, ALIGNED_ELEMENTS if multiple > 1 else 1
    for name in names:
        offsets.append(end)
        end += _rounded(held[name].elements, aligned)
    elements, first = _rounded(end, multiple), held[names[0]]
    return Bucket(
        names=tuple(names), offsets=tuple(offsets), sizes=tuple(held[name].size_bytes for name in names), elements=elements, dtype=first.dtype,
        size_bytes=elements * (first.size_bytes // first.elements),
    )  # fmt: skip


def _rounded(count: int, multiple: int) -> int:
    return -(-count // multiple) * multiple


@lru_cache(maxsize=MOST_PASSES)
def packing_pass(bucket: Bucket) -> Pass:
    """Gradients copied into a bucket, a kernel each; the same pass for the same bucket, so that it is priced once."""
    width = bucket.size_bytes // bucket.elements
    kernels = tuple(
        Kernel(
            kernel_class="copy",
            op="copy_",
            shape=(size // width,),
            dtype=bucket.dtype,
            flops=0,
            read_bytes=size,
            written_bytes=size,
        )
        for size in bucket.sizes
        if size
    )
    return Pass(kernels=kernels, memory=())
