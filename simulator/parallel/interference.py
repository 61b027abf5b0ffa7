"""How much the streams of a rank slow each other down on a cluster."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from hardware_models.network.cluster import Cluster
from hardware_models.network.overlap import OverlapFactors, overlap_factors
from hardware_models.profile import DeviceProfile
from simulator.program import Stream, no_slowdown

_NVLINK = "nvlink"


def overlap_of(device: DeviceProfile, cluster: Cluster) -> OverlapFactors:
    """Slow-down of compute, collectives and copies under each other, for a device of a cluster."""
    fabric, version = cluster.fabric, device.peer_link.removeprefix(_NVLINK)
    return overlap_factors(
        nvlink_generation=int(version) if version.isdigit() else 0, num_multiprocessors=device.num_multiprocessors,
        memory_bytes_per_s=device.memory_bandwidth_bytes_per_s, wire_bytes_per_s=fabric.wire_bytes_per_s(2),
        copy_bytes_per_s=fabric.host_link.achieved_bytes_per_s.value,
    )  # fmt: skip


def slowdown_of(factors: OverlapFactors) -> NDArray[np.float64]:
    """Of compute beside collectives of data parallelism, copies and messages, and of these collectives beside compute; shape as in `Program`."""
    slowdown = no_slowdown()
    slowdown[Stream.COMPUTE, Stream.DP] = factors.compute_under_collectives
    slowdown[Stream.DP, Stream.COMPUTE] = factors.collectives_under_compute
    for stream in (Stream.H2D, Stream.D2H, Stream.SEND):
        slowdown[Stream.COMPUTE, stream] = factors.compute_under_copies
    return slowdown
