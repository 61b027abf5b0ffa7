"""The fit of gridded curves: a known law is recovered, disturbed timings bend little, errors are those of unseen shapes."""

from __future__ import annotations

from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from hardware_models.gridded import GriddedCurve
from hardware_models.gridded_fit import (
    ATTENTION_PRIORS,
    FREEDOM,
    PRODUCT_PRIORS,
    Component,
    covariance_of,
    cross_validated,
    features,
    fit_gridded,
    robust_weights,
)
from hardware_models.physical_law import Floats, PhysicalLaw, Sizes, coordinates, law_seconds

LAW = PhysicalLaw(
    flops_per_s=1e14, bandwidth_bytes_per_s=1e12, launch_s=2e-6, num_multiprocessors=100, operand_bytes=2.0, result_bytes=2.0
)
PRODUCTS = np.array(list(product((1, 16, 256, 1024, 4096), (1024, 4096, 8192), (1024, 2048, 8192))), dtype=np.int64)
PREFILLS = np.array(
    [(batch, 8, kv, length, length, 128, 1) for batch, kv, length in product((1, 4, 16), (1, 2, 8), (512, 1024, 4096))],
    dtype=np.int64,
)


def fitted(shapes: NDArray[np.int64], seconds: Floats, sizes: Sizes = "product") -> GriddedCurve:
    kernel_class, group = ("gemm", "mm") if sizes == "product" else ("attention", "attention")
    return fit_gridded(
        shapes,
        seconds,
        kernel_class=kernel_class,
        group=group,
        dtype="bfloat16",
        stack="test",
        sizes=sizes,
        law=LAW,
        source="test",
    )


def smooth_ratio(shapes: NDArray[np.int64], sizes: Sizes = "product") -> Floats:
    """A factor over the law that rises with the first axis and falls with the last: 0.8 to 1.5."""
    at = coordinates(sizes, shapes)
    return np.asarray(np.exp(0.03 * at[:, 0] - 0.02 * at[:, 2] + 0.1), dtype=np.float64)


def test_the_law_itself_is_recovered() -> None:
    seconds = law_seconds("product", PRODUCTS, LAW)
    curve = fitted(PRODUCTS, seconds)
    assert curve.seconds(PRODUCTS) == pytest.approx(seconds, rel=1e-6)
    assert curve.log_ratios == pytest.approx(np.zeros_like(curve.log_ratios), abs=1e-6)
    assert curve.p99_error < 1e-6


def test_a_constant_factor_is_recovered_beyond_the_grid_too() -> None:
    far = np.array([(100_000, 4096, 4096), (4096, 100_000, 4096), (4096, 4096, 100_000)], dtype=np.int64)
    curve = fitted(PRODUCTS, 1.3 * law_seconds("product", PRODUCTS, LAW))
    assert curve.seconds(far) == pytest.approx(1.3 * law_seconds("product", far, LAW), rel=1e-3)


@pytest.mark.parametrize(("sizes", "shapes"), [("product", PRODUCTS), ("attention", PREFILLS)])
def test_a_smooth_factor_is_recovered(sizes: Sizes, shapes: NDArray[np.int64]) -> None:
    seconds = law_seconds(sizes, shapes, LAW) * smooth_ratio(shapes, sizes)
    curve = fitted(shapes, seconds, sizes)
    assert np.abs(curve.seconds(shapes) / seconds - 1.0).max() < 0.02
    assert curve.median_error < 0.03


def test_shapes_that_were_not_timed_are_predicted() -> None:
    seconds = law_seconds("product", PRODUCTS, LAW) * smooth_ratio(PRODUCTS)
    held = np.arange(len(PRODUCTS)) % 4 == 1
    curve = fitted(PRODUCTS[~held], seconds[~held])
    errors = np.abs(curve.seconds(PRODUCTS[held]) / seconds[held] - 1.0)
    assert np.median(errors) < 0.02
    assert errors.max() < 0.06


def test_stated_errors_are_those_of_shapes_left_out() -> None:
    noise = np.random.default_rng(2).normal(0.0, 0.1, len(PRODUCTS))
    curve = fitted(PRODUCTS, law_seconds("product", PRODUCTS, LAW) * np.exp(noise))
    # unseen noise of 10% cannot be predicted: the median of a normal magnitude is 0.67 deviations
    assert 0.05 < curve.median_error < 0.12
    assert curve.median_error < curve.p90_error < curve.p99_error
    assert 0.08 < curve.relative_standard_error < 0.16


@pytest.mark.parametrize("factor", [10.0, 0.1])
@pytest.mark.parametrize("place", [0, 22, 44])
def test_one_disturbed_timing_moves_no_node_by_more_than_five_percent(factor: float, place: int) -> None:
    clean_s = law_seconds("product", PRODUCTS, LAW) * smooth_ratio(PRODUCTS)
    disturbed_s = clean_s.copy()
    disturbed_s[place] *= factor
    moved = np.expm1(np.abs(fitted(PRODUCTS, disturbed_s).log_ratios - fitted(PRODUCTS, clean_s).log_ratios))
    assert moved.max() < 0.05


