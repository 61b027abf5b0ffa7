"""Orders in which all micro-batches go one way: GPipe, 1F1B, interleaved 1F1B, looped breadth-first."""

from __future__ import annotations

from collections.abc import Sequence

from simulator.pipeline.action import Action, Order
from simulator.pipeline.sizes import check_sizes, round_size

StagePass = tuple[int, int]
"""Stage and micro-batch."""


def gpipe(num_ranks: int, num_microbatches: int) -> Order:
    """All forward passes, then all backward passes, micro-batches in the same order.

    **Model**: makespan (m + p - 1)(F + B), m micro-batches held everywhere.

    **Source**: arXiv 1811.06965.
    """
    check_sizes("gpipe", num_ranks=num_ranks, num_microbatches=num_microbatches)
    batches = range(num_microbatches)
    ranks = tuple(
        (*(Action(rank, "F", batch) for batch in batches), *(Action(rank, "BW", batch) for batch in batches))
        for rank in range(num_ranks)
    )
    return Order(name="gpipe", num_stages=num_ranks, num_microbatches=num_microbatches, ranks=ranks)


def one_f_one_b(num_ranks: int, num_microbatches: int) -> Order:
    """One forward, one backward after p - 1 - r forward passes on rank r.

    **Model**: makespan (m + p - 1)(F + B); rank r holds min(m, p - r) micro-batches.

    **Source**: DAPPLE, arXiv 2007.01045; PipeDream-Flush, arXiv 2006.09503.
    """
    check_sizes("1f1b", num_ranks=num_ranks, num_microbatches=num_microbatches)
    ranks = tuple(
        alternate(passes := [(rank, batch) for batch in range(num_microbatches)], passes, warmup=num_ranks - 1 - rank)
        for rank in range(num_ranks)
    )
    return Order(name="1f1b", num_stages=num_ranks, num_microbatches=num_microbatches, ranks=ranks)


def interleaved(num_ranks: int, num_microbatches: int, *, virtual_stages: int = 2) -> Order:
    """1F1B over several chunks a rank, stage c p + r being chunk c of rank r.

    Micro-batches go in rounds of g: p where p divides m, else m / floor(m / p), as torch generalises it.

    **Model**: for p | m, makespan m (F + B) + (p - 1)(F + B) / v; rank r holds p + (p - 1 - 2 r) / v micro-batches.

    **Source**: Megatron-LM, arXiv 2104.04473, section 2.2.

    Raises:
        InputError: m is no multiple of the number of rounds.
    """
    check_sizes("interleaved", num_ranks=num_ranks, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    group = round_size("interleaved", num_ranks, num_microbatches)
    ranks = tuple(
        alternate(
            *looped_passes(rank, num_ranks, num_microbatches, virtual_stages, group),
            warmup=(virtual_stages - 1) * group + 2 * (num_ranks - 1 - rank),
        )
        for rank in range(num_ranks)
    )
    return Order(
        name="interleaved", num_stages=num_ranks * virtual_stages, num_microbatches=num_microbatches, ranks=ranks
    )  # fmt: skip


def looped_bfs(num_ranks: int, num_microbatches: int, *, virtual_stages: int = 2) -> Order:
    """All micro-batches through a chunk before the next chunk, backward in the opposite order of chunks and micro-batches.

    **Model**: m micro-batches held everywhere; fewer, larger gradient reductions.

    **Source**: arXiv 2211.05953.
    """
    check_sizes("looped-bfs", num_ranks=num_ranks, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    num_stages = num_ranks * virtual_stages
    ranks = []
    for rank in range(num_ranks):
        forwards = [(stage, batch) for stage in range(rank, num_stages, num_ranks) for batch in range(num_microbatches)]
        ranks.append(alternate(forwards, forwards[::-1], warmup=len(forwards)))
    return Order(name="looped-bfs", num_stages=num_stages, num_microbatches=num_microbatches, ranks=tuple(ranks))


def looped_passes(
    rank: int, num_ranks: int, num_microbatches: int, virtual_stages: int, group: int
) -> tuple[list[StagePass], list[StagePass]]:
    """Forward and backward passes of a rank whose chunks are p stages apart, in groups of micro-batches."""
    stages = range(rank, num_ranks * virtual_stages, num_ranks)
    groups = [range(first, min(first + group, num_microbatches)) for first in range(0, num_microbatches, group)]
    forwards = [(stage, batch) for batches in groups for stage in stages for batch in batches]
    return forwards, [(stage, batch) for batches in groups for stage in reversed(stages) for batch in batches]


def alternate(
    forwards: Sequence[StagePass], backwards: Sequence[StagePass], *, warmup: int, weight_lag: int | None = None
) -> tuple[Action, ...]:
    """``warmup`` forward passes, then one forward and one backward in turn, then the backward passes that are left.

    Args:
        forwards, backwards: passes in the order in which they run.
        warmup: forward passes before the first pair; all, if there are fewer.
        weight_lag: None for full backward passes; else how many input gradients are ahead of the weight gradients, which
            follow them one by one, the last ones at the end.
    """
    kept = min(warmup, len(forwards))
    cells = [Action(stage, "F", batch) for stage, batch in forwards[:kept]]
    for index, (stage, batch) in enumerate(backwards):
        if kept + index < len(forwards):
            ahead, due = forwards[kept + index]
            cells.append(Action(ahead, "F", due))
        cells.append(Action(stage, "BW" if weight_lag is None else "B", batch))
        if weight_lag is not None and index >= weight_lag:
            late, its = backwards[index - weight_lag]
            cells.append(Action(late, "W", its))
    if weight_lag is not None:
        cells += [Action(stage, "W", batch) for stage, batch in backwards[max(0, len(backwards) - weight_lag) :]]
    return tuple(cells)
