"""Fourier transforms: a pass over the signal for each axis, or two where an axis is long."""

from __future__ import annotations

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.kernel import Kernel
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from hardware_models.roofline import transform_passes

A100 = load_hardware("a100-sxm-80gb")


def seconds(kernel: Kernel, profile: DeviceProfile = A100) -> float:
    return float(price([kernel], profile)[0])


def transform(*shape: int) -> Kernel:
    elements = int(np.prod(shape))
    return Kernel(
        kernel_class="fft",
        op="_fft_c2c",
        shape=shape,
        dtype="complex64",
        flops=0,
        read_bytes=8 * elements,
        written_bytes=8 * elements,
    )


@pytest.mark.parametrize(
    ("shape", "passes"),
    [
        ((64, 4096), 1),
        ((64, 8192), 1),
        ((64, 16384), 2),
        ((8, 256, 256), 2),
        ((1, 256, 256, 256), 3),
        ((8, 1 << 20, 256), 3),
        ((9, 1), 1),
    ],
)
def test_transforms_pass_over_the_signal_once_for_each_axis(shape: tuple[int, ...], passes: int) -> None:
    assert transform_passes(np.array([shape], dtype=np.int64))[0] == passes


def test_transforms_move_their_bytes_once_a_pass() -> None:
    one, two = transform(1024 * 256, 256), transform(1024, 256, 256)
    assert one.moved_bytes == two.moved_bytes
    assert seconds(two) / seconds(one) == pytest.approx(2.0, rel=0.01)


def test_transforms_of_a_published_timing() -> None:
    """CuFFT on a Titan V, 653 GB/s, there and back: 4096 x 4096 x 8 in single precision, 29.2 ms (DTolm/VkFFT#10)."""
    titan = load_hardware("v100-sxm2-16gb").changed(memory_bandwidth_bytes_per_s=653e9)
    assert 2 * seconds(transform(1, 4096, 4096, 8), titan) == pytest.approx(29.2e-3, rel=0.3)
