"""What every schedule keeps: it can run, nothing is lost in its text, memory comes back, no time is won against the bounds."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.errors import InfeasibleError, InputError, UnknownNameError
from simulator.pipeline.action import Action, Order, Overlap, actions_of
from simulator.pipeline.catalogue import PIPELINE_SCHEDULES, OrderRequest, make_order
from simulator.pipeline.check_order import check_order
from simulator.pipeline.controllable_memory import v_limited
from simulator.pipeline.order_text import order_csv, parse_order
from simulator.pipeline.play_order import RankTimes, play_order
from simulator.pipeline.zero_bubble_auto import zb_auto
from simulator.plan_sections import SCHEDULES

SIZES = [(2, 4), (4, 8), (4, 16), (8, 24)]
MORE_SIZES = [(1, 1), (1, 5), (3, 1), (3, 6), (5, 10), (6, 7)]

ROUNDING = 1e-12


def request(schedule: str, ranks: int, batches: int) -> OrderRequest:
    return OrderRequest(schedule=schedule, num_ranks=ranks, num_microbatches=batches)


def test_plans_and_orders_know_the_same_names() -> None:
    assert set(PIPELINE_SCHEDULES) == set(SCHEDULES)


@pytest.mark.parametrize(("ranks", "batches"), SIZES)
@pytest.mark.parametrize("schedule", PIPELINE_SCHEDULES)
def test_every_schedule(schedule: str, ranks: int, batches: int) -> None:
    order = make_order(request(schedule, ranks, batches))
    check_order(order)
    assert parse_order(order_csv(order), source=order.name).ranks == order.ranks
    check_bounds(order, RankTimes(forward_s=(3.0,), input_gradient_s=(2.5,), weight_gradient_s=(1.5,), comm_s=0.25))


@pytest.mark.parametrize(("ranks", "batches"), MORE_SIZES)
@pytest.mark.parametrize(
    "schedule", ["gpipe", "1f1b", "looped-bfs", "zb-h1", "zb-h2", "zb-1p", "zb-2p", "zb-v", "v-half", "v-min"]
)
def test_odd_sizes(schedule: str, ranks: int, batches: int) -> None:
    check_order(make_order(request(schedule, ranks, batches)))


@pytest.mark.parametrize("mode", ["direct", "doubling", "halving"])
@pytest.mark.parametrize("batches", [1, 2, 3, 6, 7, 12, 13])
def test_chimera_at_any_number_of_micro_batches(mode: str, batches: int) -> None:
    asked = OrderRequest(schedule="chimera", num_ranks=6, num_microbatches=batches, chimera_mode=mode)  # type: ignore[arg-type]
    check_order(make_order(asked))


def check_bounds(order: Order, times: RankTimes) -> None:
    """Makespan >= one micro-batch's way and >= every rank's work; no rank runs two things at once; memory comes back to nothing."""
    played = play_order(order, times)
    per_rank = times.per_rank(order.num_ranks)
    whole = float(per_rank[:3, 0].sum()) * order.num_microbatches / order.microbatch_parts
    ways = 2 if order.weight_copies == 2 else 1
    assert sum(played.busy_s) == pytest.approx(whole * order.num_ranks)
    assert played.makespan_s >= max(played.busy_s) * (1 - ROUNDING)
    assert played.makespan_s >= max(played.span_s) * (1 - ROUNDING)
    assert ways * max(played.busy_s) >= whole * (1 - ROUNDING)
    assert all((start[1:] >= end[:-1]).all() for start, end in zip(played.start_s, played.end_s, strict=True))
    forward, gradient = per_rank[0, 0], per_rank[1, 0]
    hops = 2 * (order.num_ranks - 1) * times.comm_s
    assert played.makespan_s >= order.num_ranks * (forward + gradient) / order.microbatch_parts + hops
    for cells in order.ranks:
        kinds = [action.kind for action in actions_of(cells)]
        assert kinds.count("F") == kinds.count("BW") + kinds.count("B")
        assert kinds.count("B") == kinds.count("W")


def test_an_order_replayed_by_hand() -> None:
    """Two ranks, two micro-batches: F 2, B 1, W 1, comm 0.5. Rank 1 begins at 2.5."""
    order = make_order(request("1f1b", 2, 2))
    played = play_order(order, RankTimes(forward_s=(2,), input_gradient_s=(1,), weight_gradient_s=(1,), comm_s=0.5))
    assert [list(row) for row in played.start_s] == [[0, 2, 7, 11], [2.5, 4.5, 6.5, 8.5]]
    assert played.makespan_s == 13
    assert played.bubble_ratio == 1 - 8 / 13
    assert played.peak_activations == (2.0, 1.0)


def test_times_may_differ_by_rank() -> None:
    order = make_order(request("gpipe", 2, 2))
    played = play_order(order, RankTimes(forward_s=(1, 3), input_gradient_s=(1,), weight_gradient_s=(0, 1)))
    assert played.busy_s == (4.0, 10.0)
    assert played.makespan_s == 1 + 10 + 1


def test_an_order_that_is_not_complete_is_shown() -> None:
    whole = make_order(request("1f1b", 2, 2))
    broken = Order(name="x", num_stages=2, num_microbatches=2, ranks=(whole.ranks[0][:-1], whole.ranks[1]))
    with pytest.raises(InputError, match="stage 0 and micro-batch 1 need F and B, or F, I and W, but there is 0F1"):
        check_order(broken)


@pytest.mark.parametrize(
    ("text", "rule", "shown"),
    [
        ("0F0,0B0,0B0\n", "every pass runs once, but 0B0 runs twice", "[0B0]"),
        ("0B0,0F0\n", "0B0 must come after 0F0", "rank 0 [0B0]  0F0"),
        ("\n , \n", "an order has at least one action", "an action is STAGE"),
        ("0F0,0W0,0I0\n", "0W0 must come after 0I0", "[0W0]"),
        ("0F0,1F0\n1B0,0B0\n", "1B0 is on rank 1 and others are on rank 0", "rank 1 [1B0]"),
        ("0F0,0B0\n1F0,0F1\n", "stage 0 and micro-batch 1 need F and B", "[0F1]"),
        ("0F0,0F1,0B0,0B1\n1F1,1B1,1F0,1B0\n1,\n", "an action is STAGE", "[1]"),
        ("0F0,0SEND_F0,0B0\n", "an order holds compute actions only", "[0SEND_F0]"),
        ("0F0,0B0\n1F1,1B1,1F0,1B0\n", "stage 0 and micro-batch 1 need F and B", "but there is nothing"),
        ("(0F0;0F1)OVERLAP_F_B\n", "an action is STAGE", "[(0F0;0F1)OVERLAP_F_B]"),
        ("0F0,0B0,,0F1,0I1\n", "need F and B, or F, I and W, but there is 0F1, 0I1", "[0F1]  [0I1]"),
        ("0F0,0I0,0W0,0B0\n", "need F and B, or F, I and W, but there is 0F0, 0I0, 0B0, 0W0", "[0B0]"),
    ],
)
def test_bad_orders_show_the_cell(text: str, rule: str, shown: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_order(text, source="bad.csv")
    assert "bad.csv" in str(caught.value)
    assert rule in str(caught.value)
    assert shown in str(caught.value)


def test_a_deadlock_shows_every_rank_that_waits() -> None:
    """Rank 0 wants 0B0 before 0F1, rank 1 wants 1F1 before 1F0: neither moves after 0F0."""
    with pytest.raises(InputError) as caught:
        parse_order("0F0,0B0,0F1,0B1\n1F1,1B1,1F0,1B0\n", source="stuck.csv")
    assert "deadlocks: rank 0 at 0B0, rank 1 at 1F1" in str(caught.value)
    assert "rank 0 0F0    [0B0]" in str(caught.value)
    assert "rank 1 [1F1]  1B1" in str(caught.value)


def test_a_pair_waits_for_both_of_its_inputs() -> None:
    """The pair's forward pass would be ready at 0, its backward pass at 2: both begin at 2 and end after the sum of their times."""
    pair = Overlap(Action(0, "F", 1), Action(0, "BW", 0))
    order = Order(
        name="pair", num_stages=1, num_microbatches=2, ranks=((Action(0, "F", 0), pair, Action(0, "BW", 1)),)
    )  # fmt: skip
    check_order(order)
    played = play_order(order, RankTimes(forward_s=(2,), input_gradient_s=(1,), weight_gradient_s=(1,)))
    assert list(played.start_s[0]) == [0, 2, 6]
    assert played.peak_activations == (2.0,)


