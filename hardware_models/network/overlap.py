"""How much compute and communication slow each other down when they run at the same time."""

from __future__ import annotations

from dataclasses import dataclass

from hardware_models.errors import InputError
from hardware_models.profile import Evidence

_PUBLISHED_MEAN = 1.189
"""Mean slow-down of compute under collectives over A100, H100, MI210 and MI250, GPT and LLaMA training: arXiv 2507.03114 (abstract: 18.9% on
average, 40.0% at most)."""
_PUBLISHED_BOTH = 1.3
"""Slow-down of compute and communication under each other on an 8-GPU node: overlap test of Galvatron (arXiv 2211.13878 and the README of its
tool); 2022, so V100 to A100."""
_PUBLISHED_SOURCE = "arXiv 2507.03114 (compute), arXiv 2211.13878 and its overlap test (collectives); copies: estimate"
_FIRST_PUBLISHED, _LAST_PUBLISHED = 2, 4
"""NVLink generations of the devices that the published means cover (A100, H100), and V100."""
_NVLINK4_BYTES_PER_S = 450e9
"""Of H100, per direction: stas00/ml-engineering network/README.md @744d01e18b."""
_MOST_TAKEN = 0.5
"""No overlap takes more than half of a device: the larger of two kernels still gets its share. Estimate."""
_CHANNEL_MULTIPROCESSORS = 24
"""Multiprocessors that NCCL's kernels hold on an NVSwitch node: 24 blocks beside a product of 132 on H100, NVIDIA developer forum, topic 337991;
the product there slowed from about 80% to 47% of the peak, since its 132 blocks no longer fitted one wave."""
_COLLECTIVE_TRAFFIC = 3.0
"""Memory accesses per byte on the wire of a ring step: read own, read received, write: estimate."""
_COPY_TRAFFIC = 1.0
"""Memory accesses per byte of a copy to or from the host, on the device's side."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OverlapFactors:
    """Times under overlap over times alone; all at least 1.

    ``evidence`` is of the two factors between compute and collectives; that of copies is always an estimate (``datasheet``).
    """

    compute_under_collectives: float
    compute_under_copies: float
    collectives_under_compute: float
    evidence: Evidence
    source: str


def overlap_factors(
    *,
    nvlink_generation: int,
    num_multiprocessors: int,
    memory_bytes_per_s: float,
    wire_bytes_per_s: float,
    copy_bytes_per_s: float,
) -> OverlapFactors:
    """Factors of a device.

    Args:
        nvlink_generation: 0 without NVLink.
        num_multiprocessors: of the device.
        memory_bytes_per_s: of its memory.
        wire_bytes_per_s: of its link to other devices, per direction.
        copy_bytes_per_s: of its link to the host, per direction.

    **Model**: generations 2 to 4: published means. Others: compute loses the multiprocessors that channels hold (their number in
    proportion to the wire's rate, that of NVLink 4 holding 24) and the memory bandwidth that the traffic takes, whichever is more;
    collectives lose the share of the memory bandwidth that they would need. Copies run on engines of their own and cost compute their
    traffic alone (an NCCL maintainer and users agree: NVIDIA/nccl issue 1023).

    **Not modelled**: the wave that a product loses when multiprocessors are missing (up to twice the time of one wave), clocks under load.

    Raises:
        InputError: a value that is not positive.
    """
    values = (num_multiprocessors, memory_bytes_per_s, wire_bytes_per_s, copy_bytes_per_s)
    if min(values) <= 0 or nvlink_generation < 0:
        raise InputError(
            source="overlap", key="device", value=values, rule="counts and rates are > 0", remedy="correct the device's profile"
        )
    copies = 1.0 / (1.0 - _bounded(_COPY_TRAFFIC * copy_bytes_per_s / memory_bytes_per_s))
    if _FIRST_PUBLISHED <= nvlink_generation <= _LAST_PUBLISHED:
        return OverlapFactors(
            compute_under_collectives=_PUBLISHED_MEAN, compute_under_copies=copies,
            collectives_under_compute=_PUBLISHED_BOTH, evidence="published", source=_PUBLISHED_SOURCE,
        )  # fmt: skip
    held = _bounded(_CHANNEL_MULTIPROCESSORS * min(1.0, wire_bytes_per_s / _NVLINK4_BYTES_PER_S) / num_multiprocessors)
    traffic = _bounded(_COLLECTIVE_TRAFFIC * wire_bytes_per_s / memory_bytes_per_s)
    return OverlapFactors(
        compute_under_collectives=1.0 / (1.0 - max(held, traffic)), compute_under_copies=copies,
        collectives_under_compute=1.0 / (1.0 - traffic), evidence="datasheet",
        source="physical estimate: multiprocessors held by channels and memory bandwidth taken by traffic",
    )  # fmt: skip


def _bounded(share: float) -> float:
    return min(_MOST_TAKEN, share)
