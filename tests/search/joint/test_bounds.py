"""Time bounds: values by hand, limits, monotony, and never above a simulated step."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from search.joint.bounds import PipelineShape, time_bound
from search.joint.layer_tables import LayerTable


def table(forward_s: list[float], *, backward: float = 2.0, weight: float = 1.0) -> LayerTable:
    """Backward passes, and their weights' part, are multiples of the forward ones; each piece has as many parameters as seconds."""
    sums = np.concatenate([[0.0], np.cumsum(forward_s)])
    return LayerTable(forward_s=sums, backward_s=backward * sums, weight_s=weight * sums, elements=sums, message_bytes=0.0)


def shape(schedule: str, ranks: int, count: int, chunks: int = 1) -> PipelineShape:
    return PipelineShape(schedule=schedule, num_ranks=ranks, chunks=chunks, num_microbatches=count)


def test_equal_stages_give_the_time_of_1f1b() -> None:
    # two ranks of 1 s forward and 2 s backward, four micro-batches: (4 + 2 - 1) * 3 s
    found = time_bound(table([1.0, 1.0]), shape("1f1b", 2, 4), message_s=0.0, update_s=0.0)
    assert found == pytest.approx(15.0, rel=1e-9)


def test_split_passes_need_no_way_back_for_weights() -> None:
    # rank 1 starts after 1 s, is busy 4 * 3 s, and may end with weights' gradients; the way back of 1 s hides behind its 4 s of them
    assert time_bound(table([1.0, 1.0]), shape("zb-h1", 2, 4), message_s=0.0, update_s=0.0) == pytest.approx(13.0, rel=1e-9)


def test_unequal_layers_are_cut_at_their_best() -> None:
    # 1 + 1 | 2: stages of 2 s each; any other cut has one of 3 s
    assert time_bound(table([1.0, 1.0, 2.0]), shape("1f1b", 2, 1), message_s=0.0, update_s=0.0) == pytest.approx(12.0, rel=1e-9)


def test_the_optimizer_and_messages_count() -> None:
    alone = time_bound(table([1.0, 1.0]), shape("1f1b", 1, 4), message_s=0.0, update_s=0.5)
    assert alone == pytest.approx(4 * 6.0 + 0.5 * 2.0, rel=1e-9)
    # rank 1: starts after 1.25 s, is busy 4 * 3 s, and its gradient takes 2.25 s back
    assert time_bound(table([1.0, 1.0]), shape("1f1b", 2, 4), message_s=0.25, update_s=0.0) == pytest.approx(15.5, rel=1e-9)


def test_many_chunks_take_the_mean_over_ranks() -> None:
    assert time_bound(table([1.0] * 4), shape("interleaved", 2, 8, chunks=2), message_s=0.0, update_s=0.0) == pytest.approx(
        48.0
    )


@given(
    times=st.lists(st.floats(0.1, 10.0), min_size=4, max_size=12), ranks=st.integers(1, 4), count=st.integers(1, 16), more=st.floats(0.0, 3.0),
    schedule=st.sampled_from(["1f1b", "zb-h1", "gpipe"]),
)  # fmt: skip
def test_longer_layers_and_more_micro_batches_never_lower_a_bound(
    times: list[float], ranks: int, count: int, more: float, schedule: str
) -> None:
    own = time_bound(table(times), shape(schedule, ranks, count), message_s=0.0, update_s=0.0)
    longer = time_bound(table([times[0] + more, *times[1:]]), shape(schedule, ranks, count), message_s=0.0, update_s=0.0)
    after = time_bound(table(times), shape(schedule, ranks, count + 1), message_s=0.0, update_s=0.0)
    assert longer >= own * (1 - 1e-9)
    assert after >= own * (1 - 1e-9)
