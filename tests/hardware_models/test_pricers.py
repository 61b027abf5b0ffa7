"""What prices a kernel: the choice among curve, grid, products and roofline, and each of them."""

from __future__ import annotations

from dataclasses import replace
from math import hypot

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.best_rates import best_rate_seconds
from hardware_models.catalogue import catalogue_names, load_hardware
from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from hardware_models.kernel_tables import attention_kernel, gemm_kernel
from hardware_models.pricers import (
    BATCH_FORM_ERROR,
    CONVOLUTION_FORM_ERROR,
    GridPricer,
    ProductPricer,
    RooflinePricer,
    grid_group,
    pricer_of,
    product_form,
)
from hardware_models.pricing import price, price_together
from hardware_models.profile import DeviceProfile, Sustained
from hardware_models.units import DTYPE_BYTES

A100 = load_hardware("a100-sxm-80gb")
H100 = load_hardware("h100-sxm")
GPUS = tuple(name for name in catalogue_names() if load_hardware(name).grids)
DTYPES = ("float16", "bfloat16", "float8_e4m3fn", "tf32")
size = st.integers(1, 20_000)


def batched(batch: int, m: int, n: int, k: int, *, op: str = "bmm", dtype: str = "bfloat16") -> Kernel:
    one = gemm_kernel(m, n, k, dtype)
    return Kernel(
        kernel_class="batched_gemm", op=op, shape=(batch, m, n, k), dtype=dtype, flops=batch * one.flops, read_bytes=batch * one.read_bytes,
        written_bytes=batch * one.written_bytes,
    )  # fmt: skip


