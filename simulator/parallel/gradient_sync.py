"""What data parallelism does for a stage: gradients go between replicas, and updated or sharded parameters come together again."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hardware_models.network.cluster import CommGroup
from hardware_models.network.collectives import collective_seconds
from hardware_models.units import DTYPE_BYTES
from simulator.parallel.communication import Communication
from simulator.parallel.framework import AA_SCALING, TRANSFORMER_ENGINE
from simulator.parallel.memory import GRADIENT_BYTES
from simulator.parallel.mesh import Mesh, two_steps
from simulator.parallel.parameter_gathers import (
    FLAT_BUFFERS,
    Gathers,
    ListSeconds,
    Piece,
    Unit,
    gathers_of,
    pieces_of,
    prefetched_units,
)
from simulator.parallel.recompute import MEGATRON
from simulator.parallel.wire_format import WireFormat
from simulator.plan import Plan

WHOLE_SUMS = AA_SCALING
"""Frameworks that sum all gradients on all replicas, in float32, whatever ZeRO leaves each rank to update: flattened, divided, cast, summed, cast and copied back (``allreduce_no_retain``;
Aleph-Alpha/scaling @01b9d21dba src/scaling/core/optimizer/allreduce.py, ``Optimizer.step`` of optimizer.py)."""
DIVIDED_FIRST = MEGATRON
"""Frameworks that divide gradients by the number of replicas in a pass of its own before they are summed (``allreduce_gradients``, Megatron-LM v2.5 megatron/model/distributed.py; ``Bucket.start_grad_sync``,
megatron/core/distributed/grad_buffer.py, 2023; ``gradient_scaling_factor``, megatron/core/distributed/param_and_grad_buffer.py, 0.14)."""
CHECKED_FIRST = TRANSFORMER_ENGINE
"""Frameworks that take each bucket's norm before that, to find what is no number (``check_for_nan_in_grad`` of the same file, 0.14, on unless ``--no-check-for-nan-in-loss-and-grad``)."""
_FLOAT_BYTES = 4
BUCKET_BYTES = 40_000_000 * 4
"""Gradients of a bucket unless the plan says: Megatron-core's 40 million elements, in float32."""
MOST_CHUNKS = 16
GRADIENTS_SHARDED, PARAMETERS_SHARDED = 2, 3
"""ZeRO's stages from which on ranks hold a part of these only."""
NO_GATHERS = Gathers()


NO_LISTS = ListSeconds()


@dataclass(frozen=True, slots=True, kw_only=True)
class StageLoad:
    """What data parallelism needs to know of a stage."""

    elements: int
    """Parameters on this rank, before ZeRO shards them."""
    expert_elements: float = 0.0
    """Of them, experts', which fewer ranks hold."""
    units: tuple[Unit, ...] = ()
    """What ZeRO 3 gathers at once."""
    forward_s: tuple[float, ...] = ()
    """Compute of each unit."""
    backward_s: tuple[float, ...] = ()
    lists: ListSeconds = NO_LISTS
    """Of collectives over lists."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSync:
    """What data parallelism does for one stage on one rank."""

    chunks: int
    """Buckets that the last micro-batch's backward pass is cut into; 1: the gradients go when it is over."""
    reduce_s: float
    """All-reduce or reduce-scatter of the stage's gradients."""
    gather_s: float
    """All-gather of updated parameters (ZeRO 1 and 2)."""
    gather_overlaps: bool = False
    """They are gathered behind the first passes of the next step, which a step in a row of them finds at its start; else the step ends with it."""
    reduce_overlaps: bool = True
    """Gradients go when their stage's last backward pass has made them; else when the rank's last pass is over."""
    forward_gathers: Gathers = NO_GATHERS
    """ZeRO 3: parameters that a forward pass gathers."""
    backward_gathers: Gathers = NO_GATHERS
    """ZeRO 3: the same of a backward pass."""
    every_micro_batch: bool = False
    """ZeRO 3: gradients are scattered after each backward pass."""


