"""Products whose rows begin at odd addresses: which they are, and how slow published timings say they are; heads of uneven width."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.alignment import alignment_of, misaligned
from hardware_models.catalogue import load_hardware
from hardware_models.curves import FEATURES
from hardware_models.errors import UnknownNameError
from hardware_models.kernel import Kernel, row_bytes
from hardware_models.kernel_tables import attention_kernel
from hardware_models.pricers import MisalignedPricer, computed_width, pricer_of
from hardware_models.pricing import price, price_together

A100 = load_hardware("a100-sxm-80gb")
OLDER = replace(A100, product_library="cublas-11.6")


def product(*shape: int, dtype: str = "float16", op: str = "") -> Kernel:
    *batch, m, n, k = shape
    count = batch[0] if batch else 1
    return Kernel(
        kernel_class="batched_gemm" if batch else "gemm", op=op or ("bmm" if batch else "mm"), shape=shape, dtype=dtype, flops=2 * count * m * n * k,
        read_bytes=2 * count * (m * k + n * k), written_bytes=2 * count * m * n,
    )  # fmt: skip


def tera(kernel: Kernel, device: object = A100) -> float:
    """TFLOP/s of a kernel timed alone."""
    return kernel.flops / float(price([kernel], device, sustained=False)[0]) / 1e12  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("shape", "expected"),
    [
        ((2048, 4096, 1024), 32), ((2047, 4096, 1024), 32), ((2048, 5400, 14400), 16), ((2048, 4100, 4096), 8), ((2048, 4096, 4098), 4),
        ((2048, 50257, 1024), 2), ((8, 2048, 2048, 225), 2), ((8, 2048, 108, 2048), 8), ((8, 75, 2048, 128), 32),
    ],
)  # fmt: skip
def test_rows_count_and_their_number_does_not(shape: tuple[int, ...], expected: int) -> None:
    assert row_bytes(product(*shape)) == expected
    assert misaligned(product(*shape)) == (expected < 32)


def test_products_off_tensor_cores_and_grouped_ones_are_left_alone() -> None:
    assert not misaligned(product(2048, 50257, 1024, dtype="float32"))
    assert not misaligned(product(8, 2047, 2047, 225, op="_grouped_mm"))


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        ((8192, 51137, 14336), 76.1), ((8192, 51138, 14336), 136.9), ((8192, 51140, 14336), 138.4), ((27648, 222, 4096), 136.4),
        ((64, 2048, 130, 2048), 88.6), ((64, 2048, 302, 2048), 100.1), ((64, 2048, 2048, 302), 103.1), ((384, 1024, 140, 1024), 85.8),
    ],
)  # fmt: skip
def test_rates_are_those_that_were_published(shape: tuple[int, ...], published: float) -> None:
    """TFLOP/s of an A100 (sources in ``data/alignment.toml``)."""
    assert tera(product(*shape)) == pytest.approx(published, rel=0.15)


def test_an_earlier_library_runs_batches_of_uneven_rows_without_asynchronous_copies() -> None:
    shape = (384, 1024, 140, 1024)
    assert tera(product(*shape), OLDER) == pytest.approx(53.9, rel=0.05)
    assert tera(product(*shape, dtype="bfloat16"), OLDER) == pytest.approx(12.2, rel=0.05)
    assert tera(product(384, 1024, 128, 1024), OLDER) == tera(product(384, 1024, 128, 1024))


def test_time_is_the_smooth_maximum_of_both() -> None:
    """By hand: loads at 933 FLOP a clock on 108 multiprocessors of 1.41 GHz take 846 us for 2 * 4096 * 4098 * 3584 FLOPs."""
    kernel = product(4096, 4098, 3584)
    loads_s = 2 * 4096 * 4098 * 3584 / (933 * 108 * 1.41e9)
    assert loads_s == pytest.approx(846.9e-6, rel=1e-3)
    found = alignment_of().slowed(np.array([500e-6]), [kernel], A100)
    assert found[0] == pytest.approx((loads_s**4 + (500e-6) ** 4) ** 0.25, rel=1e-12)


@given(n=st.integers(1, 300), k=st.integers(1, 300), m=st.integers(64, 4096))
def test_no_product_gains_by_misalignment(n: int, k: int, m: int) -> None:
    kernel = product(m, 8 * n, 8 * k)
    pricer = pricer_of(kernel, A100)
    if isinstance(pricer, MisalignedPricer):
        assert pricer.seconds_of([kernel])[0] >= pricer.aligned.seconds_of([kernel])[0]


def test_a_step_says_how_well_misaligned_products_are_known() -> None:
    even, odd = price_together([product(4096, 4096, 4096)], A100), price_together([product(4096, 4097, 4096)], A100)
    assert odd.relative_standard_error > even.relative_standard_error
    assert "published" in odd.evidence


def test_a_library_that_is_not_known_is_refused_by_name() -> None:
    with pytest.raises(UnknownNameError, match=r"known are cublas-11.7, cublas-11.6"):
        alignment_of("cublas-9")


def test_measured_curves_tell_uneven_rows_apart() -> None:
    features = FEATURES["batched_gemm"]
    assert features(product(8, 64, 64, 64))[-1] == 0.0
    assert features(product(8, 64, 64, 75))[-1] == 3.0
    assert features(product(8, 64, 108, 64))[-1] == 1.0
    assert len(features(product(8, 64, 64, 75, dtype="float32"))) == 4
    assert FEATURES["gemm"](product(64, 4096, 75))[-1] == 3.0


def test_uneven_heads_cost_those_that_they_are_padded_to() -> None:
    """Heads of 80 as those of 96 forward and backward, of 128 as they are; one token reads its own keys only."""

    def head(width: int, length: int = 4096, *, backward: bool = False) -> float:
        kernel = attention_kernel(2, 16, 16, length, 4096, width, "bfloat16", causal=length > 1, backward=backward)
        return float(price([kernel], A100)[0])

    assert head(80) == head(96) > head(64)
    assert head(132, backward=True) == head(160, backward=True) > head(128, backward=True)
    assert head(80, 1) < head(96, 1)
    assert computed_width(np.array([2048, 2048]), np.array([256, 288])).tolist() == [256, 288]