def test_what_a_schedule_has_no_use_for_is_refused() -> None:
    with pytest.raises(InputError, match="virtual_stages == 1, but got 3"):
        make_order(OrderRequest(schedule="gpipe", num_ranks=2, num_microbatches=2, virtual_stages=3))
    with pytest.raises(InputError, match="num_ranks must be even"):
        make_order(request("chimera", 3, 6))
    with pytest.raises(InputError, match=r"num_microbatches >= 2 \* num_ranks must hold"):
        make_order(request("dualpipe-v", 4, 7))
    with pytest.raises(InputError, match=r"11 % 2 = 1.*take 8 or 12"):
        make_order(request("interleaved", 4, 11))
    with pytest.raises(UnknownNameError, match="known are gpipe"):
        make_order(request("2f2b", 4, 8))
    with pytest.raises(InputError, match="num_ranks >= 1 must hold"):
        make_order(request("1f1b", 0, 8))
    with pytest.raises(InfeasibleError, match="holds 4 M_B on a rank, memory_limit is 3"):
        make_order(OrderRequest(schedule="1f1b", num_ranks=4, num_microbatches=8, memory_limit=3))
    with pytest.raises(InfeasibleError, match="memory_limit >= 1 would do"):
        make_order(OrderRequest(schedule="zb-1p", num_ranks=4, num_microbatches=8, memory_limit=0.5))
    with pytest.raises(InfeasibleError, match="memory_limit >= 2 would do"):
        make_order(OrderRequest(schedule="v-half", num_ranks=4, num_microbatches=8, memory_limit=1.5))


