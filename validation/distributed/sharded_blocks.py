"""ZeRO 2 and 3 of a pipeline's stages: parameters of blocks gathered ahead of their use, gradients scattered behind; instructions and bytes are those of `simulator.parallel.traced_shards`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import nn

from simulator.parallel.traced_shards import Block, Shards, flat_buffers
from simulator.parallel.traced_stage import TracedStage
from simulator.sequence import Operation
from simulator.tracing.live_storages import resize_storage
from validation.distributed.replicas import ALL_GATHER, REDUCE_SCATTER


@dataclass(slots=True, kw_only=True)
class _Flat:
    """Parameters of one dtype of a block, which travel in one tensor; each is cut into equal parts, padded at its end.

    The tensor has a row a rank: its parts of all parameters, one after the other.
    """

    names: tuple[str, ...]
    parts: tuple[int, ...]
    """Elements of a rank's part of each."""
    own: torch.Tensor
    """This rank's parts of their values."""
    width: int
    """Elements of a row."""

    @property
    def offsets(self) -> list[int]:
        """First element of each in a row."""
        return [sum(self.parts[:place]) for place in range(len(self.parts))]


@dataclass(slots=True, kw_only=True)
class _Unit:
    """A block's parameters."""

    values: list[_Flat]
    gradients: list[_Flat]
    """Layout of their gradients; ``own`` is the sum of this rank's parts, empty before the first."""
    coming: list[tuple[torch.Tensor, dist.Work]] = field(default_factory=list)
    here: bool = False
    summed: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class _Leaving:
    """Gradients of a block on their way."""

    flat: _Flat
    packed: torch.Tensor
    part: torch.Tensor
    work: dist.Work
    first: bool


