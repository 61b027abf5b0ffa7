"""Cost rules: a value computed by hand, a limit and a monotonicity for each."""

from __future__ import annotations

import subprocess
import sys
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from hardware_models.curves import work_flops
from hardware_models.errors import InputError
from hardware_models.fit import fit_curve, nonnegative_least_squares
from hardware_models.kernel import KERNEL_CLASSES, Kernel
from hardware_models.op_groups import CLASS_DEFAULT, group_of
from hardware_models.pricers import curve_of
from hardware_models.pricing import price, price_together
from hardware_models.profile import DeviceProfile, Efficiency
from hardware_models.roofline import quantized_flops

DEVICE = DeviceProfile(
    name="paper", kind="cuda", memory_bytes=10**10, peak_flops_per_s={"float32": 1e12}, memory_bandwidth_bytes_per_s=1e11, dispatch_s=1e-6,
    context_bytes=0, launch_s=2e-6, num_multiprocessors=4, tile=(128, 128),
    efficiencies=(Efficiency(kernel_class="default", flops=0.5, bandwidth=0.8, relative_standard_error=0.2, evidence="published", source="test"),),
    curves=(), copy_engine=None, evidence={}, provenance="test",
)  # fmt: skip


def gemm(m: int, n: int, k: int) -> Kernel:
    return Kernel(
        kernel_class="gemm",
        op="mm",
        shape=(m, n, k),
        dtype="float32",
        flops=2 * m * n * k,
        read_bytes=4 * (m * k + n * k),
        written_bytes=4 * m * n,
    )


def add(elements: int, op: str = "add") -> Kernel:
    return Kernel(
        kernel_class="pointwise",
        op=op,
        shape=(elements,),
        dtype="float32",
        flops=0,
        read_bytes=8 * elements,
        written_bytes=4 * elements,
    )


def test_roofline_of_a_whole_wave_by_hand() -> None:
    kernel = gemm(256, 256, 1000)  # four tiles on four multiprocessors
    assert price([kernel], DEVICE)[0] == pytest.approx(2e-6 + 2 * 256 * 256 * 1000 / (1e12 * 0.5), rel=1e-12)


def test_roofline_of_a_memory_bound_kernel_by_hand() -> None:
    assert price([add(1000)], DEVICE)[0] == pytest.approx(2e-6 + 12000 / (1e11 * 0.8), rel=1e-12)


def test_fifth_tile_takes_a_second_wave() -> None:
    one, two = gemm(512, 128, 64), gemm(513, 128, 64)
    assert quantized_flops(one, DEVICE) == one.flops
    assert quantized_flops(two, DEVICE) == pytest.approx(2 * one.flops)


def test_few_tiles_split_the_sum() -> None:
    kernel = gemm(128, 128, 4096)
    assert quantized_flops(kernel, DEVICE) == kernel.flops


def test_cpu_is_not_quantized() -> None:
    kernel = gemm(3, 5, 7)
    assert quantized_flops(kernel, DEVICE.changed(num_multiprocessors=0)) == kernel.flops


def test_nothing_costs_the_launch() -> None:
    assert price([add(1)], DEVICE)[0] == pytest.approx(DEVICE.launch_s, rel=1e-3)


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(1, 3000), st.integers(0, 2))
def test_roofline_grows_with_every_size(m: int, n: int, k: int, axis: int) -> None:
    larger = [m, n, k]
    larger[axis] *= 2
    small, large = price([gemm(m, n, k), gemm(larger[0], larger[1], larger[2])], DEVICE)
    assert large >= small * (1 - 1e-12)


@given(st.floats(1.0, 10.0))
def test_faster_hardware_never_costs_more(factor: float) -> None:
    faster = DEVICE.changed(
        peak_flops_per_s={"float32": 1e12 * factor}, memory_bandwidth_bytes_per_s=DEVICE.memory_bandwidth_bytes_per_s * factor
    )
    kernels = [gemm(300, 200, 100), add(10**6)]
    assert (price(kernels, faster) <= price(kernels, DEVICE)).all()


def test_transform_work_by_hand() -> None:
    full = Kernel(
        kernel_class="fft", op="_fft_c2c", shape=(3, 8, 16), dtype="complex64", flops=0, read_bytes=1, written_bytes=1
    )
    assert work_flops(full) == 5 * 3 * 128 * 7
    assert work_flops(replace(full, op="_fft_r2c")) == work_flops(full) / 2


