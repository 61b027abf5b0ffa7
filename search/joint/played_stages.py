"""What a refined bound plays: the stages of a cut, what ranks hold in an order, traffic of data parallelism and copies, as times of passes."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from itertools import pairwise

import numpy as np
from numpy.typing import NDArray

from search.joint.layer_tables import LayerTable
from search.joint.played_step_kernels import Passes, StageSeconds
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.order_blocks import order_blocks
from simulator.parallel.simulate_parallel import WEIGHT_SHARE
from simulator.pipeline.action import Order

Floats = NDArray[np.float64]


@dataclass(frozen=True, slots=True, kw_only=True)
class Stages:
    """A plan's stages; each of shape (stages,)."""

    cut: tuple[int, ...]
    forward_s: Floats
    backward_s: Floats
    weight_s: Floats
    compute_s: Floats
    """Of both passes, without collectives."""
    back_compute_s: Floats
    """Of the full backward pass, without collectives."""
    edges: NDArray[np.int64]
    """First piece of each, and the number of pieces; shape (stages + 1,)."""
    elements: Floats
    dense: Floats
    kept_bytes: Floats
    cheap_bytes: Floats
    moved: Floats
    """Parameters that may live on the host."""
    largest: Floats
    """Parameters of the largest piece."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Held:
    """What the ranks of an order hold, in micro-batches of each stage."""

    moments: Floats
    """When ranks hold most; shape (moments, stages)."""
    rank: NDArray[np.int64]
    """Of each moment."""
    owns: Floats
    """1 where a rank holds a stage; shape (ranks, stages)."""
    passes: Floats
    """Micro-batches that a rank runs through a stage; same shape."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Sync:
    """Data parallelism of all stages; each of shape (stages,)."""

    chunks: NDArray[np.int64]
    gather_s: Floats
    reduce_s: Floats
    gather_early: NDArray[np.bool_]
    """Parameters are gathered beside the first passes."""
    reduce_early: NDArray[np.bool_]
    """Gradients go beside the last ones."""
    first_s: Floats
    """Of the gathers, what a forward pass waits for."""
    first_back_s: Floats


def sync_of(syncs: Sequence[GradientSync]) -> Sync:
    """Of stages, each with its own."""
    chunks = np.array([one.chunks for one in syncs], np.int64)
    gather_s = np.array([one.gather_s for one in syncs])
    return Sync(
        chunks=chunks, gather_s=gather_s, reduce_s=np.array([one.reduce_s for one in syncs]), gather_early=np.array([one.gather_overlaps for one in syncs]),
        reduce_early=np.array([one.reduce_overlaps for one in syncs]), first_s=gather_s / chunks, first_back_s=np.zeros(len(syncs)),
    )  # fmt: skip


def no_sync(count: int) -> Sync:
    """Of as many stages, where nothing is counted."""
    none, yes = np.zeros(count), np.ones(count, np.bool_)
    return Sync(
        chunks=np.ones(count, np.int64),
        gather_s=none,
        reduce_s=none,
        gather_early=yes,
        reduce_early=yes,
        first_s=none,
        first_back_s=none,
    )


def stage_seconds(stages: Stages, sync: Sync, share: float, extra: Floats | float) -> StageSeconds:
    """Times of passes: of a share of a micro-batch, with ``extra`` seconds of a micro-batch made again."""
    lead: Floats = share * extra * np.ones(len(stages.dense))
    return StageSeconds(
        forward=share * stages.forward_s, forward_compute=share * (stages.compute_s - stages.back_compute_s),
        backward=share * stages.backward_s + lead, backward_compute=share * stages.back_compute_s + lead, weight=share * stages.weight_s,
        chunks=sync.chunks, gather=sync.gather_s * sync.gather_early, first=sync.first_s, first_back=sync.first_back_s,
        reduce=sync.reduce_s * sync.reduce_early, lead=lead,
    )  # fmt: skip


def stages_of_cut(table: LayerTable, cut: tuple[int, ...]) -> Stages:
    """Sums over the pieces of each stage: the embedding is on the first one, the head on the last."""
    edges = np.concatenate([[0], 1 + np.cumsum(cut)])
    edges[-1] += 1
    pieces = np.diff(table.dense_elements)

    def sums(values: Floats) -> Floats:
        return np.diff(values[edges])

    return Stages(
        cut=cut, forward_s=sums(table.forward_s), backward_s=sums(table.backward_s), weight_s=sums(table.weight_s), compute_s=sums(table.compute_s), back_compute_s=sums(table.back_compute_s), edges=edges,
        elements=sums(table.elements), dense=sums(table.dense_elements), kept_bytes=sums(table.kept_bytes), cheap_bytes=sums(table.cheap_bytes), moved=sums(table.moved_elements),
        largest=np.array([pieces[first:end].max(initial=0.0) for first, end in pairwise(edges.tolist())]),
    )  # fmt: skip


def held_of(order: Order) -> Held:
    """Made once an order."""
    return order.once("held", partial(_made_held, order))


def _made_held(order: Order) -> Held:
    passes = passes_of(order)
    part, moments, ranks = 1.0 / order.microbatch_parts, [], []
    owns, ran = np.zeros((2, order.num_ranks, order.num_stages))
    change = part * np.array([1.0, WEIGHT_SHARE - 1.0, -WEIGHT_SHARE, -1.0])[passes.kind]
    for rank in range(order.num_ranks):
        own = slice(int(passes.first[rank]), int(passes.first[rank + 1]))
        stage, kind, alive = passes.stage[own], passes.kind[own], np.cumsum(change[own])
        owns[rank, stage] = 1.0
        ran[rank] = part * np.bincount(stage[kind == 0], minlength=order.num_stages)
        highest = np.flatnonzero((kind == 0) & (alive >= alive[kind == 0].max() - 1e-9))
        for place in dict.fromkeys((int(highest[0]), int(highest[-1]))):
            moments.append(np.bincount(stage[: place + 1], weights=change[own][: place + 1], minlength=order.num_stages))
            ranks.append(rank)
    return Held(moments=np.array(moments), rank=np.array(ranks, np.int64), owns=owns, passes=ran)


def passes_of(order: Order) -> Passes:
    """Made once an order."""
    return order.once("passes to play", partial(_made_passes, order))


def _made_passes(order: Order) -> Passes:
    blocks = order_blocks(order)
    own = blocks.stage >= 0
    rank_of = np.full((order.num_stages, order.num_microbatches), -1, np.int64)
    forward = own & (blocks.kind == 0)
    rank_of[blocks.stage[forward], blocks.micro_batch[forward]] = blocks.rank[forward]
    ranks = np.arange(order.num_ranks + 1)
    return Passes(
        first=blocks.first_block - 2 * ranks, stage=blocks.stage[own], kind=blocks.kind[own], micro_batch=blocks.micro_batch[own],
        sends=(blocks.receiver >= 0)[own] & (blocks.receiver != blocks.rank)[own], opens=blocks.first[own], closes=blocks.last[own], rank_of=rank_of,
    )  # fmt: skip