class ShardedBlocks:
    """Keeps a rank's parts of its stages' parameters, and has whole ones come and go around the blocks' runs.

    A gathered parameter keeps its place: its storage is filled before a block runs and emptied after it, so that graphs refer to it unchanged (as FSDP2 does).

    Args:
        shards: of the step.
        stages: this rank's, by their number.
        parameters: whole, by name; from here on their memory comes and goes.
        group: of the replicas.
    """

    def __init__(
        self, shards: Shards, stages: Mapping[int, TracedStage], parameters: Mapping[str, nn.Parameter], group: dist.ProcessGroup
    ) -> None:  # fmt: skip
        self._shards, self._group, self._parameters = shards, group, parameters
        self._rank, self._ranks = dist.get_rank(group), dist.get_world_size(group)
        self._leaving: list[_Leaving] = []
        self._split: set[str] = set()
        self._units: dict[Block, _Unit] = {}
        for number, stage in stages.items():
            for index, names in enumerate(stage.parameters_of_block):
                held = {name: stage.parameters[name] for name in sorted(names)}
                trained = {name: one for name, one in held.items() if one.trained}
                self._units[number, index] = _Unit(
                    values=[self._flat(bucket.names) for bucket in flat_buffers(held)], gradients=[self._flat(bucket.names) for bucket in flat_buffers(trained)]
                )  # fmt: skip
        for unit in self._units.values():
            for flat in unit.values:
                self._cut(flat)
        self.parts = [
            nn.Parameter(part) for unit in self._units.values() for flat in unit.values for name, part in self._views(flat) if parameters[name].requires_grad
        ]  # fmt: skip
        """What the optimizer updates here, in the order of `_trained_parts`."""

    @property
    def resident(self) -> list[torch.Tensor]:
        """This rank's parts of parameters, and what is not split."""
        whole = [parameter for name, parameter in self._parameters.items() if name not in self._split]
        return [*(flat.own for unit in self._units.values() for flat in unit.values), *whole]

    def begin(self) -> None:
        """A step begins."""
        self._leaving.clear()
        for unit in self._units.values():
            unit.summed = False
            unit.coming.clear()

    def before(self, stage: int, operations: Sequence[Operation], place: int) -> None:
        """The operation at a place of a pass comes: its parameters are there when it begins, those of the next block of the pass on their way."""
        block = operations[place].block
        self._use((stage, block))
        following = next(
            (one.block for one in operations[place + 1 :] if one.block != block and self._unit((stage, one.block)).values), None
        )
        if following is not None and self._shards.ahead:
            self._gather((stage, following))

    def after(self, stage: int, operations: Sequence[Operation], place: int) -> None:
        """It has run: gradients leave, parameters go."""
        one = operations[place]
        backward = one.kind == "B"
        if backward:
            self._scatter((stage, one.block))
        follows = place + 1 < len(operations) and operations[place + 1].block == one.block
        if backward if self._shards.keeps else not follows:
            self._free((stage, one.block))

    def made(self, stage: int, block: int) -> None:
        """The weights' gradients of a block were made by a pass of their own."""
        self._scatter((stage, block))

    def finish(self) -> None:
        """Waits for the gradients; each part has its own in ``.grad``."""
        self._arrived()
        sums: dict[str, torch.Tensor] = {}
        for unit in self._units.values():
            for flat in unit.gradients:
                sums |= dict(self._views(flat)) if unit.summed else {}
        for name, part in zip(self._trained_parts(), self.parts, strict=True):
            part.grad = sums.get(name)

    def let_go(self) -> None:
        """After the optimizer's step: sums go."""
        for unit in self._units.values():
            for flat in unit.gradients:
                flat.own = flat.own.new_empty(0)

    def take_gradients(self) -> dict[str, torch.Tensor | None]:
        """The gradients of whole parameters, gathered from all replicas; they are let go here."""
        found: dict[str, torch.Tensor | None] = dict.fromkeys(self._parameters)
        for unit in self._units.values():
            for flat in unit.gradients if unit.summed else []:
                whole = flat.own.new_empty(self._ranks * flat.width)
                ALL_GATHER(whole, flat.own, group=self._group)
                for name, rows in self._rows(flat, whole):
                    like = self._parameters[name]
                    found[name] = rows.reshape(-1)[: like.numel()].as_strided(like.shape, like.stride()).clone()
        for part in self.parts:
            part.grad = None
        self.let_go()
        return found

    def _unit(self, block: Block) -> _Unit:
        return self._units[block]

    def _flat(self, names: Sequence[str]) -> _Flat:
        parts = tuple(self._shards.part(self._parameters[name].numel()) for name in names)
        like = self._parameters[names[0]]
        return _Flat(
            names=tuple(names), parts=parts, own=torch.empty(0, dtype=like.dtype, device=like.device), width=sum(parts)
        )

    def _cut(self, flat: _Flat) -> None:
        """Keeps this rank's parts; whole parameters get padded storages of their own, which are empty."""
        flat.own = flat.own.new_zeros(flat.width)
        for name, part in self._views(flat):
            parameter = self._parameters[name]
            padded = torch.zeros(self._ranks * part.numel(), dtype=parameter.dtype, device=parameter.device)
            with torch.no_grad():
                padded.as_strided(parameter.shape, parameter.stride()).copy_(parameter)
                part.copy_(padded[self._rank * part.numel() : (self._rank + 1) * part.numel()])
            parameter.data = padded.as_strided(parameter.shape, parameter.stride())
            del padded
            resize_storage(parameter, 0)
            self._split.add(name)

    def _trained_parts(self) -> list[str]:
        units = self._units.values()
        return [name for unit in units for flat in unit.values for name in flat.names if self._parameters[name].requires_grad]

    def _views(self, flat: _Flat) -> list[tuple[str, torch.Tensor]]:
        """This rank's part of each."""
        return [
            (name, flat.own[start : start + part])
            for name, start, part in zip(flat.names, flat.offsets, flat.parts, strict=True)
        ]

    def _rows(self, flat: _Flat, whole: torch.Tensor) -> list[tuple[str, torch.Tensor]]:
        """All ranks' parts of each, shape (ranks, part), in a tensor that travels."""
        table = whole.view(self._ranks, flat.width)
        return [
            (name, table[:, start : start + part])
            for name, start, part in zip(flat.names, flat.offsets, flat.parts, strict=True)
        ]

    def _gather(self, block: Block) -> None:
        unit = self._unit(block)
        if unit.here or unit.coming:
            return
        for flat in unit.values:
            whole = flat.own.new_empty(self._ranks * flat.width)
            unit.coming.append((whole, ALL_GATHER(whole, flat.own, group=self._group, async_op=True)))

    def _use(self, block: Block) -> None:
        unit = self._unit(block)
        if unit.here:
            return
        self._gather(block)
        for flat in unit.values:
            whole, work = unit.coming.pop(0)
            work.wait()
            for name, rows in self._rows(flat, whole):
                resize_storage(self._parameters[name], rows.numel() * rows.element_size())
                _memory_of(self._parameters[name]).view(rows.shape).copy_(rows)
            del whole, work, rows
        unit.here = True

    def _free(self, block: Block) -> None:
        unit = self._unit(block)
        if unit.here:
            unit.here = False
            for name in (name for flat in unit.values for name in flat.names):
                resize_storage(self._parameters[name], 0)

    def _scatter(self, block: Block) -> None:
        unit = self._unit(block)
        if all(self._parameters[name].grad is None for flat in unit.gradients for name in flat.names):
            return
        self._arrived()
        for flat in unit.gradients:
            packed = flat.own.new_zeros(self._ranks * flat.width)
            for name, rows in self._rows(flat, packed):
                grad, self._parameters[name].grad = self._parameters[name].grad, None
                if grad is not None:
                    _pack(rows, grad, self._parameters[name])
                del grad
            part = flat.own.new_empty(flat.width)
            work = REDUCE_SCATTER(part, packed, group=self._group, async_op=True)
            self._leaving.append(_Leaving(flat=flat, packed=packed, part=part, work=work, first=not unit.summed))
        unit.summed = True
        if not self._shards.overlaps:
            self._arrived()

    def _arrived(self) -> None:
        """Waits for what left last and adds it up."""
        for one in self._leaving:
            one.work.wait()
            if one.first:
                one.flat.own = one.part
            else:
                one.flat.own += one.part
        self._leaving.clear()


def _memory_of(parameter: torch.Tensor) -> Any:
    """All of a tensor's storage in a row, with a version of its own: graphs that saved the parameter are not told that it was filled again."""
    return torch.empty(0, dtype=parameter.dtype, device=parameter.device).set_(parameter.untyped_storage())


def _pack(rows: torch.Tensor, grad: torch.Tensor, like: torch.Tensor) -> None:
    """Writes a gradient, in the order of its parameter's memory, into its rows."""
    if grad.stride() != like.stride():
        grad = torch.empty_strided(like.shape, like.stride(), dtype=grad.dtype, device=grad.device).copy_(grad)
    flat, width = grad.as_strided((grad.numel(),), (1,)), rows.shape[1]
    for rank, row in enumerate(rows):
        piece = flat[rank * width : (rank + 1) * width]
        row[: piece.numel()].copy_(piece)