def gradient_sync(
    plan: Plan, communication: Communication, load: StageLoad, wire: WireFormat, *, distance: int, dtype: str
) -> GradientSync:
    """What data parallelism does for a stage.

    **Model**: gradients of all buckets, and once a step parameters, over the ranks that hold the same ones; experts over their own fewer copies. Where ``dp_shard``
    ranks share one copy, gradients are scattered among them and the shards summed over the copies; parameters are gathered among them only. ZeRO 3 gathers and
    scatters unit by unit in each pass (`parameter_gathers`).

    Where a framework sums all of them everywhere (`WHOLE_SUMS`), ZeRO spares no traffic of gradients. Before that, some read them for their norm (`CHECKED_FIRST`), or read and write them to divide them
    (`DIVIDED_FIRST`).

    FSDP2 copies parameters out of the buffer that they are gathered in, on the compute stream, and gradients into one (`FLAT_BUFFERS`). Collectives over lists (`list_seconds`)
    clear the result first; their copies are kernels of a rank's part each, behind the collective or before it.

    **Source**: Rajbhandari et al. 2020 (ZeRO), section 7; Zhao et al. 2023 (PyTorch FSDP), section 3.2.2 (hybrid sharding).

    Args:
        plan: degrees, ZeRO stage, buckets, what overlaps.
        communication: prices collectives over the replicas.
        load: what the stage holds and computes.
        wire: the plan's format of gradients and parameters on their way.
        distance: of two pipeline ranks that hold the stage, in orders of two directions; 0 in others.
        dtype: of the parameters.

    **Not modelled**: that the two ranks of a stage, in orders of two directions, wait for each other.
    """
    alone = plan.parallel.dp * plan.parallel.cp == 1 and not distance
    if alone and not plan.memory.optimizer_offload:
        return GradientSync(chunks=1, reduce_s=0.0, gather_s=0.0)
    bucket = plan.runtime.bucket_bytes or BUCKET_BYTES
    grads = GRADIENT_BYTES[plan.precision.grads]
    buckets = round(wire.sent_bytes(load.elements, grads) / bucket)
    chunks = max(1, min(MOST_CHUNKS, buckets)) if plan.runtime.overlap_grad_reduce else 1
    if alone:
        return GradientSync(chunks=chunks, reduce_s=0.0, gather_s=0.0)
    parts = load.expert_elements / load.elements if load.elements else 0.0
    replicas = Replicas(plan, communication, wire, distance=distance, width=DTYPE_BYTES[dtype], parts=parts)
    overlaps, ahead = plan.runtime.overlap_grad_reduce, plan.runtime.overlap_param_gather
    if plan.memory.zero_stage < PARAMETERS_SHARDED:
        reduce_s = chunks * replicas.reduce_s(load.elements / chunks)
        gather_s = replicas.gather_s(load.elements) if plan.memory.zero_stage else 0.0
        return GradientSync(
            chunks=chunks, reduce_s=reduce_s, gather_s=gather_s, gather_overlaps=ahead and gather_s > 0.0, reduce_overlaps=overlaps
        )  # fmt: skip
    prefetch = prefetched_units(load.units, plan.runtime) if ahead else 0
    forward = pieces_of(load.units, load.forward_s, prefetch)
    turned = [replace(unit, tensors=unit.tensors[::-1]) for unit in load.units[::-1]]
    backward = pieces_of(turned, load.backward_s[::-1], prefetch)
    return GradientSync(
        chunks=min(MOST_CHUNKS, max(1, len(load.units))) if overlaps else 1,
        reduce_s=sum(replicas.scattered_piece_s(piece.elements, load.lists) for piece in forward),
        gather_s=0.0, every_micro_batch=True, forward_gathers=replicas.gathers(forward, load.lists), backward_gathers=replicas.gathers(backward, load.lists),
    )  # fmt: skip


