"""Devices as the software of a published run drove them: attention kernels of a first generation, an earlier product library."""

from __future__ import annotations

import re
from dataclasses import replace
from functools import lru_cache
from math import log

from hardware_models.catalogue import load_hardware
from hardware_models.gridded import GriddedCurve
from hardware_models.profile import DeviceProfile
from validation.framework_facts import FrameworkFacts
from validation.published_row import PublishedRow

FIRST_OVER_SECOND = 2.0
"""Time of the first FlashAttention's kernels over that of the second's: "around 2x speedup", 25-40% against 50-73% of A100's peak (Dao 2023, arXiv 2307.08691, abstract). The
catalogue's curves are of the second and later."""
_FIRST = re.compile(r"flash[_ -]?attention[_ -]?v?1(\.\d+)*\b", re.IGNORECASE)
_SECOND = re.compile(r"flash[_ -]?attention[_ -]?v?[23]\b", re.IGNORECASE)


def flash_generation(row: PublishedRow, facts: FrameworkFacts) -> int:
    """Generation of the flash attention kernels: as the row's words say, else the framework's."""
    words = f"{row.text('flash_attention')} {row.text('notes')}"
    if _FIRST.search(words):
        return 1
    return 2 if _SECOND.search(words) else facts.flash_generation


@lru_cache(maxsize=64)
def device_of_run(name: str, generation: int, library: str = "") -> DeviceProfile:
    """The catalogue's device with attention kernels of a generation and a version of the product library (`alignment`; empty: the newest).

    **Model**: the first generation takes twice the time at every shape.

    **Not modelled**: its weaker parallelism over few long samples, which slows it further.
    """
    device = replace(load_hardware(name), product_library=library)
    if generation > 1:
        return device
    return replace(
        device, grids=tuple(_slower(curve) if curve.kernel_class == "attention" else curve for curve in device.grids)
    )


def _slower(curve: GriddedCurve) -> GriddedCurve:
    return replace(curve, log_ratios=curve.log_ratios + log(FIRST_OVER_SECOND))
