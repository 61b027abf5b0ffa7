"""Orders that fill the pipeline's bubble with weight gradients: ZB-H1, ZB-H2 and ZB-V, made by rule."""

from __future__ import annotations

from simulator.pipeline.action import Order, actions_of
from simulator.pipeline.one_way import alternate, looped_passes
from simulator.pipeline.rank_writer import RankWriter
from simulator.pipeline.sizes import check_sizes, round_size


def zb_h1(num_ranks: int, num_microbatches: int, *, virtual_stages: int = 1) -> Order:
    """1F1B with the weight gradients of rank r lagging r input gradients behind; memory of 1F1B.

    With more than one chunk, what torch calls interleaved zero bubble.

    **Model** (one chunk, m >= p): bubble (p - 1)(F + B - W); rank r holds (p - r) M_B + r M_W.

    **Source**: arXiv 2401.10241, section 2.

    Raises:
        InputError: several chunks and m is no multiple of the number of rounds.
    """
    check_sizes("zb-h1", num_ranks=num_ranks, num_microbatches=num_microbatches, virtual_stages=virtual_stages)
    group = num_microbatches if virtual_stages == 1 else round_size("zb-h1", num_ranks, num_microbatches)
    ranks = tuple(
        alternate(
            *looped_passes(rank, num_ranks, num_microbatches, virtual_stages, group),
            warmup=(virtual_stages - 1) * group + num_ranks - 1 - rank,
            weight_lag=rank,
        )
        for rank in range(num_ranks)
    )
    return Order(name="zb-h1", num_stages=num_ranks * virtual_stages, num_microbatches=num_microbatches, ranks=ranks)


def zb_h2(num_ranks: int, num_microbatches: int) -> Order:
    """Twice the warm-up of 1F1B and weight gradients of rank r lagging 2 r input gradients behind.

    **Model** (m >= 2 p - 1, W <= min(F, B)): bubble (p - 1)(F + B - 2 W), nothing at equal times; rank r holds (2 p - 2 r - 1) M_B + 2 r M_W.

    **Source**: arXiv 2401.10241, section 2.
    """
    check_sizes("zb-h2", num_ranks=num_ranks, num_microbatches=num_microbatches)
    ranks = tuple(
        alternate(
            passes := [(rank, batch) for batch in range(num_microbatches)],
            passes,
            warmup=2 * (num_ranks - 1 - rank),
            weight_lag=2 * rank,
        )
        for rank in range(num_ranks)
    )
    return Order(name="zb-h2", num_stages=num_ranks, num_microbatches=num_microbatches, ranks=ranks)


def zb_v(num_ranks: int, num_microbatches: int) -> Order:
    """Two chunks a rank, stages r and 2 p - 1 - r: the memory of 1F1B and, at equal times, no bubble.

    Fewer than 2 p - 1 micro-batches: the order of 2 p - 1 without those that are too many, as torch does it.

    **Model** (F = B = W, m >= 2 p - 1): no bubble, p M_B on every rank.

    **Source**: arXiv 2401.10241, section 6.
    """
    check_sizes("zb-v", num_ranks=num_ranks, num_microbatches=num_microbatches)
    full = max(2 * num_ranks - 1, num_microbatches)
    ranks = []
    for rank in range(num_ranks):
        written = _zb_v_rank(rank, num_ranks, full)
        ranks.append(tuple(action for action in actions_of(tuple(written.cells)) if action.micro_batch < num_microbatches))
    return Order(name="zb-v", num_stages=2 * num_ranks, num_microbatches=num_microbatches, ranks=tuple(ranks))


def _zb_v_rank(rank: int, num_ranks: int, num_microbatches: int) -> RankWriter:
    out, way_back = RankWriter((rank, 2 * num_ranks - 1 - rank)), num_ranks - rank
    forwards = 2 * way_back - 1
    for _ in range(forwards):
        out.put("F", 0)
    for _ in range(rank):
        out.put("F", 1)
        out.put("F", 0)
    for _ in range(way_back):
        _forward_and_backward(out, 1)
    # so far chunk 0 ran rank + 2 way_back - 1 forward passes, chunk 1 ran rank + way_back
    for index in range(num_microbatches - num_ranks):
        if forwards + rank + index < num_microbatches:
            out.put("F", 0)
        out.put("B", 0)
        out.put_weight(0)
        _forward_and_backward(out, 1)
    for _ in range(rank):
        out.put("B", 0)
        out.put("B", 1)
    for _ in range(way_back):
        out.put("B", 0)
        out.put_weight(0)
    for chunk in (1, 0):
        for _ in range(rank):
            out.put_weight(chunk)
    return out


def _forward_and_backward(out: RankWriter, chunk: int) -> None:
    out.put("F", chunk)
    out.put("B", chunk)
    out.put_weight(chunk)
