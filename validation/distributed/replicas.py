"""Replicas on real processes: gradients packed into buckets and summed, behind the backward pass where the plan says so; with ZeRO 1 each rank updates its part."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import nn

from simulator.parallel.traced_replicas import Bucket

REDUCE_SCATTER = getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
ALL_GATHER = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
"""The second names are those before torch 2.13."""


@dataclass(slots=True, kw_only=True)
class _OnItsWay:
    """A bucket that is being summed."""

    packed: torch.Tensor
    part: torch.Tensor | None
    """Where this rank's part arrives; None: all of it does, in place."""
    work: dist.Work


@dataclass(slots=True, kw_only=True)
class _Held:
    """A bucket on this rank."""

    bucket: Bucket
    values: torch.Tensor | None = None
    """ZeRO 1: the memory of its parameters."""
    part: nn.Parameter | None = None
    """ZeRO 1: what this rank updates, a view of it."""
    missing: set[str] = field(default_factory=set)
    """Names whose gradients are not final yet in this step."""


class ReplicaExchange:
    """Sums the gradients of this rank's parameters with its replicas'; instructions and bytes are those of `simulator.parallel.traced_exchange`.

    Args:
        parameters: by name. With ZeRO 1 those of the buckets are moved into one tensor for each bucket.
        buckets: in the order in which they are exchanged, the same on every replica.
        group: of the replicas.
        splits: ZeRO 1.
        overlaps: a bucket goes as soon as `final` has told of all its names.
    """

    def __init__(
        self, parameters: Mapping[str, nn.Parameter], buckets: Sequence[Bucket], group: dist.ProcessGroup, *, splits: bool, overlaps: bool
    ) -> None:  # fmt: skip
        self._parameters, self._group, self._overlaps = parameters, group, overlaps
        self._held = [_Held(bucket=bucket) for bucket in buckets]
        self._bucket_of = {name: held for held in self._held for name in held.bucket.names}
        self._on_their_way: dict[Bucket, _OnItsWay] = {}
        if splits:
            for held in self._held:
                self._split(held)

    @property
    def parts(self) -> list[nn.Parameter]:
        """ZeRO 1: what this rank updates."""
        return [held.part for held in self._held if held.part is not None]

    def begin(self) -> None:
        """A step begins."""
        self._on_their_way.clear()
        for held in self._held:
            held.missing = set(held.bucket.names)

    def final(self, names: Sequence[str]) -> None:
        """Gradients are final; others in their buckets may be so already."""
        for name in names:
            held = self._bucket_of.get(name)
            if held is None:
                continue
            held.missing.discard(name)
            if self._overlaps and not held.missing and held.bucket not in self._on_their_way:
                self._send(held)

    def finish(self) -> None:
        """Waits for the buckets that went, then sends the others one after the other; sums are in ``.grad`` of parameters, or of parts."""
        for held in self._held:
            if held.bucket in self._on_their_way:
                self._arrived(held)
        for held in self._held:
            if held.missing or not self._overlaps:
                self._send(held)
                self._arrived(held)

    def gather(self) -> None:
        """ZeRO 1: brings updated parts to all replicas."""
        for held in self._held:
            if held.values is not None and held.part is not None:
                ALL_GATHER(_real(held.values), _real(held.part.detach()), group=self._group)

    def take_gradients(self) -> dict[str, torch.Tensor]:
        """ZeRO 1: the gradients of whole parameters, gathered from all replicas; they are let go here."""
        found: dict[str, torch.Tensor] = {}
        for held in self._held:
            if held.part is not None and held.part.grad is not None:
                whole = torch.empty(held.bucket.elements, dtype=held.part.dtype, device=held.part.device)
                ALL_GATHER(_real(whole), _real(held.part.grad), group=self._group)
                found |= dict(self._views(held.bucket, whole))
                held.part.grad = None
        return found

    def _split(self, held: _Held) -> None:
        bucket = held.bucket
        like = self._parameters[bucket.names[0]]
        held.values = torch.zeros(bucket.elements, dtype=like.dtype, device=like.device)
        for name, view in self._views(bucket, held.values):
            with torch.no_grad():
                view.copy_(self._parameters[name])
            self._parameters[name].data = view
        count = bucket.elements // dist.get_world_size(self._group)
        first = dist.get_rank(self._group) * count
        held.part = nn.Parameter(held.values[first : first + count])

    def _send(self, held: _Held) -> None:
        bucket = held.bucket
        like = self._parameters[bucket.names[0]]
        packed = torch.zeros(bucket.elements, dtype=like.dtype, device=like.device)
        part = None if held.part is None else torch.empty_like(held.part, requires_grad=False)
        for name, view in self._views(bucket, packed):
            grad, self._parameters[name].grad = self._parameters[name].grad, None
            if grad is not None:
                view.copy_(grad)
            del grad
        if part is None:
            work = dist.all_reduce(_real(packed), group=self._group, async_op=True)
        else:
            work = REDUCE_SCATTER(_real(part), _real(packed), group=self._group, async_op=True)
        self._on_their_way[bucket] = _OnItsWay(packed=packed, part=part, work=work)

    def _arrived(self, held: _Held) -> None:
        one = self._on_their_way.pop(held.bucket)
        one.work.wait()
        if held.part is not None:
            held.part.grad = one.part
            return
        for name, view in self._views(held.bucket, one.packed):
            self._parameters[name].grad = view

    def _views(self, bucket: Bucket, tensor: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """Each parameter's place in a bucket's tensor, with its strides."""
        return [
            (name, tensor.as_strided(self._parameters[name].shape, self._parameters[name].stride(), offset))
            for name, offset in zip(bucket.names, bucket.offsets, strict=True)
        ]


def agree_on_overflow(flag: torch.Tensor) -> None:
    """Makes a flag that is above 0 on any rank so on all."""
    dist.all_reduce(flag, op=dist.ReduceOp.MAX)


def _real(tensor: torch.Tensor) -> torch.Tensor:
    """A tensor as real numbers, which collectives sum."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
