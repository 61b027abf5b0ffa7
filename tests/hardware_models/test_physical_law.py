"""The roofline over arrays of shapes: values by hand, limits, tiles and waves, monotonicity."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.physical_law import (
    BACKWARD_PRODUCTS,
    LEAST_SPLIT,
    TILES,
    PhysicalLaw,
    Sizes,
    coordinates,
    law_seconds,
    quantization,
    work,
)

LAW = PhysicalLaw(
    flops_per_s=1e14, bandwidth_bytes_per_s=1e12, launch_s=2e-6, num_multiprocessors=100, operand_bytes=2.0, result_bytes=2.0
)
size = st.integers(1, 200_000)


def integers(*rows: tuple[int, ...]) -> np.ndarray[tuple[int, ...], np.dtype[np.int64]]:
    return np.array(rows, dtype=np.int64)


def test_work_of_a_product_by_hand() -> None:
    flops, read, written = work("product", integers((3, 5, 7)))
    assert (flops[0], read[0], written[0]) == (2 * 3 * 5 * 7, 7 * (3 + 5), 3 * 5)


def test_work_of_attention_by_hand() -> None:
    # 2 x 4 heads, 1 key-value head, 8 queries, 16 keys, width 32: q and out 2*4*8*32, k and v 2*16*32 each
    flops, read, written = work("attention", integers((2, 4, 1, 8, 16, 32, 0)))
    assert (flops[0], read[0], written[0]) == (4 * 2 * 4 * 8 * 16 * 32, 2048 + 2 * 1024, 2048)


def test_causal_attention_works_on_half_and_the_diagonal() -> None:
    shape = (1, 1, 1, 4, 4, 8)
    masked, full = (work("attention", integers((*shape, causal)))[0][0] for causal in (1, 0))
    assert masked / full == pytest.approx(10 / 16)  # 1 + 2 + 3 + 4 of 16 scores


def test_backward_is_five_products_for_two() -> None:
    shape = integers((2, 4, 4, 128, 128, 64, 1))
    forward, backward = work("attention", shape), work("attention-backward", shape)
    assert backward[0][0] == BACKWARD_PRODUCTS * forward[0][0]
    assert backward[1][0] + backward[2][0] == 2 * (forward[1][0] + forward[2][0])


@pytest.mark.parametrize(
    ("sizes", "shape", "expected"),
    [
        ("product", (8, 16, 32), (3.0, 4.0, 5.0)),
        ("attention", (2, 8, 2, 64, 256, 128, 1), (4.0, 7.0, 2.0)),
        ("attention-backward", (2, 8, 8, 64, 64, 128, 1), (4.0, 6.0, 0.0)),
        ("decode", (4, 8, 2, 1, 1024, 128, 0), (3.0, 10.0, 2.0)),
    ],
)
def test_coordinates_by_hand(sizes: Sizes, shape: tuple[int, ...], expected: tuple[float, ...]) -> None:
    assert tuple(coordinates(sizes, integers(shape))[0]) == expected


def test_seconds_where_arithmetic_decides_by_hand() -> None:
    # 2 * 8192^3 / 1e14 = 10.995 ms; traffic 3 * 2 * 8192^2 / 1e12 = 0.403 ms counts (0.0366)^4 / 4
    assert law_seconds("product", integers((8192, 8192, 8192)), LAW)[0] == pytest.approx(2e-6 + 10.995116e-3, rel=1e-6)


def test_seconds_where_traffic_decides_by_hand() -> None:
    # one row: 2 * (8192 + 8192^2 + 8192) bytes / 1e12 = 134.25 us
    assert law_seconds("product", integers((1, 8192, 8192)), LAW)[0] == pytest.approx(2e-6 + 134.25e-6, rel=1e-4)


def test_seconds_where_both_are_equal_are_nineteen_percent_more() -> None:
    law = PhysicalLaw(
        flops_per_s=2.0, bandwidth_bytes_per_s=3.0, launch_s=0.0, num_multiprocessors=1, operand_bytes=1.0, result_bytes=1.0
    )
    assert law_seconds("product", integers((1, 1, 1)), law)[0] == pytest.approx(2**0.25)


def test_smallest_kernel_costs_the_launch() -> None:
    assert law_seconds("product", integers((1, 1, 1)), LAW)[0] == pytest.approx(LAW.launch_s, rel=1e-5)


@given(size, size, size, st.integers(0, 2))
def test_seconds_grow_with_every_size(m: int, n: int, k: int, axis: int) -> None:
    larger = [m, n, k]
    larger[axis] *= 2
    before, after = law_seconds("product", integers((m, n, k), (larger[0], larger[1], larger[2])), LAW)
    assert after >= before


@given(st.integers(1, 256), st.integers(0, 5), st.integers(1, 4096), st.booleans())
def test_attention_grows_with_batch_and_length(batch: int, sharing: int, length: int, causal: bool) -> None:
    shapes = [
        (b, 32, 32 >> sharing, n, n, 128, int(causal)) for b, n in ((batch, length), (2 * batch, length), (batch, 2 * length))
    ]
    one, wider, longer = law_seconds("attention", integers(*shapes), LAW)
    assert wider >= one
    assert longer >= one


def test_full_waves_of_whole_tiles_waste_nothing() -> None:
    # 10 x 20 tiles of 256 x 128 are two waves of 100
    assert quantization(integers((2560, 2560, 4096)), 100)[0] == 1.0


def test_one_tile_more_is_a_wave_more() -> None:
    # 101 tiles of 256 x 128 or 202 of 128 x 128 at 0.92 of the rate: 3 waves of 100 * 128 * 128 / 0.92 over 101 * 256 * 128
    expected = 3 * 100 * 128 * 128 / 0.92 / (101 * 256 * 128)
    assert quantization(integers((101 * 256, 128, 256)), 100)[0] == pytest.approx(expected)


def test_few_tiles_split_a_long_sum_only() -> None:
    alone, split = quantization(integers((128, 128, LEAST_SPLIT), (128, 128, 4 * LEAST_SPLIT)), 100)
    # one tile of 128 x 128 at 0.92, or four of 64 x 64 at 0.55, on 100 multiprocessors; then four parts of each
    assert alone == pytest.approx(min(100 / 0.92, 100 * 64 * 64 / 0.55 / 128**2))
    assert split == pytest.approx(alone / 4)


def test_one_row_still_costs_a_tile() -> None:
    # 64 x 256 at 0.85: 200 tiles in two waves
    assert quantization(integers((1, 256 * 200, 64)), 100)[0] == pytest.approx(min(64 / 0.85, 64 / 0.75))


@given(size, size, size, st.integers(1, 200))
def test_quantization_is_at_least_one_and_at_most_a_wave(m: int, n: int, k: int, num_multiprocessors: int) -> None:
    found = float(quantization(integers((m, n, k)), num_multiprocessors)[0])
    rows, columns = TILES[0][0]
    one_wave = num_multiprocessors * rows * columns / (m * n)
    whole_tiles = (1 + rows / m) * (1 + columns / n)
    assert 1.0 <= found <= (one_wave + whole_tiles) * (1 + 1e-12)


@given(size, size, size)
def test_large_products_are_not_quantized(m: int, n: int, k: int) -> None:
    assert quantization(integers((m + 200_000, n + 10_000, k)), 132)[0] < 1.05


def test_quantization_matches_whole_number_arithmetic() -> None:
    shapes = np.random.default_rng(3).integers(1, 10_000, (500, 3))
    expected = []
    for m, n, k in shapes.tolist():
        filled = []
        for (rows, columns), rate in TILES:
            tiles = -(-m // rows) * -(-n // columns)
            splits = max(1, min(132 // tiles, k // LEAST_SPLIT))
            filled.append(-(-tiles // 132) * 132 * rows * columns / splits / rate)
        expected.append(max(1.0, min(filled) / (m * n)))
    assert quantization(shapes, 132) == pytest.approx(expected, rel=1e-12)


def test_inside_a_grid_nothing_is_quantized() -> None:
    shape = integers((2049, 2049, 2049))
    inside = law_seconds("product", shape, LAW, at_edge=coordinates("product", shape))
    assert inside[0] == law_seconds("product", shape, LAW)[0]


def test_beyond_a_grid_the_ratio_to_the_edge_counts() -> None:
    shape, edge = integers((4096, 60, 600)), integers((4096, 1024, 600))
    compute_s, memory_s = LAW.parts("product", shape)
    ratio = quantization(shape, 100)[0] / quantization(edge, 100)[0]
    assert ratio > 1.0
    expected = 2e-6 + ((compute_s[0] * ratio) ** 4 + memory_s[0] ** 4) ** 0.25
    assert law_seconds("product", shape, LAW, at_edge=coordinates("product", edge))[0] == pytest.approx(expected)


@given(size, size, size, size, size, size)
def test_beyond_a_grid_nothing_is_cheaper_than_unquantized(m: int, n: int, k: int, em: int, en: int, ek: int) -> None:
    shape = integers((m, n, k))
    at_edge = coordinates("product", integers((em, en, ek)))
    assert law_seconds("product", shape, LAW, at_edge=at_edge)[0] >= law_seconds("product", shape, LAW)[0]