def convolution(
    batch: int, inputs: int, outputs: int, side: int, element: int, *, op: str = "convolution", stride: int = 1, groups: int = 1
) -> Kernel:
    """Square images and kernels in float16; ``side`` of the input."""
    positions = (side // stride) ** 2
    x, y, weight = batch * inputs * side**2, batch * outputs * positions, inputs // groups * outputs * element**2
    written = {"convolution": y, "convolution_backward_input": x, "convolution_backward_weight": weight}[op]
    return Kernel(
        kernel_class="convolution", op=op, shape=(batch, inputs, outputs, groups, element**2, positions, stride), dtype="float16",
        flops=2 * batch * outputs * positions * element**2 * inputs // groups, read_bytes=2 * (x + y + weight - written), written_bytes=2 * written,
    )  # fmt: skip


def priced(kernel: Kernel, profile: DeviceProfile = A100, *, sustained: bool = False, stack: str = "") -> float:
    return float(price([kernel], profile, sustained=sustained, stack=stack)[0])


@pytest.mark.parametrize(
    ("kernel", "kind", "group"),
    [
        (gemm_kernel(64, 64, 64, "bfloat16"), GridPricer, "mm"),
        (attention_kernel(2, 8, 8, 128, 128, 64, "bfloat16", causal=True), GridPricer, "attention"),
        (attention_kernel(2, 8, 8, 1, 128, 64, "bfloat16", causal=False), GridPricer, "attention_decode"),
        (attention_kernel(2, 8, 8, 128, 128, 64, "bfloat16", causal=True, backward=True), GridPricer, "attention_backward"),
        (batched(4, 64, 64, 64), ProductPricer, "mm"),
        (convolution(8, 64, 64, 56, 3), ProductPricer, "mm"),
    ],
)
def test_grids_price_what_was_timed_and_what_amounts_to_it(kernel: Kernel, kind: type, group: str) -> None:
    assert grid_group(kernel) == group
    pricer = pricer_of(kernel, A100)
    assert type(pricer) is kind
    assert pricer.name.split("/")[1] == group


@pytest.mark.parametrize("kernel", [gemm_kernel(64, 64, 64, "float32"), batched(4, 64, 64, 64, dtype="complex64")])
def test_dtypes_without_a_grid_go_to_the_roofline(kernel: Kernel) -> None:
    assert isinstance(pricer_of(kernel, A100), RooflinePricer)


def test_both_eight_bit_floats_take_one_grid() -> None:
    other = replace(gemm_kernel(512, 4096, 4096, "float8_e4m3fn"), dtype="float8_e5m2")
    assert priced(other, H100) == priced(gemm_kernel(512, 4096, 4096, "float8_e4m3fn"), H100)


def test_preferred_stack_is_taken_where_it_is() -> None:
    kernel = gemm_kernel(512, 4096, 4096, "bfloat16")
    stacks = [grid.stack for grid in A100.grids if (grid.group, grid.dtype) == ("mm", "bfloat16")]
    assert len(stacks) > 1
    seconds = [priced(kernel, stack=stack) for stack in stacks]
    assert seconds[0] == priced(kernel)
    assert len(set(seconds)) == len(stacks)


@pytest.mark.parametrize("name", GPUS)
@pytest.mark.parametrize("dtype", DTYPES)
def test_every_dtype_of_every_gpu_has_a_price(name: str, dtype: str) -> None:
    profile = load_hardware(name)
    kernels = [gemm_kernel(100, 320, 512, dtype), gemm_kernel(8192, 4096, 1024, dtype), batched(16, 128, 128, 64, dtype=dtype)]
    if dtype not in profile.laws():
        with pytest.raises(InputError, match="no peak for this dtype; known are"):
            price(kernels, profile)
        return
    if DTYPE_BYTES[dtype] > 1:
        kernels += [
            attention_kernel(2, 16, 4, 512, 512, 64, dtype, causal=True),
            attention_kernel(2, 16, 4, 1, 512, 64, dtype, causal=False),
            attention_kernel(2, 16, 4, 512, 512, 64, dtype, causal=True, backward=True),
        ]
    seconds = price(kernels, profile)
    assert np.isfinite(seconds).all()
    assert seconds.min() > 1e-6
    assert seconds.max() < 0.1
    for kernel in kernels:
        assert pricer_of(kernel, profile).evidence
        assert isinstance(pricer_of(kernel, profile), (GridPricer, ProductPricer))


@pytest.mark.parametrize(
    ("name", "evidence"), [("h100-sxm", ("published",)), ("l4", ("datasheet",)), ("v100-sxm2-32gb", ("datasheet",))]
)
def test_evidence_is_what_the_grid_rests_on(name: str, evidence: tuple[str, ...]) -> None:
    profile = load_hardware(name)
    dtype = "bfloat16" if "bfloat16" in profile.laws() else "float16"
    assert pricer_of(gemm_kernel(512, 4096, 4096, dtype), profile).evidence == evidence
    assert pricer_of(batched(4, 64, 64, 64, dtype=dtype), profile).evidence == (*evidence, "datasheet")
    assert price_together([gemm_kernel(512, 4096, 4096, dtype)], profile).evidence == evidence


def test_transferred_prices_are_less_certain() -> None:
    timed, borrowed = (
        pricer_of(gemm_kernel(512, 4096, 4096, "bfloat16"), load_hardware(name), sustained=False) for name in ("h100-sxm", "l4")
    )
    assert borrowed.relative_standard_error > timed.relative_standard_error > 0.0


@given(size, size, size)
def test_sustained_is_never_faster_than_alone(m: int, n: int, k: int) -> None:
    kernel = gemm_kernel(m, n, k, "bfloat16")
    assert priced(kernel, H100, sustained=True) >= priced(kernel, H100)


@pytest.mark.parametrize("name", GPUS)
def test_sustained_is_at_most_the_factor_slower(name: str) -> None:
    profile = load_hardware(name)
    dtype = "bfloat16" if "bfloat16" in profile.laws() else "float16"
    kernels = [
        gemm_kernel(8192, 8192, 8192, dtype),
        gemm_kernel(1, 8192, 8192, dtype),
        attention_kernel(2, 32, 8, 4096, 4096, 128, dtype, causal=True),
    ]
    ratio = price(kernels, profile) / price(kernels, profile, sustained=False)
    factor = profile.sustained.factor if profile.sustained else 1.0
    assert ratio[[0, 2]] == pytest.approx(1.0 / factor, rel=0.01)
    assert ratio[1] == pytest.approx(1.0, abs=0.01)


def test_sustained_by_hand() -> None:
    sustained = Sustained(factor=0.8, low=0.7, high=0.9, evidence="published", source="test", date="2026-01-01")
    profile = A100.changed(sustained=sustained)
    kernel = gemm_kernel(1024, 1024, 256, "bfloat16")
    pricer = pricer_of(kernel, profile)
    assert isinstance(pricer, GridPricer)
    share = float(pricer.curve.compute_share(np.array([kernel.shape]))[0])
    assert priced(kernel, profile, sustained=True) == pytest.approx(priced(kernel, profile) * (1 + 0.25 * share))
    assert pricer.relative_standard_error == pytest.approx(hypot(pricer.curve.relative_standard_error, 0.1 / 0.8 / 1.2816))


@pytest.mark.parametrize(
    ("kernel", "form"),
    [
        (batched(3, 4, 5, 6), (3, 4, 5, 6)),
        (convolution(2, 16, 32, 8, 3), (1, 2 * 64, 32, 16 * 9)),
        (convolution(2, 16, 32, 8, 3, op="convolution_backward_input"), (1, 2 * 64, 16, 32 * 9)),
        (convolution(2, 16, 32, 8, 3, op="convolution_backward_weight"), (1, 32, 16 * 9, 2 * 64)),
        (convolution(2, 16, 32, 8, 3, groups=4), (4, 2 * 64, 8, 4 * 9)),
        (convolution(2, 16, 32, 8, 3, stride=2, op="convolution_backward_input"), (1, 2 * 64, 16, 32 * 9 // 4)),
    ],
)
def test_product_forms_by_hand(kernel: Kernel, form: tuple[int, int, int, int]) -> None:
    assert product_form(kernel) == form
    assert 2 * np.prod(form) == kernel.flops


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm", "b200"])
@pytest.mark.parametrize("shape", [(128, 128, 4096), (4096, 4096, 4096), (64, 576, 200_000), (1024, 1024, 64)])
def test_batch_of_one_is_the_product_itself(name: str, shape: tuple[int, int, int]) -> None:
    profile = load_hardware(name)
    assert priced(batched(1, *shape), profile) == pytest.approx(priced(gemm_kernel(*shape, "bfloat16"), profile), rel=0.1)


@given(st.integers(1, 512), st.integers(1, 2048), st.integers(1, 128), st.integers(1, 128))
def test_batch_takes_between_one_and_all_of_its_products(batch: int, m: int, n: int, k: int) -> None:
    n, k = 16 * n, 16 * k  # misaligned ones have bounds of their own
    together, one = priced(batched(batch, m, n, k)), priced(gemm_kernel(m, n, k, "bfloat16"))
    traffic_s = batched(batch, m, n, k).moved_bytes / A100.laws()["bfloat16"].bandwidth_bytes_per_s
    assert together >= 0.99 * one
    assert together <= max(batch * one, traffic_s + 2e-6) * 1.01


@given(st.integers(1, 256), st.integers(1, 2048), st.integers(1, 2048), st.integers(1, 2048))
def test_twice_the_batch_is_not_cheaper(batch: int, m: int, n: int, k: int) -> None:
    assert priced(batched(2 * batch, m, n, k)) >= priced(batched(batch, m, n, k)) * (1 - 1e-12)


@pytest.mark.parametrize(
    ("shape", "published"),
    [
        ((64, 2048, 2048, 128), 91.6), ((64, 2048, 128, 2048), 134.8), ((64, 2048, 2048, 256), 130.2), ((64, 2048, 256, 2048), 219.0),
        ((64, 256, 256, 4096), 143.3), ((64, 512, 512, 4096), 209.5), ((64, 1024, 1024, 4096), 231.8), ((64, 1024, 1024, 1024), 229.1),
    ],
)  # fmt: skip
def test_batches_reach_the_published_rates(shape: tuple[int, int, int, int], published: float) -> None:
    """TFLOP/s in float16, one launch at a time: EleutherAI/cookbook sizing/results/gemm_data/bmm, transformer_data/h_sweep.out @27dff48d59, sample_results @0f810f8eab.

    Sixty-four tiles of 128 x 128 x 4096, which leave multiprocessors idle, are 21% too fast.
    """
    kernel = batched(*shape, dtype="float16")
    assert kernel.flops / priced(kernel) / 1e12 == pytest.approx(published, rel=0.13)


def test_grouped_products_run_one_after_the_other() -> None:
    one_s = priced(gemm_kernel(512, 2048, 2048, "bfloat16"))
    launch_s = A100.laws()["bfloat16"].launch_s
    assert priced(batched(8, 512, 2048, 2048, op="_grouped_mm")) == pytest.approx(launch_s + 8 * (one_s - launch_s))


RESNET = [
    (256, 64, 64, 56, 3),
    (256, 128, 128, 28, 3),
    (256, 256, 256, 14, 3),
    (256, 512, 512, 7, 3),
    (256, 64, 256, 56, 1),
    (32, 256, 256, 14, 3),
    (1, 64, 64, 56, 3),
]


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm", "b200", "l4", "v100-sxm2-32gb"])
@pytest.mark.parametrize("op", ["convolution", "convolution_backward_input", "convolution_backward_weight"])
@pytest.mark.parametrize("sizes", RESNET)
def test_convolutions_pass_neither_peak_nor_bandwidth(name: str, op: str, sizes: tuple[int, int, int, int, int]) -> None:
    profile = load_hardware(name)
    kernel = convolution(*sizes, op=op)
    seconds = priced(kernel, profile)
    assert kernel.flops / seconds < 0.95 * profile.peak("float16")
    assert kernel.moved_bytes / seconds < profile.memory_bandwidth_bytes_per_s
    assert (
        seconds
        < 12.0 * (kernel.flops / profile.peak("float16") + kernel.moved_bytes / profile.memory_bandwidth_bytes_per_s) + 1e-5
    )


def test_pointwise_convolution_is_the_product() -> None:
    kernel = convolution(256, 512, 2048, 7, 1)
    product = gemm_kernel(256 * 49, 2048, 512, "float16")
    assert priced(kernel) == pytest.approx(priced(product), rel=0.1)


def test_error_of_products_holds_that_of_their_form() -> None:
    grid, form = (
        pricer_of(one, A100, sustained=False) for one in (gemm_kernel(64, 64, 64, "bfloat16"), batched(2, 64, 64, 64))
    )
    assert form.relative_standard_error == pytest.approx(hypot(grid.relative_standard_error, BATCH_FORM_ERROR))
    convolved = pricer_of(convolution(8, 64, 64, 56, 3), A100, sustained=False)
    assert convolved.relative_standard_error > CONVOLUTION_FORM_ERROR
    assert form.name == grid.name


STEP = [
    gemm_kernel(8192, 4096, 4096, "bfloat16"), gemm_kernel(1, 4096, 4096, "bfloat16"), batched(64, 1024, 1024, 64), batched(4096, 64, 64, 64),
    attention_kernel(4, 32, 8, 4096, 4096, 128, "bfloat16", causal=True), attention_kernel(64, 32, 8, 1, 4096, 128, "bfloat16", causal=False),
    Kernel(kernel_class="pointwise", op="add", shape=(10**8,), dtype="bfloat16", flops=0, read_bytes=4 * 10**8, written_bytes=2 * 10**8),
    replace(convolution(64, 64, 64, 56, 3), dtype="bfloat16"),
]  # fmt: skip


@pytest.mark.parametrize("name", ["a100-sxm-80gb", "h100-sxm", "b200", "l4"])
@pytest.mark.parametrize("factor", [1.1, 2.0])
def test_faster_hardware_is_never_slower(name: str, factor: float) -> None:
    profile = load_hardware(name)
    bandwidth = profile.memory_bandwidth_bytes_per_s * factor
    peaks = {dtype: peak * factor for dtype, peak in profile.peak_flops_per_s.items()}
    before = price(STEP, profile, sustained=False)
    by_memory = price(STEP, profile.changed(memory_bandwidth_bytes_per_s=bandwidth), sustained=False)
    by_peak = price(STEP, profile.changed(peak_flops_per_s=peaks), sustained=False)
    both = price(STEP, profile.changed(memory_bandwidth_bytes_per_s=bandwidth, peak_flops_per_s=peaks), sustained=False)
    tolerance = 1 + 1e-12
    assert (by_memory <= before * tolerance).all()
    assert (by_peak <= before * tolerance).all()
    assert (both <= np.minimum(by_memory, by_peak) * tolerance).all()
    assert both[0] / before[0] == pytest.approx(1 / factor, rel=0.05)


def test_twice_the_bandwidth_halves_what_only_moves_bytes() -> None:
    faster = H100.changed(memory_bandwidth_bytes_per_s=2 * H100.memory_bandwidth_bytes_per_s)
    assert priced(STEP[6], faster) / priced(STEP[6], H100) == pytest.approx(0.5, rel=0.05)


def test_light_that_is_given_is_taken_as_it_is() -> None:
    assert H100.light is not None
    faster = H100.changed(memory_bandwidth_bytes_per_s=2 * H100.memory_bandwidth_bytes_per_s, light=H100.light)
    assert faster.light == H100.light
    assert H100.changed(launch_s=1e-6).light == H100.light


def test_peak_that_is_taken_away_takes_its_grids_along() -> None:
    peaks = {dtype: peak for dtype, peak in H100.peak_flops_per_s.items() if dtype != "float8"}
    without = H100.changed(peak_flops_per_s=peaks)
    assert {grid.dtype for grid in without.grids} == {grid.dtype for grid in H100.grids} - {"float8_e4m3fn"}
    with pytest.raises(InputError, match="no peak for this dtype"):
        priced(gemm_kernel(64, 64, 64, "float8_e4m3fn"), without)


def test_price_of_a_list_is_that_of_each() -> None:
    assert price(STEP, H100) == pytest.approx([priced(kernel, H100, sustained=True) for kernel in STEP], rel=1e-12)
    assert price_together(STEP, H100).total_s == pytest.approx(price(STEP, H100).sum())


def test_errors_within_a_curve_add_up_and_between_curves_do_not() -> None:
    product, other = (
        gemm_kernel(512, 4096, 4096, "bfloat16"),
        attention_kernel(4, 32, 8, 4096, 4096, 128, "bfloat16", causal=True),
    )
    alone = price_together([product], H100)
    assert price_together([product, product], H100).relative_standard_error == pytest.approx(alone.relative_standard_error)
    both, attention = price_together([product, other], H100), price_together([other], H100)
    expected = hypot(alone.relative_standard_error * alone.total_s, attention.relative_standard_error * attention.total_s)
    assert both.relative_standard_error * both.total_s == pytest.approx(expected)


def test_depthwise_convolutions_are_no_products() -> None:
    depthwise, grouped = convolution(32, 256, 256, 56, 3, groups=256), convolution(32, 256, 256, 56, 3, groups=32)
    assert isinstance(pricer_of(depthwise, A100), RooflinePricer)
    assert isinstance(pricer_of(grouped, A100), ProductPricer)
    assert isinstance(pricer_of(convolution(32, 1, 64, 56, 3), A100), ProductPricer)  # one channel in one group
    assert priced(depthwise) < priced(grouped)


def test_batched_product_of_a_published_timing() -> None:
    """torch.bmm of 512 x (1024 x 1024 x 128) in bfloat16 on an A100, 1.036 ms (pytorch/pytorch#83272)."""
    assert priced(batched(512, 1024, 128, 1024), load_hardware("a100-sxm-40gb")) == pytest.approx(1.036e-3, rel=0.3)


def test_convolutions_of_a_published_step_leave_room_for_the_rest() -> None:
    """ResNet-50 v1.5 in mixed precision on an A100 80 GB trains 2470 images/s (NVIDIA/DeepLearningExamples @291f0d02e8): convolutions are a third to two thirds."""
    layers = [(3, 64, 224, 7, 2)]
    inputs = 64
    for width, blocks, side in ((64, 3, 56), (128, 4, 28), (256, 6, 14), (512, 3, 7)):
        for block in range(blocks):
            stride = 2 if block == 0 and width > 64 else 1
            layers += [
                (inputs, width, side * stride, 1, 1),
                (width, width, side * stride, 3, stride),
                (width, 4 * width, side, 1, 1),
            ]
            layers += [(inputs, 4 * width, side * stride, 1, stride)] if block == 0 else []
            inputs = 4 * width
    assert len(layers) == 53
    kernels = [
        convolution(256, inputs, outputs, side, element, stride=stride, op=op)
        for place, (inputs, outputs, side, element, stride) in enumerate(layers)
        for op in ("convolution", "convolution_backward_input", "convolution_backward_weight")
        if place or op != "convolution_backward_input"
    ]
    assert 1 / 3 < price(kernels, A100).sum() / (256 / 2470) < 2 / 3


@pytest.mark.parametrize("name", GPUS)
@given(m=size, n=size, k=size, heads=st.integers(1, 64), length=st.integers(2, 20_000), batch=st.integers(1, 64))
@settings(max_examples=12, deadline=None)
def test_no_price_is_below_the_best_rate(name: str, m: int, n: int, k: int, heads: int, length: int, batch: int) -> None:
    profile = load_hardware(name)
    dtype = next(dtype for dtype in ("bfloat16", "float16") if dtype in profile.peak_flops_per_s)
    kernels = [
        gemm_kernel(m, n, k, dtype),
        batched(batch, m, n, k, dtype=dtype),
        batched(batch, m, n, k, op="_grouped_mm", dtype=dtype),
        attention_kernel(batch, heads, heads, length, length, 128, dtype, causal=True),
    ]
    least, found = best_rate_seconds(kernels, profile), price(kernels, profile)
    assert (least[:3] > 0.0).all()
    assert (least <= found).all()
    large = gemm_kernel(8192, 8192, 8192, dtype)
    assert best_rate_seconds([large], profile)[0] > 0.5 * priced(large, profile, sustained=True)