class Replicas:
    """Collectives among the ranks that hold a stage's parameters; ``parts`` of these are experts', ``width`` is a parameter's size."""

    def __init__(
        self, plan: Plan, communication: Communication, wire: WireFormat, *, distance: int, width: int, parts: float
    ) -> None:
        self.wire, self.over, self.mesh, self.distance = wire, communication.over, communication.mesh, distance
        self.width, self.grads, self.parts = width, GRADIENT_BYTES[plan.precision.grads], parts
        self.sharded = plan.memory.zero_stage > 0
        self.flat = plan.runtime.framework in FLAT_BUFFERS
        self.shards = plan.parallel.shard_ranks if self.sharded else 1
        self.whole = self.shards == plan.parallel.dp * plan.parallel.cp
        framework, whole = plan.runtime.framework, plan.memory.zero_stage < GRADIENTS_SHARDED
        self.everywhere, self.divided, self.checked = (
            framework in WHOLE_SUMS,
            whole and framework in DIVIDED_FIRST,
            whole and framework in CHECKED_FIRST,
        )

    def reduce_s(self, elements: float) -> float:
        """Of gradients: made ready and summed, each rank keeping what ZeRO leaves it."""
        return self._prepared_s(elements) + self._reduced_s(elements)

    def _prepared_s(self, elements: float) -> float:
        """Looked through, divided by the number of replicas."""
        read = self.grads * (self.checked + self.divided)
        return self.wire.pass_s(elements, read_bytes=read, written_bytes=self.grads * self.divided) if read else 0.0

    def _reduced_s(self, elements: float) -> float:
        if self.everywhere:
            experts = (
                self._summed_everywhere_s(elements * self.parts, self.mesh.expert_group(self.distance)) if self.parts else 0.0
            )
            return experts + self._summed_everywhere_s(elements * (1.0 - self.parts), self.mesh.gradient_group(self.distance))
        experts = self._summed_s(elements * self.parts, self.mesh.expert_group(self.distance)) if self.parts else 0.0
        dense = elements * (1.0 - self.parts)
        if not self.sharded or self.whole:
            return experts + self._summed_s(dense, self.mesh.gradient_group(self.distance))
        inside_s = self._scattered_s(dense, self.mesh.shard_group(self.shards))
        return experts + inside_s + self._all_reduced_s(dense / self.shards, self.mesh.copy_group(self.shards, self.distance))

    def gather_s(self, elements: float) -> float:
        """Of parameters."""
        group = self.mesh.gradient_group(self.distance) if self.whole else self.mesh.shard_group(self.shards)
        experts = (
            self._gathered_s(elements * self.parts, self.mesh.expert_group(self.distance), self.width) if self.parts else 0.0
        )
        return experts + self._gathered_s(elements * (1.0 - self.parts), group, self.width)

    def gathers(self, pieces: Sequence[Piece], lists: ListSeconds) -> Gathers:
        """Of the pieces of a pass; a stage without parameters has none."""
        if not pieces:
            return NO_GATHERS
        idle_s = [self._listed_s(piece.elements, lists) for piece in pieces]
        gather_s = [
            self.gather_s(piece.elements) + idle + self._list_copies_s(piece.elements, lists)
            for piece, idle in zip(pieces, idle_s, strict=True)
        ]
        # the host lists a piece that is gathered ahead before it launches what computes meanwhile
        ahead_s = [idle if piece.prefetch else 0.0 for piece, idle in zip(pieces[1:], idle_s[1:], strict=True)]
        copy_s = [self.copied_out_s(piece.elements) + idle for piece, idle in zip(pieces, [*ahead_s, 0.0], strict=True)]
        return gathers_of([piece.compute_s for piece in pieces], gather_s, [piece.prefetch for piece in pieces], copy_s=copy_s)

    def scattered_piece_s(self, elements: float, lists: ListSeconds) -> float:
        """Of a piece's gradients."""
        listed_s = self.shards * lists.scattered_s + self._list_copies_s(elements, lists)
        return self.copied_in_s(elements) + self.reduce_s(elements) + listed_s

    def _listed_s(self, elements: float, lists: ListSeconds) -> float:
        """The device stands still while the host lists pieces; before that, the result is cleared."""
        if lists == NO_LISTS:
            return 0.0
        return self.shards * lists.gathered_s + self.wire.pass_s(elements, read_bytes=0.0, written_bytes=self.width)

    def _list_copies_s(self, elements: float, lists: ListSeconds) -> float:
        """A kernel for each rank's part."""
        if lists == NO_LISTS:
            return 0.0
        return self.shards * self.wire.pass_s(elements / self.shards, read_bytes=self.width, written_bytes=self.width)

    def copied_out_s(self, elements: float) -> float:
        """Of gathered parameters, from the buffer that they came in to their own places."""
        return self.wire.pass_s(elements, read_bytes=self.width, written_bytes=self.width) if self.flat else 0.0

    def copied_in_s(self, elements: float) -> float:
        """Of gradients, as the backward pass made them, into the buffer that they leave from."""
        return self.wire.pass_s(elements, read_bytes=self.width, written_bytes=self.grads) if self.flat else 0.0

    def _summed_everywhere_s(self, elements: float, group: CommGroup) -> float:
        """In float32: a flat copy, divided in place, cast, summed, cast back, and copied to where the gradients are."""
        narrow, wide = self.grads, _FLOAT_BYTES
        passes = ((narrow, narrow), (narrow, narrow), (narrow, wide), (wide, narrow), (narrow, narrow))
        moved_s = sum(self.wire.pass_s(elements, read_bytes=read, written_bytes=written) for read, written in passes)
        return moved_s + self.over("all_reduce", elements * wide, group)

    def _summed_s(self, elements: float, group: CommGroup) -> float:
        return self._scattered_s(elements, group) if self.sharded else self._all_reduced_s(elements, group)

    def _scattered_s(self, elements: float, group: CommGroup) -> float:
        if group.num_ranks == 1:
            return 0.0
        if not self.wire.quantizes:
            return self.over("reduce_scatter", self.wire.sent_bytes(elements, self.grads), group)
        seconds = 0.0
        for step in two_steps(group):
            seconds += self.over("all_to_all", self.wire.sent_bytes(elements, self.grads), step)
            seconds += self.wire.change_s(elements, read_bytes=self.grads, written_bytes=1.0)
            seconds += self.wire.change_s(elements, read_bytes=1.0, written_bytes=self.grads / step.num_ranks)
            elements /= step.num_ranks
        return seconds

    def _all_reduced_s(self, elements: float, group: CommGroup) -> float:
        if not self.wire.quantizes:
            return self.over("all_reduce", self.wire.sent_bytes(elements, self.grads), group)
        return self._scattered_s(elements, group) + self._gathered_s(elements, group, self.grads)

    def _gathered_s(self, elements: float, group: CommGroup, width: int) -> float:
        if group.num_ranks == 1:
            return 0.0
        own_s = self.over("all_gather", self.wire.sent_bytes(elements, width), group)
        sent_s = self.wire.change_s(elements / group.num_ranks, read_bytes=width, written_bytes=1.0)
        return own_s + sent_s + self.wire.change_s(elements, read_bytes=1.0, written_bytes=width)


def tied_seconds(plan: Plan, mesh: Mesh, elements: int) -> float:
    """Seconds of the all-reduce, between first and last pipeline rank, of the gradient of a tied table of so many elements."""
    if not elements:
        return 0.0
    size = float(elements * GRADIENT_BYTES[plan.precision.grads])
    return collective_seconds("all_reduce", size, mesh.neighbours("pp"), mesh.cluster)
