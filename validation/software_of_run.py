"""Devices as the software of a published run drove them: attention kernels of a first generation, an earlier product library."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import replace
from functools import lru_cache
from math import log

from hardware_models.catalogue import load_hardware
from hardware_models.gridded import GriddedCurve
from hardware_models.profile import DeviceProfile
from validation.framework_facts import FlashPort, FrameworkFacts
from validation.published_row import PublishedRow

FIRST_OVER_SECOND = 2.0
"""Time of the first FlashAttention's kernels over that of the second's: "around 2x speedup", 25-40% against 50-73% of A100's peak (Dao 2023, arXiv 2307.08691, abstract)."""
FIRST_IN_TRITON: Mapping[str, float] = {"attention": 1.4, "attention_backward": 2.0}
"""The same of its port to Triton: "1.3-1.5x" forward and "around 2x" backward (the same paper, section 4.1)."""
SECOND_SHARE_OF_HOPPER = 0.35
"""Of Hopper's peak that the second's kernels reach, which know neither its tensor cores' own instructions nor its copy engine (Shah et al. 2024, FlashAttention-3, arXiv 2407.08608, abstract)."""
CURVE_SHARE_OF_HOPPER = 0.51
"""Of the same peak that the catalogue's curve of H100 reaches: 505 of 989 TFLOP/s forward, 16,384 tokens, masked half not counted."""
_HOPPER = "hopper"
_NEWEST = 3
_FIRST = re.compile(r"flash[_ -]?attention[_ -]?v?1(\.\d+)*\b", re.IGNORECASE)
_SECOND = re.compile(r"flash[_ -]?attention[_ -]?v?2\b", re.IGNORECASE)
_THIRD = re.compile(r"flash[_ -]?attention[_ -]?v?3\b", re.IGNORECASE)


def flash_generation(row: PublishedRow, facts: FrameworkFacts) -> int:
    """Generation of the flash attention kernels: as the row's words say, else the framework's."""
    words = f"{row.text('flash_attention')} {row.text('notes')}"
    stated = next((number for number, pattern in ((1, _FIRST), (2, _SECOND), (3, _THIRD)) if pattern.search(words)), None)
    return stated or facts.flash_generation


@lru_cache(maxsize=64)
def device_of_run(name: str, generation: int, library: str = "", *, port: FlashPort = "cuda") -> DeviceProfile:
    """The catalogue's device with attention kernels of a generation and a version of the product library (`alignment`; empty: the newest).

    **Model**: curves are of the newest attention kernels that a device had. The second takes the time of the curves up to Ampere and `CURVE_SHARE_OF_HOPPER` / `SECOND_SHARE_OF_HOPPER` times that on Hopper,
    forward and backward alike (the paper finds the third 1.5 to 2.0 and 1.5 to 1.75 times faster). The first takes twice the second's time at every shape, its port to Triton less forward.

    **Not modelled**: the first's weaker parallelism over few long samples, which slows it further; the second on Blackwell.

    Args:
        name: of the device.
        generation: of flash attention.
        library: of products.
        port: in which the first was written.
    """
    device = replace(load_hardware(name), product_library=library)
    if generation >= _NEWEST or (generation > 1 and device.architecture != _HOPPER):
        return device
    newer = CURVE_SHARE_OF_HOPPER / SECOND_SHARE_OF_HOPPER if device.architecture == _HOPPER else 1.0
    first = FIRST_IN_TRITON if port == "triton" else dict.fromkeys(FIRST_IN_TRITON, FIRST_OVER_SECOND)
    grids = tuple(
        _slower(curve, newer * (first.get(curve.group, FIRST_OVER_SECOND) if generation == 1 else 1.0))
        if curve.kernel_class == "attention"
        else curve
        for curve in device.grids
    )
    return replace(device, grids=grids)


def _slower(curve: GriddedCurve, factor: float) -> GriddedCurve:
    return replace(curve, log_ratios=curve.log_ratios + log(factor))
