"""Prices on a grid: nodes, between them, at the edge and far outside it."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware_models.catalogue import catalogue_names, load_hardware
from hardware_models.gridded import GriddedCurve
from hardware_models.physical_law import PhysicalLaw, law_seconds, quantization

LAW = PhysicalLaw(
    flops_per_s=1e14, bandwidth_bytes_per_s=1e12, launch_s=2e-6, num_multiprocessors=100, operand_bytes=2.0, result_bytes=2.0
)
AXES = ((64.0, 256.0, 1024.0), (1024.0, 4096.0), (512.0, 1024.0, 2048.0))
CURVE = GriddedCurve(
    kernel_class="gemm", group="mm", dtype="bfloat16", stack="test", evidence="published", source="test", sizes="product", axes=AXES,
    log_ratios=np.random.default_rng(0).normal(0.2, 0.3, (3, 2, 3)), law=LAW, relative_standard_error=0.05, median_error=0.02, p90_error=0.08,
    p99_error=0.2, num_points=18,
)  # fmt: skip
FLAT = replace(CURVE, log_ratios=np.zeros((3, 2, 3)))
TRAINING_GPUS = ("a100-sxm-80gb", "h100-sxm", "h200-sxm", "b200")
size = st.integers(1, 150_000)


def integers(*rows: tuple[int, ...]) -> NDArray[np.int64]:
    return np.array(rows, dtype=np.int64)


def nodes_of(curve: GriddedCurve) -> NDArray[np.int64]:
    return np.stack([part.ravel() for part in np.meshgrid(*curve.axes, indexing="ij")], axis=1).astype(np.int64)


def product_curve(device: str, dtype: str = "bfloat16") -> GriddedCurve:
    return next(grid for grid in load_hardware(device).grids if (grid.group, grid.dtype) == ("mm", dtype))


def test_nodes_are_reproduced_exactly() -> None:
    shapes = nodes_of(CURVE)
    expected = law_seconds("product", shapes, LAW) * np.exp(CURVE.log_ratios.ravel())
    assert CURVE.seconds(shapes) == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("device", TRAINING_GPUS)
def test_nodes_of_the_catalogue_are_reproduced_exactly(device: str) -> None:
    curve = product_curve(device)
    shapes = nodes_of(curve)
    expected = law_seconds("product", shapes, curve.law) * np.exp(curve.log_ratios.ravel())
    assert curve.seconds(shapes) == pytest.approx(expected, rel=1e-12)


def test_middle_between_nodes_is_the_mean_of_the_eight_logarithms() -> None:
    shape = integers((128, 2048, 1448))  # log2: 7 of 6..8, 11 of 10..12, 10.5 of 10..11
    corners = CURVE.log_ratios[:2, :, 1:3].ravel()
    expected = law_seconds("product", shape, LAW)[0] * np.exp(corners.mean())
    assert CURVE.seconds(shape)[0] == pytest.approx(expected, rel=2e-4)


def test_one_size_of_an_axis_alone_is_enough() -> None:
    narrow = replace(CURVE, axes=(AXES[0], (1024.0,), AXES[2]), log_ratios=CURVE.log_ratios[:, :1])
    at_node = integers((256, 1024, 1024))
    assert narrow.seconds(at_node)[0] == pytest.approx(CURVE.seconds(at_node)[0], rel=1e-12)


@given(st.integers(64, 1024), st.integers(1024, 4096), st.integers(512, 2048))
def test_inside_the_ratio_is_bounded_by_the_nodes(m: int, n: int, k: int) -> None:
    shape = integers((m, n, k))
    ratio = float(np.log(CURVE.seconds(shape)[0] / law_seconds("product", shape, LAW)[0]))
    assert CURVE.log_ratios.min() - 1e-9 <= ratio <= CURVE.log_ratios.max() + 1e-9


@given(st.integers(65, 1023), st.integers(1025, 4095), st.integers(513, 2047), st.integers(0, 2))
def test_one_more_of_a_size_inside_changes_little(m: int, n: int, k: int, axis: int) -> None:
    larger = [m, n, k]
    larger[axis] += 1
    one, other = CURVE.seconds(integers((m, n, k), (larger[0], larger[1], larger[2])))
    assert other / one == pytest.approx(1.0, abs=0.03)


@pytest.mark.parametrize("edge", [(1024, 2048, 1024), (512, 4096, 1024), (512, 2048, 2048)])
def test_continuous_at_the_upper_edge(edge: tuple[int, int, int]) -> None:
    axis = next(place for place, one in enumerate(edge) if one == AXES[place][-1])
    beyond = list(edge)
    beyond[axis] += 1
    inside_s, beyond_s = CURVE.seconds(integers(edge, (beyond[0], beyond[1], beyond[2])))
    waste = quantization(integers((beyond[0], beyond[1], beyond[2])), 100)[0] / quantization(integers(edge), 100)[0]
    assert inside_s <= beyond_s <= inside_s * max(1.0, waste) * 1.01


@pytest.mark.parametrize("edge", [(512, 1024, 1024), (512, 2048, 512)])
def test_continuous_at_the_lower_edge(edge: tuple[int, int, int]) -> None:
    beyond = tuple(one - (place > 0 and one == AXES[place][0]) for place, one in enumerate(edge))
    inside_s, beyond_s = CURVE.seconds(integers(edge, (beyond[0], beyond[1], beyond[2])))
    assert beyond_s == pytest.approx(inside_s, rel=0.01)


@given(size, size, size, st.integers(0, 2))
def test_law_alone_grows_with_every_size_but_for_its_waves(m: int, n: int, k: int, axis: int) -> None:
    larger = [m, n, k]
    larger[axis] *= 2
    grown = (larger[0], larger[1], larger[2])
    one, other = FLAT.seconds(integers((m, n, k), grown))
    # a size that is doubled may fill a wave that half of it left idle, never more than that
    waste = max(float(quantization(integers((m, n, k)), 100)[0] / quantization(integers(grown), 100)[0]), 1.0)
    assert other >= one / waste * (1 - 1e-12)


@given(size, size, size)
def test_vectorized_prices_are_those_of_one_at_a_time(m: int, n: int, k: int) -> None:
    both = CURVE.seconds(integers((m, n, k), (k, m, n)))
    assert both[0] == CURVE.seconds(integers((m, n, k)))[0]
    assert both[1] == CURVE.seconds(integers((k, m, n)))[0]


def test_no_shapes_cost_nothing() -> None:
    assert CURVE.seconds(np.empty((0, 3), dtype=np.int64)).shape == (0,)


def far_shapes(num: int) -> NDArray[np.int64]:
    """Sizes from 1 to 131072, odd ones included, and the shapes that training meets outside the tables."""
    random = np.rint(np.exp2(np.random.default_rng(5).uniform(0.0, 17.0, (num, 3)))).astype(np.int64)
    named = integers(
        (100_000, 8192, 8192), (100_000, 128, 128), (8192, 128, 8192), (8192, 8192, 128), (1, 1, 1), (4096, 4096, 1), (4097, 4097, 4097),
        (4380, 871, 113_607), (64, 64, 802_816), (802_816, 64, 576), (777, 1333, 2111),
    )  # fmt: skip
    return np.concatenate([random, named])


@pytest.mark.parametrize("device", [name for name in catalogue_names() if load_hardware(name).grids])
def test_no_product_passes_the_peaks(device: str) -> None:
    profile = load_hardware(device)
    shapes = far_shapes(3000)
    flops = 2.0 * shapes.astype(np.float64).prod(axis=1)
    for curve in profile.grids:
        if curve.sizes != "product":
            continue
        seconds = curve.seconds(shapes)
        assert np.isfinite(seconds).all()
        assert (flops / seconds).max() <= profile.peak(curve.dtype)
        assert seconds.min() >= 1.5e-6  # of a kernel, with its launch


@pytest.mark.parametrize("device", TRAINING_GPUS)
def test_far_products_stay_near_the_roofline(device: str) -> None:
    curve = product_curve(device)
    shapes = far_shapes(3000)
    compute_s, memory_s = curve.law.parts("product", shapes)
    roofline_s = curve.law.launch_s + np.maximum(compute_s, memory_s)
    quantized_s = curve.law.launch_s + compute_s * quantization(shapes, curve.law.num_multiprocessors) + memory_s
    seconds = curve.seconds(shapes)
    assert (seconds >= 0.8 * roofline_s).all()
    assert (seconds <= 3.0 * quantized_s).all()


@pytest.mark.parametrize("device", TRAINING_GPUS)
@pytest.mark.parametrize("axis", [0, 1, 2])
@pytest.mark.parametrize("factor", [2, 8])
def test_larger_products_are_hardly_ever_cheaper(device: str, axis: int, factor: int) -> None:
    """By at most a seventh and two launches: timings of neighbouring tiles cross, and the last node's ratio multiplies the launch beyond it."""
    curve = product_curve(device)
    shapes = far_shapes(3000)
    larger = shapes.copy()
    larger[:, axis] *= factor
    assert (curve.seconds(larger) >= 0.85 * curve.seconds(shapes) - 2e-6).all()


