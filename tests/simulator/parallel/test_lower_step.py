"""Steps of equal stages through lowering and engine against closed forms; what waits for what."""

from __future__ import annotations

from dataclasses import replace

import pytest

from simulator.parallel.communication import Exposed, StageCommunication
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.parameter_gathers import Gathers
from simulator.pipeline.action import Order
from simulator.pipeline.one_way import gpipe, interleaved, looped_bfs, one_f_one_b
from simulator.pipeline.zero_bubble import zb_h1
from simulator.program import Kind, MemoryClass, Program, Stream
from tests.simulator.parallel.step_cases import (
    BACKWARD_RISE,
    BACKWARD_S,
    FORWARD_RISE,
    FORWARD_S,
    NET,
    WEIGHT_S,
    equal_cost,
    lowered,
    parts_of,
    ran,
)

BOTH_S = FORWARD_S + BACKWARD_S
SIZES = [(1, 1), (1, 5), (2, 2), (4, 4), (4, 12), (8, 3), (8, 32)]


def rise(held: float) -> float:
    """Most bytes with ``held`` micro-batches after a forward pass, the last of which has just run."""
    return max((held - 1) * NET + FORWARD_RISE, held * NET + BACKWARD_RISE)


@pytest.mark.parametrize(("ranks", "batches"), SIZES)
def test_gpipe_and_1f1b_take_their_closed_form(ranks: int, batches: int) -> None:
    for make in (gpipe, one_f_one_b):
        timeline, _ = ran(parts_of(make(ranks, batches)))
        assert timeline.makespan_s == pytest.approx((batches + ranks - 1) * BOTH_S, rel=1e-12)


@pytest.mark.parametrize(("ranks", "batches", "chunks"), [(2, 2, 2), (4, 8, 2), (4, 16, 3), (8, 16, 2)])
def test_interleaving_divides_the_bubble_by_the_chunks(ranks: int, batches: int, chunks: int) -> None:
    """Chunks are stages of their own here: m v (F + B) of work a rank and (p - 1)(F + B) of bubble, a chunk's time instead of a rank's."""
    timeline, _ = ran(parts_of(interleaved(ranks, batches, virtual_stages=chunks)))
    assert timeline.makespan_s == pytest.approx((batches * chunks + ranks - 1) * BOTH_S, rel=1e-12)


@pytest.mark.parametrize(("ranks", "batches"), [(2, 2), (4, 4), (4, 12), (8, 16)])
def test_zb_h1_has_the_bubble_of_its_paper(ranks: int, batches: int) -> None:
    """(p - 1)(T_F + T_B - T_W), T_B the input's gradient (arXiv 2401.10241, table 2)."""
    bubble_s = (ranks - 1) * (FORWARD_S + (BACKWARD_S - WEIGHT_S) - WEIGHT_S)
    timeline, _ = ran(parts_of(zb_h1(ranks, batches)))
    assert timeline.makespan_s == pytest.approx(batches * BOTH_S + bubble_s, rel=1e-12)


@pytest.mark.parametrize(("ranks", "batches"), SIZES)
def test_peaks_are_micro_batches_in_flight(ranks: int, batches: int) -> None:
    _, profiles = ran(parts_of(one_f_one_b(ranks, batches)))
    assert [profile.peak_bytes for profile in profiles] == [rise(min(batches, ranks - rank)) for rank in range(ranks)]
    _, profiles = ran(parts_of(gpipe(ranks, batches)))
    assert {profile.peak_bytes for profile in profiles} == {rise(batches)}


def test_peaks_of_interleaved_chunks() -> None:
    """Rank r holds v p + p - 1 - 2 r chunks' micro-batches."""
    ranks, chunks = 4, 3
    _, profiles = ran(parts_of(interleaved(ranks, 16, virtual_stages=chunks)))
    held = [chunks * ranks + ranks - 1 - 2 * rank for rank in range(ranks)]
    assert [profile.peak_bytes for profile in profiles] == [rise(one) for one in held]


@pytest.mark.parametrize("weight_share", [0.0, 0.3, 0.5, 1.0])
@pytest.mark.parametrize(
    "order",
    [gpipe(4, 6), one_f_one_b(4, 6), zb_h1(4, 6), interleaved(4, 8, virtual_stages=2), looped_bfs(2, 4, virtual_stages=2)],
)
def test_memory_returns_to_what_lived_before(order: Order, weight_share: float) -> None:
    _, profiles = ran(parts_of(order, weight_share=weight_share))
    for profile in profiles:
        assert profile.alive_bytes[-1].tolist() == profile.alive_bytes[0].tolist()
        assert (profile.alive_bytes >= 0).all()


def test_the_weight_share_stays_until_the_weights_gradient() -> None:
    """One rank: the input's gradient frees 1 - x of a micro-batch, the weights' one x."""
    _, (profile,) = ran(parts_of(zb_h1(1, 1), weight_share=0.3))
    levels = set(profile.alive_bytes[:, MemoryClass.ACTIVATIONS].tolist())
    assert levels == {0, NET, round(0.3 * NET)}


