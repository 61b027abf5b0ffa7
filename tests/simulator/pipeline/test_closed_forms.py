"""Times and peak activations of every schedule against its closed form, within the form's domain.

Sources: techniques.md sections 6 and 8 (papers named in the generators). Times are whole numbers, so equality is exact unless stated.
"""

from __future__ import annotations

import itertools

import pytest

from simulator.pipeline.action import Order
from simulator.pipeline.asynchronous import pipedream_2bw, weight_version
from simulator.pipeline.controllable_memory import bubble_slots, v_half, v_limited, v_min
from simulator.pipeline.one_way import gpipe, interleaved, looped_bfs, one_f_one_b
from simulator.pipeline.play_order import PlayedOrder, RankTimes, play_order
from simulator.pipeline.two_way import chimera, dualpipe, dualpipe_v
from simulator.pipeline.zero_bubble import zb_h1, zb_h2, zb_v

RANKS = range(2, 33)
MIXED = (7, 6, 4)
"""F, B, W with W <= min(F, B)."""
LARGE = [(2, 256), (8, 256), (16, 256), (32, 256)]


def play(order: Order, forward: float, gradient: float, weight: float, **more: float) -> PlayedOrder:
    times = RankTimes(
        forward_s=(forward,), input_gradient_s=(gradient,), weight_gradient_s=(weight,), comm_s=more.pop("comm", 0.0)
    )
    return play_order(order, times, **more)


def sizes(least: int) -> list[tuple[int, int]]:
    """Ranks and micro-batches: ``least`` micro-batches a rank for all ranks, and 256 for some."""
    return [(ranks, least * ranks) for ranks in RANKS] + LARGE


@pytest.mark.parametrize("schedule", [gpipe, one_f_one_b])
def test_gpipe_and_1f1b(schedule: object) -> None:
    for ranks, batches in [*sizes(1), (8, 3), (5, 1)]:
        played = play(schedule(ranks, batches), *MIXED)  # type: ignore[operator]
        assert played.makespan_s == (batches + ranks - 1) * sum(MIXED)
        held = [batches if schedule is gpipe else min(batches, ranks - rank) for rank in range(ranks)]
        assert list(played.peak_activations) == held
        assert played.bubble_ratio == pytest.approx((ranks - 1) / (batches + ranks - 1), rel=1e-12)


@pytest.mark.parametrize("chunks", [2, 4])
def test_interleaved(chunks: int) -> None:
    for ranks, batches in [*sizes(1), (4, 12), (8, 24)]:
        played = play(interleaved(ranks, batches, virtual_stages=chunks), *(4 * time for time in MIXED))
        assert played.makespan_s == 4 * sum(MIXED) * (batches + (ranks - 1) / chunks)
        first = min(batches, ranks * (1 + (ranks - 1) / (ranks * chunks)))
        assert played.peak_activations[0] == pytest.approx(first, rel=1e-12)
        falls = [min(batches, ranks + (ranks - 1 - 2 * rank) / chunks) for rank in range(ranks)]
        assert played.peak_activations == pytest.approx(falls, rel=1e-12)


def test_looped_bfs_holds_all() -> None:
    played = play(looped_bfs(4, 8, virtual_stages=2), *MIXED)
    assert played.peak_activations == (8.0,) * 4
    assert played.makespan_s >= 8 * sum(MIXED) + 3 * sum(MIXED) / 2


def test_zb_h1() -> None:
    for ranks, batches in sizes(1):
        played = play(zb_h1(ranks, batches), *MIXED)
        forward, gradient, weight = MIXED
        assert played.makespan_s == batches * sum(MIXED) + (ranks - 1) * (forward + gradient - weight)
        assert list(played.peak_activations) == [(ranks - rank) + rank * 0.5 for rank in range(ranks)]


def test_zb_h2() -> None:
    for ranks, batches in [(ranks, 2 * ranks - 1) for ranks in RANKS] + LARGE:
        played = play(zb_h2(ranks, batches), *MIXED, weight_share=0.25)
        forward, gradient, weight = MIXED
        assert max(played.span_s) == batches * sum(MIXED) + (ranks - 1) * (forward + gradient - 2 * weight)
        assert list(played.peak_activations) == [(2 * ranks - 2 * rank - 1) + 2 * rank * 0.25 for rank in range(ranks)]


def test_zb_h1_at_few_micro_batches() -> None:
    """M <= p: (m + p - 1)(F + B) + W for the rank that ends last, W <= F, B."""
    for ranks, batches in itertools.product((4, 8), (1, 2, 4)):
        assert play(zb_h1(ranks, batches), 2, 2, 1).makespan_s >= (batches + ranks - 1) * 4 + 1


