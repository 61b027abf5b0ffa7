"""Bounds by arithmetic: a value by hand, never above those that rest on prices, and what is priced where there is no time."""

from __future__ import annotations

import time
from dataclasses import replace

import numpy as np
import pytest

from hardware_models.best_rates import best_rate_seconds
from search.joint.bounded_space import FirstBounds
from search.joint.crude_bounds import CrudeBounds
from search.joint.layer_tables import LayerTables
from search.joint.space import JointRequest, JointSpace, joint_space
from tests.search.joint.joint_cases import device_of, small_request

GPT = small_request(layers=2, gpus=8, batch=8)
MIXTURE = small_request(layers=2, gpus=4, batch=8, model="mixtral-8x7b")
MEGATRON = small_request(layers=2, gpus=8, batch=8, trainer="megatron", model="mixtral-8x7b")


def few_points(request: JointRequest, count: int) -> JointSpace:
    """A space with some of its points, evenly spread."""
    space = joint_space(request)
    return replace(space, points=space.points.take(np.unique(np.linspace(0, len(space) - 1, count).astype(np.int64))))


def tables_of(request: JointRequest) -> LayerTables:
    return LayerTables(request, device_of(request))


@pytest.mark.parametrize("request_", [GPT, MIXTURE, MEGATRON], ids=["gpt2", "mixtral", "mixtral, megatron"])
def test_arithmetic_is_never_above_prices(request_: JointRequest) -> None:
    space, tables = few_points(request_, 8), tables_of(request_)
    crude = CrudeBounds(space, tables)
    alone, together = crude.alone(), crude.with_collectives(np.inf)
    priced = FirstBounds(space, device_of(request_), tables).price(np.inf).bound_s
    assert (alone > 0.0).all()
    assert (alone <= together).all()
    assert (alone < together).any()
    assert (together <= priced).all()


def test_products_at_the_best_rate_fill_a_pipeline() -> None:
    space, tables = few_points(GPT, 200), tables_of(GPT)
    blocks = tables.model(space.plan(0)).workload.blocks  # the first point splits nothing
    passes = [run for block in blocks for run in (block.options[0].forward, block.options[0].backward_accumulate)]
    sample_s = float(best_rate_seconds([kernel for run in passes for kernel in run.kernels], device_of(GPT)).sum())
    points, alone = space.points, CrudeBounds(space, tables).alone()
    assert points.row(0)["tp"] * points.row(0)["cp"] * points.row(0)["micro_batch"] == 1
    whole_s = sample_s * points.micro_batch / (points.tp * points.cp)
    one = points.pp == 1
    np.testing.assert_allclose(alone[one], (whole_s * points.num_microbatches)[one], rtol=1e-6)
    two = (
        (points.pp == 2)
        & (points.virtual_stages == 1)
        & np.array([name in {"1f1b", "gpipe"} for name in space.schedules])[points.schedule]
    )
    assert two.any()
    # stages of x and y: m x = T and x + m y = T, so that x + y = T (2 m - 1) / m^2
    m = points.num_microbatches[two].astype(float)
    np.testing.assert_allclose(alone[two], whole_s[two] * m**2 / (2.0 * m - 1.0), rtol=1e-6)


def test_only_what_may_beat_a_known_plan_is_priced_and_what_is_left_keeps_its_arithmetic() -> None:
    space, device, tables = few_points(GPT, 8), device_of(GPT), tables_of(GPT)
    alone = CrudeBounds(space, tables).with_collectives(np.inf)
    whole = FirstBounds(space, device, tables).price(np.inf).bound_s
    most_s = float(np.quantile(alone, 0.7))
    some = FirstBounds(space, device, tables)
    found = some.price(most_s).bound_s
    assert (some.priced == (alone < most_s)).all()
    assert 0 < some.priced.sum() < len(space)
    np.testing.assert_allclose(found[some.priced], np.minimum(whole, most_s)[some.priced], rtol=1e-5)
    assert (found[~some.priced] >= most_s).all()
    late = FirstBounds(space, device, tables_of(GPT))
    np.testing.assert_array_equal(late.price(np.inf, end=time.monotonic() - 1.0).bound_s, alone)
    assert not late.priced.any()
