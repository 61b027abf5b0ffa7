"""Attention kernels of the generation that a run had."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.kernel import Kernel
from hardware_models.pricing import price
from tests.published_rows import row_of
from validation.framework_facts import facts_of
from validation.software_of_run import (
    CURVE_SHARE_OF_HOPPER,
    FIRST_IN_TRITON,
    FIRST_OVER_SECOND,
    SECOND_SHARE_OF_HOPPER,
    device_of_run,
    flash_generation,
)

ATTENTION = Kernel(
    kernel_class="attention", op="_scaled_dot_product_flash_attention", shape=(2, 16, 16, 4096, 4096, 128, 128), dtype="bfloat16", flops=10**12, read_bytes=10**8, written_bytes=10**8
)  # fmt: skip
PRODUCT = Kernel(
    kernel_class="gemm",
    op="mm",
    shape=(4096, 4096, 4096),
    dtype="bfloat16",
    flops=2 * 4096**3,
    read_bytes=10**8,
    written_bytes=10**8,
)


@pytest.mark.parametrize(
    ("notes", "framework", "generation"),
    [
        ("flash_attention: flash_attentionv1.0.8", "AA-Scaling", 1),
        ("flash_attention: flash_attention2 + RMS kernel", "AA-Scaling", 2),
        ("", "AA-Scaling", 2),
        ("attn_impl flash", "Composer/llm-foundry (PyTorch FSDP)", 1),
        ("flash_attention: yes (SDPA)", "torchtitan (PyTorch FSDP2/DTensor)", 2),
        ("", "Megatron-LM 0.14", 3),
        ("FlashAttention3", "torchtitan", 3),
    ],
)
def test_generations_by_row_and_framework(notes: str, framework: str, generation: int) -> None:
    assert flash_generation(row_of(notes=notes), facts_of(framework)) == generation


def test_the_first_generation_takes_twice_the_time_and_nothing_else_does() -> None:
    first, second = device_of_run("a100-sxm-80gb", 1), device_of_run("a100-sxm-80gb", 2)
    slow, fast = price([ATTENTION, PRODUCT], first, sustained=False), price([ATTENTION, PRODUCT], second, sustained=False)
    assert slow[0] == pytest.approx(FIRST_OVER_SECOND * fast[0])
    assert slow[1] == fast[1]


def test_the_port_to_triton_is_less_slow_forward() -> None:
    device, port, second = (
        device_of_run("a100-sxm-80gb", 1),
        device_of_run("a100-sxm-80gb", 1, port="triton"),
        device_of_run("a100-sxm-80gb", 2),
    )
    backward = replace(ATTENTION, op="_scaled_dot_product_flash_attention_backward")
    times = [price([ATTENTION, backward], one, sustained=False) for one in (device, port, second)]
    assert times[1][0] == pytest.approx(FIRST_IN_TRITON["attention"] * times[2][0])
    assert times[1][1] == pytest.approx(times[0][1])


def test_the_first_generation_on_hopper_is_twice_as_slow_as_the_second_there() -> None:
    first, second = (price([ATTENTION], device_of_run("h100-sxm", generation), sustained=False)[0] for generation in (1, 2))
    assert first == pytest.approx(FIRST_OVER_SECOND * second)


def test_the_second_generation_is_slower_on_hopper_only() -> None:
    def seconds(device: str, generation: int) -> float:
        return float(price([ATTENTION], device_of_run(device, generation), sustained=False)[0])

    assert seconds("h100-sxm", 2) == pytest.approx(CURVE_SHARE_OF_HOPPER / SECOND_SHARE_OF_HOPPER * seconds("h100-sxm", 3))
    assert seconds("a100-sxm-80gb", 2) == seconds("a100-sxm-80gb", 3)


def test_the_curve_reaches_the_share_that_the_factor_assumes() -> None:
    """A long causal sample forward on H100, masked half not counted."""
    tokens, heads, width = 16384, 32, 128
    kernel = Kernel(
        kernel_class="attention", op="attention", shape=(1, heads, 8, tokens, tokens, width, 1), dtype="bfloat16", flops=4 * heads * width * tokens**2, read_bytes=1, written_bytes=1
    )  # fmt: skip
    device = device_of_run("h100-sxm", 3)
    rate = kernel.flops / 2 / price([kernel], device, sustained=False)[0]
    assert rate / device.peak("bfloat16") == pytest.approx(CURVE_SHARE_OF_HOPPER, abs=0.005)