def check_v_family(ranks: int, batches: int) -> None:
    """Half-stage units: with F = B = W = 2 per rank, a chunk's pass takes 1."""
    for made, limit in (
        (v_min(ranks, batches), 2 * ((ranks + 4) // 3)),
        (v_half(ranks, batches), 2 * ((ranks + 2) // 2)),
        (zb_v(ranks, batches), 2 * ranks),
    ):
        for weight_share in (0.5, 1.0):
            played = play(made, 2, 2, 2, weight_share=weight_share)
            assert max(played.span_s) - 6 * batches == bubble_slots(ranks, limit)
            assert max(played.peak_activations) == limit / 2


@pytest.mark.parametrize("ranks", [*range(2, 11), 16, 32])
def test_v_family_at_its_own_memory(ranks: int) -> None:
    check_v_family(ranks, 3 * ranks)


@pytest.mark.slow
def test_v_family_at_all_sizes() -> None:
    for ranks, batches in [*((ranks, 2 * ranks + 1) for ranks in RANKS), *sizes(4)]:
        check_v_family(ranks, batches)


@pytest.mark.parametrize("ranks", [4, 7, 8, 12, 16])
def test_v_family_between(ranks: int) -> None:
    """Exact where the limit is a whole number of M_B; where it is a half, at most one slot more than the form."""
    for limit in range(2 * ((ranks + 4) // 3), 2 * ranks + 1):
        played = play(v_limited(ranks, 4 * ranks, memory_limit=limit / 2), 2, 2, 2)
        excess = max(played.span_s) - 24 * ranks - bubble_slots(ranks, limit)
        assert max(played.peak_activations) <= limit / 2
        assert excess == 0 if limit % 2 == 0 else 0 <= excess <= 1


def test_v_family_price_list() -> None:
    """Section 8.3: p = 8 gives 23, 17 and 0 half-stage units at 8, 10 and 16 half-stages of memory."""
    assert [bubble_slots(8, limit) for limit in (8, 10, 16)] == [23, 17, 0]


def test_chimera_one_unit() -> None:
    for ranks in range(2, 33, 2):
        forward, gradient, weight = MIXED
        played = play(chimera(ranks, ranks), *MIXED)
        assert played.makespan_s == ranks * forward + (2 * ranks - 2) * (gradient + weight)
        assert list(played.peak_activations) == [ranks // 2 + 1 + min(rank, ranks - 1 - rank) for rank in range(ranks)]
        assert played.order.weight_copies == 2


def test_chimera_concatenated_pays_for_every_unit() -> None:
    """B = 2 F: (5 D - 4) + (k - 1)(4 D - 2), so that from N > 3 D on, at D = 4, 1F1B is faster."""
    for ranks, units in itertools.product((4, 6, 8, 16, 32), (1, 2, 3, 4, 8)):
        played = play(chimera(ranks, units * ranks), 1, 1, 1)
        assert played.makespan_s == 5 * ranks - 4 + (units - 1) * (4 * ranks - 2)
    slower = [units for units in range(1, 9) if play(chimera(4, 4 * units), 1, 1, 1).makespan_s > 3 * (4 * units + 3)]
    assert slower == [4, 5, 6, 7, 8]


@pytest.mark.parametrize(("mode", "bubble", "memory"), [("doubling", 3.0, 2.0), ("halving", 1.5, 1.0)])
def test_chimera_doubled_and_halved_do_not(mode: str, bubble: float, memory: float) -> None:
    """Derived from the slots: B = 2 F, whole units: (D - 2) / 2 slots of idle time in all, whatever N."""
    for ranks, units in itertools.product((4, 8, 16), (2, 4, 8)):
        played = play(chimera(ranks, units * ranks, mode=mode), 1, 1, 1)  # type: ignore[arg-type]
        assert played.makespan_s - 3 * units * ranks == bubble * (ranks - 2) / 2
        assert max(played.peak_activations) == memory * ranks


def test_dualpipe_and_its_v() -> None:
    """F = B (input gradient), W <= F: bubble (p / 2 - 1)(F&B + B - 3 W) with the full B, p + 1 activations of a stage everywhere."""
    for half, units, (forward, weight) in itertools.product((1, 2, 3, 4, 8, 16), (1, 5), [(1, 1), (2, 1), (10, 1)]):
        full = forward + weight
        form = (half - 1) * ((forward + full) + full - 3 * weight)
        for order, scale in ((dualpipe(2 * half, 4 * half * units), 1), (dualpipe_v(half, 2 * half * units), 2)):
            played = play(order, scale * forward, scale * forward, scale * weight)
            assert max(played.span_s) == max(played.busy_s) + form
            assert played.peak_activations == ((2 * half + 1) / scale,) * order.num_ranks


def test_an_overlapped_pair_may_take_less() -> None:
    """A chunk's pair takes half of the rank's 4 instead of half of 6."""
    together = RankTimes(forward_s=(2,), input_gradient_s=(2,), weight_gradient_s=(2,), overlapped_s=(4,))
    order = dualpipe_v(2, 8)
    pairs = [sum(len(cell.parts) == 2 for cell in cells) for cells in order.ranks]
    played = play_order(order, together)
    assert list(played.busy_s) == [8 * 6 - num * 1 for num in pairs]


def test_pipedream_2bw_fills_once() -> None:
    order = pipedream_2bw(4, 8, num_steps=5)
    assert order.weight_versions == 2
    assert play(order, *MIXED).makespan_s == (5 * 8 + 3) * sum(MIXED)
    assert [weight_version(batch, 8) for batch in (0, 7, 8, 15, 16, 24)] == [0, 0, 0, 0, 1, 2]


def test_communication_delays_what_depends_on_it() -> None:
    """One micro-batch: every edge between ranks counts once forward and once back; edges on one rank cost nothing.

    In the V, rank 1 runs the weight gradient of its second chunk before the input gradient of its first.
    """
    assert play(one_f_one_b(4, 1), 5, 3, 2, comm=0.5).makespan_s == 4 * 10 + 6 * 0.5
    assert play(zb_v(2, 1), 2, 2, 2, comm=0.5).makespan_s == 4 + 4 + 4 * 0.5 + 1 + 1
