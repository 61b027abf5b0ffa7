"""What a refined bound plays of passes beside which copies travel: chunks as the simulator cuts them, what each leaves on the host and takes from there."""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from functools import lru_cache

import numpy as np
from numpy.typing import NDArray

from hardware_models.units import DTYPE_BYTES
from search.joint.layer_tables import LayerTables
from search.joint.played_stages import Stages
from search.joint.played_step_kernels import Staged
from simulator.parallel.gradient_sync import PARAMETERS_SHARDED
from simulator.parallel.offload import HostPath, staged_bytes, weight_bytes
from simulator.parallel.recompute import stage_operations
from simulator.parallel.simulate_parallel import STAGING_CHUNKS
from simulator.parallel.stages import ChunkCost, stages_of
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.precision import STORED_AS
from simulator.program import Kind

Floats = NDArray[np.float64]


@lru_cache(maxsize=64)
def not_staged(count: int) -> Staged:
    """Of as many stages, whose passes run in one piece."""
    none = np.zeros((count, 0))
    return Staged(
        num=np.zeros(count, np.int64), forward=none, backward=none, returned=none, leave=none, come=none, fetch=none, again=none
    )


class StagedTables:
    """Staged passes by what they depend on, made when first asked for; stages of the same blocks share their chunks.

    Args:
        tables: of the layers.
        path: a rank's way to its host.
    """

    def __init__(self, tables: LayerTables, path: HostPath) -> None:
        self.tables = tables
        both = min(path.both_bytes_per_s, path.dram_bytes_per_s)
        self._down, self._up = min(path.to_host_bytes_per_s, both), min(path.to_device_bytes_per_s, both)
        self._latency_s = path.latency_s
        self._found: dict[Hashable, Staged] = {}
        self._chunks: dict[Hashable, tuple[object, tuple[tuple[ChunkCost, ...], ...]]] = {}

    def of(self, plan: Plan, order: Order, stages: Stages) -> Staged:
        """The passes of a plan that keeps activations or parameters on the host.

        **Model**: chunks, their compute and their bytes are the simulator's own (`chunk_costs`, `staged_bytes`); a copy takes its latency and its bytes at the full rate of the rank's way.

        Args:
            plan: of the request.
            order: of its pipeline.
            stages: of its cut.
        """
        model, memory, cut = self.tables.model(plan), plan.memory, stages.cut
        shards = plan.parallel.shard_ranks if memory.zero_stage >= PARAMETERS_SHARDED else 1
        key = (id(model), cut, order.microbatch_parts, memory.activation_offload, memory.weight_offload, shards)
        if key not in self._found:
            if (id(model), cut) not in self._chunks:
                chunks = tuple(
                    model.chunk_costs(stage, stage_operations(plan, stage), most=STAGING_CHUNKS)
                    for stage in stages_of(model.workload, plan, cut)
                )
                self._chunks[id(model), cut] = model, chunks  # kept, so that no other model gets its id
            width = DTYPE_BYTES[STORED_AS[plan.precision.compute]]
            share, away = 1.0 / order.microbatch_parts, float(memory.weight_offload) / shards
            self._found[key] = self._made(
                self._chunks[id(model), cut][1], stages.weight_s, share, float(memory.activation_offload), away, width
            )
        return self._found[key]

    def _made(
        self, chunks: Sequence[tuple[ChunkCost, ...]], weight_s: Floats, share: float, activations: float, weights: float, width: int
    ) -> Staged:  # fmt: skip
        """Equal stages have the same chunks."""
        rows: dict[int, int] = {}
        found: list[Floats] = []
        for own, less_s in zip(chunks, weight_s.tolist(), strict=True):
            if id(own) not in rows:
                rows[id(own)] = len(found)
                found.append(self._stage(own, less_s, share, activations, weights, width))
        table = np.array(found)[[rows[id(own)] for own in chunks]]
        count = np.array([len(own) for own in chunks], np.int64)
        return Staged(count, *(np.ascontiguousarray(table[:, place]) for place in range(table.shape[1])))

    def _stage(
        self, chunks: tuple[ChunkCost, ...], less_s: float, share: float, activations: float, weights: float, width: int
    ) -> Floats:
        """Seconds of each chunk in the order of turns; rows as the fields of `Staged`."""
        sent = np.array(staged_bytes(chunks, activations, share), np.float64)
        fetched = np.array([weight_bytes(chunk, weights, width) for chunk in chunks], np.float64)
        whole = np.array([chunk.backward.total_s for chunk in chunks])
        gradients = np.array(
            [sum(seconds for kind, seconds in chunk.backward.seconds if kind is Kind.BACKWARD) for chunk in chunks]
        )
        left = min(1.0, less_s / gradients.sum()) if gradients.any() else 0.0
        rows = (
            share * np.array([chunk.forward.total_s for chunk in chunks]), share * whole[::-1], share * (whole - left * gradients)[::-1],
            self._seconds(sent, self._down), self._seconds(sent, self._up)[::-1], self._seconds(fetched, self._up), self._seconds(fetched, self._up)[::-1],
        )  # fmt: skip
        table: Floats = np.zeros((len(rows), STAGING_CHUNKS))
        table[:, : len(chunks)] = rows
        return table

    def _seconds(self, size_bytes: Floats, bytes_per_s: float) -> Floats:
        return np.where(size_bytes > 0.0, self._latency_s + size_bytes / bytes_per_s, 0.0)