def test_axes_are_the_sizes_that_occur() -> None:
    curve = fitted(PRODUCTS, law_seconds("product", PRODUCTS, LAW))
    assert curve.axes == ((1.0, 16.0, 256.0, 1024.0, 4096.0), (1024.0, 4096.0, 8192.0), (1024.0, 2048.0, 8192.0))
    assert curve.log_ratios.shape == (5, 3, 3)
    assert curve.num_points == len(PRODUCTS)
    assert curve.evidence == "published"


def test_fit_is_the_same_each_time() -> None:
    seconds = law_seconds("product", PRODUCTS, LAW) * smooth_ratio(PRODUCTS)
    assert fitted(PRODUCTS, seconds) == fitted(PRODUCTS, seconds)


def test_order_of_the_timings_does_not_matter_much() -> None:
    seconds = law_seconds("product", PRODUCTS, LAW) * smooth_ratio(PRODUCTS)
    order = np.random.default_rng(4).permutation(len(PRODUCTS))
    shuffled, straight = fitted(PRODUCTS[order], seconds[order]), fitted(PRODUCTS, seconds)
    assert shuffled.log_ratios == pytest.approx(straight.log_ratios, abs=0.02)


def test_covariance_of_one_component_by_hand() -> None:
    prior = (Component(deviation=0.5, features=(0,), scales=(2.0,)),)
    a, b = np.array([[0.0], [1.0]]), np.array([[2.0]])
    far, near = np.sqrt(3.0), np.sqrt(3.0) / 2
    expected = [[0.25 * (1 + far) * np.exp(-far)], [0.25 * (1 + near) * np.exp(-near)]]
    assert covariance_of(prior, a, b) == pytest.approx(np.array(expected))


@pytest.mark.parametrize(
    ("sizes", "shapes", "priors"), [("product", PRODUCTS, PRODUCT_PRIORS), ("attention", PREFILLS, ATTENTION_PRIORS)]
)
def test_covariances_are_symmetric_and_positive(
    sizes: Sizes, shapes: NDArray[np.int64], priors: tuple[tuple[Component, ...], ...]
) -> None:
    at = features(sizes, coordinates(sizes, shapes), LAW.num_multiprocessors)
    for prior in priors:
        gram = covariance_of(prior, at, at)
        assert gram == pytest.approx(gram.T)
        assert np.linalg.eigvalsh(gram).min() > -1e-9
        assert np.diag(gram) == pytest.approx(sum(component.deviation**2 for component in prior))


def test_robust_weights_give_a_disturbed_point_up() -> None:
    at = np.linspace(0.0, 4.0, 30)[:, None]
    prior = (Component(deviation=0.3, features=(0,), scales=(4.0,)),)
    gram = covariance_of(prior, at, at)
    residuals = 0.1 * np.sin(at[:, 0])
    residuals[15] += np.log(10.0)
    solution, centre = robust_weights(gram, residuals, 0.03)
    mean = gram @ solution + centre
    assert np.abs(np.delete(mean - 0.1 * np.sin(at[:, 0]), 15)).max() < 0.02
    assert abs(mean[15] - 0.1 * np.sin(at[15, 0])) < 0.02
    assert FREEDOM > 2  # the noise has a variance


def test_cross_validation_predicts_each_from_the_others() -> None:
    at = np.linspace(0.0, 4.0, 20)[:, None]
    gram = covariance_of((Component(deviation=0.3, features=(0,), scales=(4.0,)),), at, at)
    residuals = np.zeros(20)
    residuals[7] = 1.0
    errors = cross_validated(gram, residuals, 0.03, seed=0)
    assert errors[7] == pytest.approx(-1.0, abs=0.02)  # nothing of itself leaks into its prediction
    assert np.abs(np.delete(errors, 7)).max() < 0.05


def test_idle_slots_of_the_last_wave_by_hand() -> None:
    # 128 x 128 tiles on 100 multiprocessors: 10 x 10 fill one wave, 101 x 1 leave 99 of 200 idle
    at = np.log2(np.array([[1280.0, 1280.0, 64.0], [101 * 128.0, 128.0, 64.0]]))
    found = features("product", at, 100)
    assert found[0, 3] == 0.0
    assert found[1, 3] == pytest.approx(np.log2(200 / 101))


def test_kinds_of_head_sharing() -> None:
    at = np.array([[0.0, 9.0, 0.0], [0.0, 9.0, 2.0], [0.0, 9.0, 6.0]])
    assert features("attention", at, 100)[:, 3].tolist() == [0.0, 1.0, 2.0]
