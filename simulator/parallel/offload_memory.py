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
    own = program.transfers.instruction
    names = np.array(program.option_names)[program.option_index[own]]
    out, back = np.flatnonzero(names == OUT), np.flatnonzero(names == BACK)
    rows = np.concatenate([out, back])
    time_s = np.concatenate([record.start_s[own[out]], record.end_s[own[back]]])
    change = program.transfers.size_bytes[rows] * np.repeat([1.0, -1.0], [len(out), len(back)])
    order = np.lexsort((change, time_s))  # at one instant, what returns goes first
    devices = program.device[own[rows]][order]
    resident = list(resident_bytes) or [0.0] * program.num_devices
    alive = (np.cumsum(change[order][devices == device]).max(initial=0.0) for device in range(program.num_devices))
    return [round(kept + float(most)) for kept, most in zip(resident, alive, strict=True)]


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