def test_a_message_takes_its_bytes_over_the_link_after_its_latency() -> None:
    """Two ranks and one micro-batch: F, message, F, B, message, B."""
    communication = [StageCommunication(forward=Exposed(), backward=Exposed(), message_bytes=100.0)] * 2
    timeline, _ = ran(parts_of(one_f_one_b(2, 1), communication=communication, rate=50.0, latency_s=0.25))
    assert timeline.makespan_s == pytest.approx(2 * (BOTH_S + 0.25 + 2.0), rel=1e-12)


def test_bytes_sent_are_boundaries_times_messages() -> None:
    """A forward message carries its sender's boundary, a backward one that of the stage before."""
    sizes = [10.0, 20.0, 40.0, 0.0]
    communication = [StageCommunication(forward=Exposed(), backward=Exposed(), message_bytes=size) for size in sizes]
    program = lowered(parts_of(one_f_one_b(4, 5), communication=communication))
    assert program.transfers.size_bytes.sum() == 5 * 2 * (10 + 20 + 40)
    routes = program.transfers.routes.reshape(-1, 2)
    assert {(int(out) // 2, int(into) // 2) for out, into in routes} == {(0, 1), (1, 2), (2, 3), (1, 0), (2, 1), (3, 2)}
    assert all(out % 2 == 0 and into % 2 == 1 for out, into in routes.tolist())


def test_a_rank_that_waits_for_its_messages_is_later() -> None:
    """GPipe of two ranks and two micro-batches, messages of t < F: rank 0 sends between its passes, rank 1 between its backward passes.

    Without waiting: F t 2F 2B t B. Waiting: the second forward pass starts t later, but rank 1 is busy until then plus F - t, so the
    forward half ends as late (t < F); the second backward pass of rank 1 starts t later.
    """
    communication = [StageCommunication(forward=Exposed(), backward=Exposed(), message_bytes=1.0)] * 2
    times = {
        waits: ran(parts_of(gpipe(2, 2), communication=communication, rate=1.0, waits=waits))[0].makespan_s for waits in (False, True)
    }  # fmt: skip
    free_s = FORWARD_S + 1.0 + 2 * FORWARD_S + 2 * BACKWARD_S + 1.0 + BACKWARD_S
    assert times[False] == pytest.approx(free_s, rel=1e-12)
    assert times[True] == pytest.approx(free_s + 2.0, rel=1e-12)


def test_collectives_of_a_pass_are_waited_for() -> None:
    """Each forward pass 1 + 2 + 3 s, each backward pass 4 s more."""
    own = StageCommunication(forward=Exposed(tp_s=1.0, cp_s=2.0, ep_s=3.0), backward=Exposed(tp_s=4.0), message_bytes=1.0)
    timeline, _ = ran(parts_of(one_f_one_b(3, 4), communication=[own] * 3))
    assert timeline.makespan_s == pytest.approx((4 + 3 - 1) * (BOTH_S + 10.0), rel=1e-12)


def test_gradients_hide_behind_the_last_backward_pass() -> None:
    """4 buckets of 1 s behind the 7 s of the last backward pass: the last bucket goes when the pass is over, then the optimizer's 5 s."""
    sync = [GradientSync(chunks=4, reduce_s=4.0, gather_s=0.0)]
    timeline, _ = ran(parts_of(one_f_one_b(1, 3), sync=sync, optimizer_s=5.0))
    assert timeline.makespan_s == pytest.approx(3 * BOTH_S + 1.0 + 5.0, rel=1e-12)
    sync = [GradientSync(chunks=1, reduce_s=4.0, gather_s=0.0)]
    timeline, _ = ran(parts_of(one_f_one_b(1, 3), sync=sync, optimizer_s=5.0))
    assert timeline.makespan_s == pytest.approx(3 * BOTH_S + 4.0 + 5.0, rel=1e-12)


def test_the_table_of_both_ends_is_added_up_before_the_gradients_come() -> None:
    """A pass that ends with 0.5 s of adding up: buckets and the weights' gradient are still parts of the 7 s of its backward kernels."""
    cost = equal_cost()
    tied = replace(cost, backward=replace(cost.backward, seconds=((Kind.BACKWARD, BACKWARD_S), (Kind.REDUCE, 0.5))))
    parts = parts_of(one_f_one_b(1, 3), sync=[GradientSync(chunks=4, reduce_s=4.0, gather_s=0.0)])
    assert ran(replace(parts, costs=[tied]))[0].makespan_s == pytest.approx(3 * (BOTH_S + 0.5) + 1.0, rel=1e-12)
    split = replace(parts_of(zb_h1(1, 3)), costs=[tied])
    assert ran(split)[0].makespan_s == pytest.approx(3 * (BOTH_S + 0.5), rel=1e-12)


def test_gradients_that_do_not_overlap_go_when_the_last_pass_is_over() -> None:
    """Both chunks of rank 0, which ends last: 4 s each behind everything; overlapping, the second chunk's went during the first one's passes."""
    order = interleaved(2, 4, virtual_stages=2)
    alone_s = (4 * 2 + 1) * BOTH_S
    behind = GradientSync(chunks=1, reduce_s=4.0, gather_s=0.0, reduce_overlaps=False)
    assert ran(parts_of(order, sync=[behind] * 4))[0].makespan_s == pytest.approx(alone_s + 8.0, rel=1e-12)
    assert ran(parts_of(order, sync=[replace(behind, reduce_overlaps=True)] * 4))[0].makespan_s == pytest.approx(
        alone_s + 4.0, rel=1e-12
    )


def test_slow_gradients_queue_up() -> None:
    """4 buckets of 10 s: the first goes after 7/4 s of the last pass, the others one by one."""
    sync = [GradientSync(chunks=4, reduce_s=40.0, gather_s=0.0)]
    timeline, _ = ran(parts_of(one_f_one_b(1, 2), sync=sync))
    assert timeline.makespan_s == pytest.approx(2 * BOTH_S - BACKWARD_S * 3 / 4 + 40.0, rel=1e-12)


def test_updated_parameters_are_gathered_behind_the_first_pass_or_at_the_end() -> None:
    """Of 4 s in 4 parts: the first part is waited for, the rest takes the forward pass's 3 s; not overlapping, all 4 s follow the step."""
    behind = [GradientSync(chunks=4, reduce_s=0.0, gather_s=4.0, gather_overlaps=True)]
    timeline, _ = ran(parts_of(one_f_one_b(1, 2), sync=behind))
    assert timeline.makespan_s == pytest.approx(2 * BOTH_S + 1.0, rel=1e-12)
    after = [GradientSync(chunks=4, reduce_s=0.0, gather_s=4.0)]
    timeline, _ = ran(parts_of(one_f_one_b(1, 2), sync=after))
    assert timeline.makespan_s == pytest.approx(2 * BOTH_S + 4.0, rel=1e-12)


def test_zero_3_gathers_for_every_pass_and_scatters_after_each_backward() -> None:
    sync = [
        GradientSync(
            chunks=1,
            reduce_s=0.5,
            gather_s=0.0,
            forward_gathers=Gathers(first_s=0.25, rest_s=1.0),
            backward_gathers=Gathers(first_s=0.25, rest_s=1.0),
            every_micro_batch=True,
        )
    ]
    program = lowered(parts_of(one_f_one_b(1, 3), sync=sync))
    labels = [label for label, stream in zip(program.option, program.stream, strict=True) if stream == Stream.DP and label]
    assert labels.count("gather") == 2 * 3 * 2
    assert labels.count("reduce") == 3


def test_a_slow_gather_ends_the_pass() -> None:
    """One pass forward and back; each waits 1 s, then 20 s of gathering beside its compute end it."""
    sync = [
        GradientSync(
            chunks=1,
            reduce_s=0.0,
            gather_s=0.0,
            forward_gathers=Gathers(first_s=1.0, rest_s=20.0),
            backward_gathers=Gathers(first_s=1.0, rest_s=20.0),
            every_micro_batch=True,
        )
    ]
    timeline, _ = ran(parts_of(one_f_one_b(1, 1), sync=sync))
    assert timeline.makespan_s == pytest.approx(21.0 + 21.0, rel=1e-12)


def test_the_tied_table_is_reduced_by_both_ends_together() -> None:
    """The last rank is done with its backward passes first, and waits for the first rank with its part of the all-reduce."""
    program = lowered(parts_of(one_f_one_b(3, 4), tied_s=2.0, optimizer_s=1.0))
    timeline, _ = ran(parts_of(one_f_one_b(3, 4), tied_s=2.0, optimizer_s=1.0))
    spans = [span for span in timeline.spans if "tied" in span.name]
    assert [span.device for span in spans] == [0, 2]
    assert {span.start_s for span in spans} == {(4 + 3 - 1) * BOTH_S}
    assert timeline.makespan_s == pytest.approx((4 + 3 - 1) * BOTH_S + 2.0 + 1.0, rel=1e-12)
    assert num_optimizers(program) == 3


def num_optimizers(program: Program) -> int:
    return sum(program.label(n).startswith("step") for n in range(program.num_instructions))


def test_every_action_is_one_pass() -> None:
    """One compute instruction for each action and one optimizer step a rank."""
    for order in (gpipe(3, 4), one_f_one_b(3, 4), interleaved(3, 6, virtual_stages=2), zb_h1(3, 4)):
        program = lowered(parts_of(order))
        assert (program.stream == Stream.COMPUTE).sum() == sum(map(len, order.ranks)) + order.num_ranks
