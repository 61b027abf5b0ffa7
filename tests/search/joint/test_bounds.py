"""Time bounds: values by hand, limits, monotony, and never above a simulated step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.joint.bounds import NO_LIMITS, HeldBytes, PipelineShape, time_bound
from search.joint.layer_tables import LayerTable


def table(forward_s: list[float], *, backward: float = 2.0, weight: float = 1.0) -> LayerTable:
    """Backward passes, and their weights' part, are multiples of the forward ones; each piece has as many parameters as seconds."""
    sums = np.concatenate([[0.0], np.cumsum(forward_s)])
    none = np.zeros(len(sums))
    return LayerTable(
        forward_s=sums, backward_s=backward * sums, weight_s=weight * sums, compute_s=(1.0 + backward) * sums, back_compute_s=backward * sums, elements=sums,
        dense_elements=sums, moved_elements=sums, kept_bytes=sums, cheap_bytes=none, cheap_s=0.0, dear_s=0.1, message_bytes=0.0,
    )  # fmt: skip


def shape(schedule: str, ranks: int, count: int, chunks: int = 1) -> PipelineShape:
    return PipelineShape(schedule=schedule, num_ranks=ranks, chunks=chunks, num_microbatches=count)


def test_equal_stages_give_the_time_of_1f1b() -> None:
    # two ranks of 1 s forward and 2 s backward, four micro-batches: (4 + 2 - 1) * 3 s
    found = time_bound(table([1.0, 1.0]), shape("1f1b", 2, 4), message_s=0.0)
    assert found == pytest.approx(15.0, rel=1e-9)


def test_split_passes_need_no_way_back_for_weights() -> None:
    # rank 1 starts after 1 s, is busy 4 * 3 s, and may end with weights' gradients; the way back of 1 s hides behind its 4 s of them
    assert time_bound(table([1.0, 1.0]), shape("zb-h1", 2, 4), message_s=0.0) == pytest.approx(13.0, rel=1e-9)


def test_unequal_layers_are_cut_at_their_best() -> None:
    # 1 + 1 | 2: stages of 2 s each; any other cut has one of 3 s
    assert time_bound(table([1.0, 1.0, 2.0]), shape("1f1b", 2, 1), message_s=0.0) == pytest.approx(12.0, rel=1e-9)


def test_the_optimizer_and_messages_count() -> None:
    limits = NO_LIMITS._replace(update_s=0.25)
    alone = time_bound(table([1.0, 1.0]), shape("1f1b", 1, 4), held=HeldBytes(states=2.0), limits=limits)
    assert alone == pytest.approx(4 * 6.0 + 0.5 * 2.0, rel=1e-9)
    # rank 1: starts after 1.25 s, is busy 4 * 3 s, and its gradient takes 2.25 s back
    assert time_bound(table([1.0, 1.0]), shape("1f1b", 2, 4), message_s=0.25) == pytest.approx(15.5, rel=1e-9)


def test_what_does_not_fit_is_made_again_or_leaves() -> None:
    # one rank holds four of four micro-batches of 2 bytes each: with room for 4 bytes, each makes one again at 0.1 s: 4 * (6 + 0.1) s
    own, order = table([1.0, 1.0]), shape("gpipe", 1, 4)
    tight = NO_LIMITS._replace(room_bytes=4.0, recomputes=True)
    assert time_bound(own, order, limits=tight) == pytest.approx(4 * 6.1, rel=1e-6)
    # over a link of 1 byte/s all of it leaves within the step; over one of 1/6.1 byte/s that takes as long as what is made again
    assert time_bound(own, order, limits=tight._replace(activations_leave=True, activation_bytes_per_s=1.0)) == pytest.approx(
        24.0, rel=1e-6
    )
    slow = tight._replace(activations_leave=True, recomputes=False, activation_bytes_per_s=4.0 / 30.0)
    assert time_bound(own, order, limits=slow) == pytest.approx(30.0, rel=1e-6)


def test_model_states_that_do_not_fit_have_no_bound() -> None:
    found = time_bound(
        table([1.0, 1.0]),
        shape("1f1b", 2, 4),
        held=HeldBytes(gradients=3.0),
        limits=NO_LIMITS._replace(room_bytes=2.0),
        most_s=99.0,
    )
    assert found == 99.0


def test_collectives_of_sharded_parameters_slow_compute_down() -> None:
    # 4 micro-batches: 24 s of compute, 8 s of collectives beside it, each second of which costs compute 0.25 s; 100 s of them are the bound themselves
    limits = NO_LIMITS._replace(slow_compute=0.25, slow_collectives=0.5)
    own, order = table([1.0, 1.0]), shape("1f1b", 1, 4)
    assert time_bound(own, order, limits=limits, sharded_s=np.array([0.0, 1.0, 2.0])) == pytest.approx(26.0, rel=1e-6)
    assert time_bound(own, order, limits=limits, sharded_s=np.array([0.0, 10.0, 25.0]), most_s=999.0) == pytest.approx(
        112.0, rel=1e-6
    )


def test_many_chunks_take_the_mean_over_ranks_and_wait_for_the_stages_before() -> None:
    # the embedding and the head take no time here; rank 1 begins after one layer, 1 s, computes 8 * 2 * 3 s, and its gradient takes 2 s back
    found = time_bound(table([0.0, 1.0, 1.0, 1.0, 1.0, 0.0]), shape("interleaved", 2, 8, chunks=2))
    assert found == pytest.approx(51.0)


def test_the_rank_with_the_head_has_a_layer_for_each_of_its_stages() -> None:
    # two layers and a head of 2 s forward: 8 * 3 * (2 + 2) s of passes behind one layer's way there and back
    assert time_bound(table([0.0, 1.0, 1.0, 1.0, 1.0, 2.0]), shape("interleaved", 2, 8, chunks=2)) == pytest.approx(99.0)


@given(
    times=st.lists(st.floats(0.1, 10.0), min_size=4, max_size=12), ranks=st.integers(1, 4), count=st.integers(1, 16), more=st.floats(0.0, 3.0),
    schedule=st.sampled_from(["1f1b", "zb-h1", "gpipe"]),
)  # fmt: skip
def test_longer_layers_and_more_micro_batches_never_lower_a_bound(
    times: list[float], ranks: int, count: int, more: float, schedule: str
) -> None:
    own = time_bound(table(times), shape(schedule, ranks, count), message_s=0.0)
    longer = time_bound(table([times[0] + more, *times[1:]]), shape(schedule, ranks, count), message_s=0.0)
    after = time_bound(table(times), shape(schedule, ranks, count + 1), message_s=0.0)
    assert longer >= own * (1 - 1e-9)
    assert after >= own * (1 - 1e-9)
