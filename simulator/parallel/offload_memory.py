"""Bytes that a step keeps on hosts: over time per rank, then together on the node that holds most."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from simulator.parallel.mesh import Mesh
from simulator.parallel.offload_step import BACK, OUT
from simulator.program import Program
from simulator.run_record import RunRecord


def host_peaks(program: Program, record: RunRecord, resident_bytes: Sequence[float] = ()) -> list[int]:
    """Most bytes on the host of one rank of each pipeline rank; shape (devices,).

    **Model**: room for activations is taken when their transfer starts and given back when they have returned (a pool of pinned buffers that never grows
    beyond its peak); ``resident_bytes`` per device stay through the step.

    **Not modelled**: the allocator's rounding of pinned buffers, the process itself.
    """
    changes: list[list[tuple[float, int, float]]] = [[] for _ in range(program.num_devices)]
    for row, n in enumerate(program.transfers.instruction.tolist()):
        label, size, device = program.option[n], float(program.transfers.size_bytes[row]), int(program.device[n])
        if label == OUT:
            changes[device].append((float(record.start_s[n]), 1, size))
        elif label == BACK:
            changes[device].append((float(record.end_s[n]), 0, -size))
    resident = list(resident_bytes) or [0.0] * program.num_devices
    alive = (np.cumsum([0.0, *(change[2] for change in sorted(own))]) for own in changes)
    return [round(kept + float(own.max())) for kept, own in zip(resident, alive, strict=True)]


def node_peak(peaks: Sequence[int], mesh: Mesh) -> int:
    """Most bytes on one node's host: the ranks' peaks added up as if they came together.

    Args:
        peaks: per pipeline rank, of one of its devices.
        mesh: where ranks lie.
    """
    cluster = mesh.cluster
    devices = np.arange(cluster.num_gpus)
    ranks = devices // mesh.stride("pp") % mesh.degree("pp")
    return round(float(np.bincount(devices // cluster.devices_per_node, weights=np.array(peaks, np.float64)[ranks]).max()))