@pytest.mark.parametrize("device", TRAINING_GPUS)
def test_rows_far_beyond_the_grid_cost_in_proportion(device: str) -> None:
    one, ten = product_curve(device).seconds(integers((100_000, 8192, 8192), (1_000_000, 8192, 8192)))
    assert ten / one == pytest.approx(10.0, rel=0.02)


def test_compute_share_goes_from_none_to_all() -> None:
    shares = CURVE.compute_share(integers((1, 1024, 1024), (8192, 8192, 8192)))
    assert shares[0] < 1e-3
    assert shares[1] > 0.999


@given(size, size, size)
def test_compute_share_is_a_share(m: int, n: int, k: int) -> None:
    assert 0.0 <= CURVE.compute_share(integers((m, n, k)))[0] <= 1.0


def test_borrowed_curve_keeps_the_ratios_under_another_law() -> None:
    faster = replace(LAW, flops_per_s=2e14, bandwidth_bytes_per_s=2e12)
    lent = CURVE.borrowed(
        faster,
        dtype="float16",
        factor=1.1,
        source="test",
        relative_standard_error=0.1,
        median_error=0.05,
        p90_error=0.2,
        p99_error=0.3,
    )
    shape = integers((256, 1024, 1024))
    ratio = CURVE.seconds(shape)[0] / law_seconds("product", shape, LAW)[0]
    assert lent.seconds(shape)[0] == pytest.approx(1.1 * ratio * law_seconds("product", shape, faster)[0], rel=1e-12)
    assert (lent.dtype, lent.evidence, lent.num_points) == ("float16", "datasheet", 0)


def test_equal_curves_are_equal_and_hash_alike() -> None:
    twin = replace(CURVE, log_ratios=CURVE.log_ratios.copy())
    assert twin == CURVE
    assert hash(twin) == hash(CURVE)
    assert replace(CURVE, log_ratios=CURVE.log_ratios + 0.1) != CURVE
    assert CURVE != "curve"
