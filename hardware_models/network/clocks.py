"""Boost clocks of devices: collectives over NVLink wait in kernels that spin, so latencies go with the clock."""

from __future__ import annotations

from types import MappingProxyType

BOOST_HZ = MappingProxyType(
    {
        "p100-sxm2": 1.480e9, "v100-sxm2-16gb": 1.530e9, "v100-sxm2-32gb": 1.530e9, "t4": 1.590e9, "a40": 1.740e9, "a100-pcie-80gb": 1.410e9,
        "a100-sxm-40gb": 1.410e9, "a100-sxm-80gb": 1.410e9, "h100-pcie": 1.755e9, "h100-sxm": 1.980e9, "h200-sxm": 1.980e9, "h20": 1.980e9,
        "b200": 1.965e9, "gb200": 1.965e9, "b300": 1.965e9, "gb300": 1.965e9, "l4": 2.040e9, "l40": 2.490e9, "l40s": 2.520e9, "rtx-4090": 2.520e9,
    }
)  # fmt: skip
"""Hz, by profile: NVIDIA data sheets and the maximum SM clock that nvidia-smi prints (2026-11-23); Blackwell Ultra as Blackwell."""


def latency_ratio(device: str, reference: str) -> float:
    """Latency of a collective on ``device`` over that on ``reference``; 1 where a clock is not known (a device of the user's own).

    **Model**: inverse ratio of the boost clocks.

    **Source**: all_reduce over 8 GPUs at 1 KiB took 21.8 us on A100 and 15.6 us on H100 (ratio 1.40; clocks 1.40), ai-dynamo/aiconfigurator
    @095f58a51c. Blackwell does not follow it (25 us at H100's clock), so it is taken across generations only where no nearer one was measured.
    """
    if device not in BOOST_HZ or reference not in BOOST_HZ:
        return 1.0
    return BOOST_HZ[reference] / BOOST_HZ[device]
