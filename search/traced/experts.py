"""Plans that experts would set by hand for a module of their own: the baselines of a search, and its first incumbents."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import suppress
from dataclasses import dataclass

from hardware_models.errors import InputError
from search.joint.experts import Expert
from search.joint.space import divisors
from search.traced.request import TracedRequest
from search.traced.space import ALONE, PLACEMENTS, TracedPoint, plan_of
from simulator.parallel.partition import even_partition
from simulator.plan import Plan

MICRO_BATCHES = (1, 2, 4, 8, 16)
"""Samples of a micro-batch that rules try beside a replica's whole share."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Rule:
    name: str
    source: str
    zero_stage: int
    recompute: str
    stages: bool = False
    """Whether devices hold equal counts of blocks; else each holds a replica."""


RULES = (
    _Rule(name="data parallel, nothing recomputed (DDP)", source="arXiv 2006.15704", zero_stage=0, recompute="none"),
    _Rule(name="data parallel, each block recomputed", source="arXiv 2006.15704, 1604.06174", zero_stage=0, recompute="full"),
    _Rule(name="full sharding, nothing recomputed (ZeRO 3)", source="arXiv 1910.02054", zero_stage=3, recompute="none"),
    _Rule(name="full sharding, each block recomputed (FSDP)", source="arXiv 2304.11277", zero_stage=3, recompute="full"),
    _Rule(name="GPipe, equal counts of blocks, nothing recomputed", source="arXiv 1811.06965", zero_stage=0, recompute="none", stages=True),
    _Rule(name="GPipe, equal counts of blocks, each recomputed", source="arXiv 1811.06965", zero_stage=0, recompute="full", stages=True),
)  # fmt: skip
"""Li et al. 2020 (DDP); Chen et al. 2016 (checkpoints); Rajbhandari et al. 2020; Zhao et al. 2023; Huang et al. 2019, which recomputes each stage (here each block)."""


def experts(request: TracedRequest, *, num_blocks: int, mixes_samples: bool) -> tuple[Expert, ...]:
    """The rules, without those that no plan satisfies.

    Args:
        request: what is asked for.
        num_blocks: of the model's chain.
        mixes_samples: whether one sample's result depends on others; then a replica's share is not split unless that is allowed.
    """
    whole_only = mixes_samples and not request.splits_batch
    found = (
        Expert(name=rule.name, source=rule.source, plans=tuple(_plans(request, rule, num_blocks, whole_only=whole_only)))
        for rule in RULES
    )
    return tuple(one for one in found if one.plans)


def _plans(request: TracedRequest, rule: _Rule, num_blocks: int, *, whole_only: bool) -> Iterator[Plan]:
    gpus = request.cluster.num_gpus
    for pp in divisors(gpus) if rule.stages else (1,):
        dp = gpus // pp
        if request.global_batch % dp or pp > num_blocks or (rule.stages and pp == 1):
            continue
        share = request.global_batch // dp
        cut = even_partition(num_blocks, pp) if pp > 1 else None
        for size in (share,) if whole_only else sorted({share, *(one for one in MICRO_BATCHES if share % one == 0)}):
            zero = rule.zero_stage if dp > 1 else 0
            schedule = "gpipe" if rule.stages else ALONE
            for compute in request.computes:
                point = TracedPoint(pp, dp, schedule, 1, size, zero, PLACEMENTS[0], compute)
                with suppress(InputError):
                    yield plan_of(request, point, recompute=rule.recompute, partition=cut)
