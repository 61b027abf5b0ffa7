"""Products in the plan's number format."""

from __future__ import annotations

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.kernel import Kernel
from hardware_models.kernel_tables import attention_kernel, gemm_kernel
from hardware_models.pricing import price
from simulator.precision import PRODUCTS_IN, STORED_AS, cast_kernel, in_precision, price_in

H100 = load_hardware("h100-sxm")
PRODUCT = gemm_kernel(8192, 8192, 8192, "bfloat16")


def test_eight_bit_products_read_half_the_bytes() -> None:
    recast = in_precision(PRODUCT, "fp8")
    assert (recast.dtype, recast.read_bytes) == ("float8_e4m3fn", PRODUCT.read_bytes // 2)
    assert (recast.flops, recast.written_bytes) == (PRODUCT.flops, PRODUCT.written_bytes)


def test_cast_reads_two_bytes_and_writes_two_copies_of_one() -> None:
    cast = cast_kernel(gemm_kernel(10, 20, 30, "bfloat16"))
    assert (cast.shape, cast.read_bytes, cast.written_bytes) == ((300,), 600, 600)


def test_large_eight_bit_products_are_faster_though_they_cast() -> None:
    alone, eight = price_in("bf16", H100)([PRODUCT])[0], price_in("fp8", H100)([PRODUCT])[0]
    assert 0.45 * alone < eight < 0.75 * alone
    assert eight == pytest.approx(price([in_precision(PRODUCT, "fp8")], H100)[0] + price([cast_kernel(PRODUCT)], H100)[0])


def test_attention_stays_as_it_is() -> None:
    attention = attention_kernel(1, 16, 16, 2048, 2048, 128, "bfloat16", causal=True)
    assert in_precision(attention, "fp8") is attention
    assert price_in("fp8", H100)([attention])[0] == price([attention], H100)[0]


def test_tf32_is_faster_than_float32_and_moves_the_same_bytes() -> None:
    product = gemm_kernel(4096, 4096, 4096, "float32")
    assert in_precision(product, "tf32").read_bytes == product.read_bytes
    assert price_in("tf32", H100)([product])[0] < 0.5 * price_in("fp32", H100)([product])[0]


@pytest.mark.parametrize("precision", sorted(set(STORED_AS) - set(PRODUCTS_IN)))
def test_other_formats_compute_in_what_they_store(precision: str) -> None:
    kernels: list[Kernel] = [gemm_kernel(64, 64, 64, STORED_AS[precision]), cast_kernel(PRODUCT)]
    assert [in_precision(kernel, precision) for kernel in kernels] == kernels