def test_causal_attention_works_on_the_unmasked_part() -> None:
    kernel = Kernel(
        kernel_class="attention",
        op="attention",
        shape=(1, 1, 1, 4, 4, 8, 1),
        dtype="float32",
        flops=512,
        read_bytes=1,
        written_bytes=1,
    )
    assert work_flops(kernel) == 512 * 10 / 16
    assert work_flops(replace(kernel, shape=(1, 1, 1, 4, 4, 8, 0))) == 512


def _measured() -> DeviceProfile:
    kernels = [add(2**exponent) for exponent in range(8, 24)]
    seconds = [3e-6 + 1e-11 * kernel.moved_bytes * (1 + 0.3 * np.sin(np.log2(kernel.moved_bytes))) for kernel in kernels]
    return DEVICE.changed(curves=(fit_curve(kernels, seconds, group="add"),))


def test_curve_meets_its_points_and_its_neighbours() -> None:
    kernel = add(2**16)
    expected = 3e-6 + 1e-11 * kernel.moved_bytes * (1 + 0.3 * np.sin(np.log2(kernel.moved_bytes)))
    assert price([kernel], _measured())[0] == pytest.approx(expected, rel=0.02)
    between = add(3 * 2**15)
    expected = 3e-6 + 1e-11 * between.moved_bytes * (1 + 0.3 * np.sin(np.log2(between.moved_bytes)))
    assert price([between], _measured())[0] == pytest.approx(expected, rel=0.1)


def test_curve_far_outside_is_physical() -> None:
    small, large = price([add(2**50), add(2**51)], _measured())
    assert large / small == pytest.approx(2.0, rel=0.02)


@given(st.integers(2**8, 2**22))
def test_curve_grows_with_size(elements: int) -> None:
    small, large = price([add(elements), add(2 * elements)], _measured())
    assert large > small


def test_price_is_per_kernel_and_in_order() -> None:
    kernels = [add(1000), gemm(64, 64, 64), add(5, "tanh"), add(1000)]
    together = price(kernels, _measured())
    assert together[0] == together[3]
    assert together == pytest.approx([price([kernel], _measured())[0] for kernel in kernels])
    assert price([], _measured()).shape == (0,)


def test_sum_with_its_error_and_evidence() -> None:
    alone = price_together([gemm(256, 256, 1000)], DEVICE)
    assert alone.relative_standard_error == pytest.approx(0.2)
    assert alone.evidence == ("published", "datasheet")
    mixed = price_together([gemm(256, 256, 1000), add(10**6)], _measured())
    assert mixed.evidence == ("measured", "published", "datasheet")
    assert 0 < mixed.relative_standard_error < 0.2
    assert price_together([], DEVICE).total_s == 0


def test_operators_fall_back_as_the_table_says() -> None:
    curve = _measured().curves[0]
    assert curve_of(add(10, "mish"), _measured()) == curve
    assert curve_of(gemm(1, 1, 1), _measured()) is None
    assert group_of("sin", "pointwise", frozenset({"add", "tanh"})) == "tanh"
    assert group_of("sin", "pointwise", frozenset({"add"})) == "add"
    assert set(CLASS_DEFAULT) == set(KERNEL_CLASSES)


def test_missing_peak_is_an_input_error() -> None:
    with pytest.raises(InputError, match="no peak for this dtype"):
        price([replace(gemm(8, 8, 8), dtype="bfloat16")], DEVICE)


def test_nonnegative_least_squares() -> None:
    matrix = np.array([[1.0, 1.0], [1.0, 2.0], [1.0, 3.0]])
    assert nonnegative_least_squares(matrix, np.array([3.0, 5.0, 7.0])) == pytest.approx([1.0, 2.0])
    assert nonnegative_least_squares(matrix, np.array([0.0, 2.0, 4.0]))[0] == 0.0


def test_fit_recovers_a_physical_law() -> None:
    kernels = [gemm(m, n, k) for m in (64, 256, 1024) for n in (64, 512) for k in (32, 2048)]
    seconds = [1e-5 + 1e-12 * kernel.flops for kernel in kernels]
    curve = fit_curve(kernels, seconds, group="mm")
    assert curve.coefficients[:2] == pytest.approx((1e-5, 1e-12), rel=1e-6)
    assert curve.relative_standard_error < 1e-6


def test_pricing_imports_no_torch() -> None:
    code = "import hardware_models.pricing, hardware_models.catalogue, hardware_models.calibration, sys; assert 'torch' not in sys.modules"
    subprocess.run([sys.executable, "-c", code], check=True)


def test_h100_gemm_is_near_the_published_best() -> None:
    kernel = replace(gemm(2048, 2048, 13312), dtype="bfloat16")
    seconds = price([kernel], load_hardware("h100-sxm"))[0]
    assert kernel.flops / seconds == pytest.approx(794.5e12, rel=0.1)