@given(
    ranks=st.integers(1, 6), batches=st.integers(1, 12), limit=st.floats(1.0, 14.0), weight_share=st.sampled_from([0.0, 0.25, 0.5, 1.0]),
    times=st.lists(st.integers(1, 20), min_size=3, max_size=3), comm=st.sampled_from([0.0, 0.5, 3.0]),
)  # fmt: skip
def test_automatic_orders_run_within_their_limit(
    ranks: int, batches: int, limit: float, weight_share: float, times: list[int], comm: float
) -> None:
    forward, gradient, weight = times
    given_times = RankTimes(forward_s=(forward,), input_gradient_s=(gradient,), weight_gradient_s=(weight,), comm_s=comm)
    order = zb_auto(ranks, batches, memory_limit=limit, times=given_times, weight_share=weight_share)
    check_order(order)
    assert max(play_order(order, given_times, weight_share=weight_share).peak_activations) <= limit + 1e-9
    check_bounds(order, given_times)


@given(ranks=st.integers(1, 9), batches=st.integers(1, 20), extra=st.integers(0, 12))
def test_orders_of_a_v_run_within_their_limit(ranks: int, batches: int, extra: int) -> None:
    limit = (2 * ((ranks + 4) // 3) + extra) / 2
    order = v_limited(ranks, batches, memory_limit=limit)
    check_order(order)
    equal = RankTimes(forward_s=(2.0,), input_gradient_s=(2.0,), weight_gradient_s=(2.0,))
    assert max(play_order(order, equal, weight_share=1.0).peak_activations) <= limit


def lattice_orders(batches: int) -> list[str]:
    """All interleavings of F, B and W of the micro-batches in order."""
    words = [""]
    for _ in range(3 * batches):
        words = [
            word + kind
            for word in words
            for kind, before in (("F", ""), ("B", "F"), ("W", "B"))
            if word.count(kind) < (word.count(before) if before else batches)
        ]
    return words


@pytest.mark.parametrize(("ranks", "batches"), [(2, 2), (3, 2), (2, 3)])
@pytest.mark.parametrize("limit", [1.0, 1.5, 3.0])
@pytest.mark.parametrize("times", [(2, 2, 2, 0.0), (4, 3, 5, 0.5), (6, 2, 3, 0.0), (3, 6, 1, 0.5)])
def test_automatic_orders_are_best_where_all_can_be_tried(
    ranks: int, batches: int, limit: float, times: tuple[float, float, float, float]
) -> None:
    given_times = RankTimes(forward_s=times[:1], input_gradient_s=times[1:2], weight_gradient_s=times[2:3], comm_s=times[3])
    best = np.inf
    for words in itertools.product(lattice_orders(batches), repeat=ranks):
        rows = tuple(
            tuple(Action(rank, kind, word[:at].count(kind)) for at, kind in enumerate(word))  # type: ignore[arg-type]
            for rank, word in enumerate(words)
        )
        try:
            tried = play_order(Order(name="tried", num_stages=ranks, num_microbatches=batches, ranks=rows), given_times)
        except InputError:
            continue
        if max(tried.peak_activations) <= limit:
            best = min(best, max(tried.span_s))
    made = play_order(zb_auto(ranks, batches, memory_limit=limit, times=given_times), given_times)
    assert max(made.span_s) == pytest.approx(best)
