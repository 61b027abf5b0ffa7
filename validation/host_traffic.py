"""Carry out a host schedule on a real module: storages leave the device and come back around the moments of a step.

A tensor that goes to the host keeps its place: its storage is emptied and filled again, so graphs, parameters and boundaries that refer to it
need no change (as torch's FSDP does with gathered parameters). Room on the device is taken and given back in the order of the compute
stream, so the bytes in use at each moment do not depend on how fast copies are.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch

from hardware_models.errors import InputError
from simulator.host_schedule import INPUT, SHARED, Errand, HostSchedule, Part
from simulator.program import Stream
from simulator.tracing.block_run import OnSave
from simulator.tracing.live_storages import bytes_of, resize_storage
from simulator.tracing.trace import Traced
from validation.lanes import Lanes, LaneSpan
from validation.optimizer import FusedOptimizer

OptimizerFactory = Callable[[Sequence[torch.nn.Parameter]], FusedOptimizer]


@dataclass(slots=True)
class BufferPool:
    """Host buffers by size; what was given back is taken again first."""

    lanes: Lanes
    allocated_bytes: int = 0
    _free: dict[int, list[torch.Tensor]] = field(default_factory=dict)

    def take(self, size_bytes: int) -> torch.Tensor:
        """A buffer of a size."""
        free = self._free.setdefault(size_bytes, [])
        if free:
            return free.pop()
        self.allocated_bytes += size_bytes
        return self.lanes.host_buffer(size_bytes)

    def give_back(self, buffer: torch.Tensor) -> None:
        """What it holds is no longer needed."""
        self._free[buffer.numel()].append(buffer)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Away:
    """Tensors of a part that are on the host or under way."""

    tensors: tuple[torch.Tensor, ...]
    buffers: tuple[torch.Tensor, ...]
    borrowed: bool
    """Buffers go back to the pool when the part has been used."""


@dataclass(frozen=True, slots=True, kw_only=True)
class _Hosted:
    """A group of parameters that the host updates."""

    names: tuple[str, ...]
    own: tuple[torch.nn.Parameter, ...]
    """The host's copies."""
    values: tuple[torch.Tensor, ...]
    """The same without gradients."""
    gradients: tuple[torch.Tensor, ...]
    optimizer: FusedOptimizer


class HostTraffic:
    """The errands of a step on one module.

    Between `enter` and `leave` the parameters that live on the host have no memory on the device; `leave` also cleans up after a step that failed.

    Args:
        schedule: what goes when.
        module: whose parameters and gradients travel.
        traced: its blocks.
        optimizer: makes the optimizer of a group of parameters.
        lanes: the device's.

    Raises:
        InputError: a parameter that should travel shares its memory with another tensor.
    """

    def __init__(
        self, schedule: HostSchedule, module: torch.nn.Module, traced: Traced, optimizer: OptimizerFactory, lanes: Lanes
    ) -> None:
        self.schedule, self.lanes = schedule, lanes
        self._parameters = dict(module.named_parameters())
        self._names = [tuple(name for name in block.names("p") if name not in traced.shared) for block in traced.chain.blocks]
        self._names.append(tuple(sorted(traced.shared)))
        self._pool = BufferPool(lanes)
        self._moment = 0
        self._away: dict[int, _Away] = {}
        self._tokens: dict[int, Any] = {}
        self._collected: list[torch.Tensor] = []
        self._home = {name: lanes.host_buffer(self._size_of(name)) for name in self._living()}
        self._hosted = {
            block: self._hosted_group(self._named(block, members), optimizer)
            for block, members in zip([*range(len(traced.chain.blocks)), SHARED], schedule.hosted, strict=True)
            if members
        }

    def _named(self, block: int, members: Iterable[int]) -> tuple[str, ...]:
        return tuple(self._names[block][place] for place in members)

    def _living(self) -> list[str]:
        """Names of the parameters that live on the host."""
        return [name for block, members in enumerate(self.schedule.away) for name in self._named(block, members)]

    def _size_of(self, name: str) -> int:
        parameter = self._parameters[name]
        size, held = parameter.numel() * parameter.element_size(), parameter.untyped_storage().nbytes()
        if size != held:
            rule = f"a parameter that lives on the host has memory of its own, but its storage holds {held} bytes, not {size}"
            raise InputError(
                source="model",
                key=name,
                value=None,
                rule=rule,
                remedy="exempt its block with [[memory.block]] weight_offload = 0",
            )
        return held

    def _hosted_group(self, names: tuple[str, ...], optimizer: OptimizerFactory) -> _Hosted:
        buffers = [self._home[name] if name in self._home else self.lanes.host_buffer(self._size_of(name)) for name in names]
        own = tuple(
            torch.nn.Parameter(_like(buffer, self._parameters[name]), requires_grad=True)
            for name, buffer in zip(names, buffers, strict=True)
        )
        gradients = tuple(_like(self.lanes.host_buffer(self._size_of(name)), self._parameters[name]) for name in names)
        return _Hosted(
            names=names, own=own, values=tuple(one.data for one in own), gradients=gradients, optimizer=optimizer(own)
        )

    @property
    def hosted_names(self) -> frozenset[str]:
        """Parameters that the host updates."""
        return frozenset(name for group in self._hosted.values() for name in group.names)

    @property
    def host_bytes(self) -> int:
        """Bytes that it has taken on the host, the optimizer's states included."""
        buffers = sum(buffer.numel() for buffer in self._home.values()) + self._pool.allocated_bytes
        for group in self._hosted.values():
            tensors = [
                *group.gradients,
                *(one for name, one in zip(group.names, group.own, strict=True) if name not in self._home),
            ]
            buffers += sum(one.numel() * one.element_size() for one in [*tensors, *group.optimizer.state_tensors])
        return buffers

    def gradients(self) -> dict[str, torch.Tensor]:
        """Gradients that went to the host, by name of the parameter, once the lanes are drained; of a scaled loss, though its update has scaled them back."""
        return {
            name: value * group.optimizer.loss_scale
            for group in self._hosted.values()
            for name, value in zip(group.names, group.gradients, strict=True)
        }

    def updated_names(self, block: int) -> tuple[str, ...]:
        """Parameters that live on the host and that the device updates."""
        return self._named(block, self.schedule.returning(block))

    def enter(self) -> None:
        """Takes the parameters that live on the host off the device."""
        with torch.no_grad():
            for group in self._hosted.values():
                for name, own in zip(group.names, group.own, strict=True):
                    own.copy_(self._parameters[name])
            for name, buffer in self._home.items():
                buffer.copy_(bytes_of(self._parameters[name]))
        self.lanes.drain()
        for name in self._home:
            resize_storage(self._parameters[name], 0)

    def leave(self) -> None:
        """Puts them back, whatever happened meanwhile, and is ready for another step."""
        self.lanes.drain()
        for away in self._away.values():
            for buffer in away.buffers if away.borrowed else ():
                self._pool.give_back(buffer)
        for name, buffer in self._home.items():
            resize_storage(self._parameters[name], buffer.numel())
            bytes_of(self._parameters[name]).copy_(buffer)
        self.begin()

    def begin(self) -> None:
        """Starts a step."""
        self._moment = 0
        for state in (self._away, self._tokens, self._collected):
            state.clear()
        self.lanes.spans.clear()

    def before(self) -> None:
        """Errands before the next moment."""
        for errand in self.schedule.moments[self._moment].before:
            self._run(errand, None)

    def saver(self) -> OnSave | None:
        """What the next moment's graph should tell of what it saves; None: nothing of it goes."""
        after = self.schedule.moments[self._moment].after
        goes = any(verb == "store" and self.schedule.parts[part].kind == "activations" for verb, part in after)
        return self._collect if goes else None

    def _collect(self, tensor: torch.Tensor) -> None:
        self._collected.append(tensor.detach())

    def after(self, x: torch.Tensor | None = None) -> None:
        """Errands after the moment, which read ``x``; the moment after that is next."""
        for errand in self.schedule.moments[self._moment].after:
            self._run(errand, x)
        self._collected.clear()
        self._moment += 1

    def end(self) -> None:
        """The last moment: what is under way arrives."""
        self.before()
        for token in self._tokens.values():
            self.lanes.wait(token)

    def _run(self, errand: Errand, x: torch.Tensor | None) -> None:
        number, part = errand.part, self.schedule.parts[errand.part]
        match errand.verb:
            case "store":
                self._store(number, part, x)
            case "drop":
                self._drop(number, part)
            case "load":
                self._load(number, part)
            case "use":
                self._use(number)
            case "release":
                self._release(part)
            case "update":
                self._update(number, part)
            case "return":
                self._return(number, part)

    def _store(self, number: int, part: Part, x: torch.Tensor | None) -> None:
        if part.kind == "gradients":
            group = self._hosted[part.block]
            pairs = [(to, _known(self._parameters[name].grad)) for name, to in zip(group.names, group.gradients, strict=True)]
        else:
            away = self._leaving(part, x) if part.kind == "activations" else self._home_of(part)
            self._away[number] = away
            pairs = [(buffer, bytes_of(tensor)) for buffer, tensor in zip(away.buffers, away.tensors, strict=True)]
        self._tokens[number] = self._copy(part, Stream.D2H, "store", pairs, (self.lanes.mark(),))

    def _leaving(self, part: Part, x: torch.Tensor | None) -> _Away:
        tensors = tuple(_known(x).detach() if member == INPUT else self._collected[member] for member in part.members)
        sizes = tuple(tensor.untyped_storage().nbytes() for tensor in tensors)
        return _Away(tensors=tensors, buffers=tuple(self._pool.take(size) for size in sizes), borrowed=True)

    def _home_of(self, part: Part) -> _Away:
        names = self._named(part.block, part.members)
        return _Away(
            tensors=tuple(self._parameters[name].data for name in names),
            buffers=tuple(self._home[name] for name in names),
            borrowed=False,
        )

    def _drop(self, number: int, part: Part) -> None:
        self.lanes.wait(self._tokens.pop(number))
        if part.kind == "gradients":
            for name in self._hosted[part.block].names:
                self._parameters[name].grad = None
            return
        for tensor in self._away[number].tensors:
            resize_storage(tensor, 0)

    def _load(self, number: int, part: Part) -> None:
        if part.kind != "activations":
            self._away[number] = self._home_of(part)
        away = self._away[number]
        for tensor, buffer in zip(away.tensors, away.buffers, strict=True):
            resize_storage(tensor, buffer.numel())
        pairs = [(bytes_of(tensor), buffer) for buffer, tensor in zip(away.buffers, away.tensors, strict=True)]
        self._tokens[number] = self._copy(part, Stream.H2D, "load", pairs, (self.lanes.mark(),))

    def _use(self, number: int) -> None:
        self.lanes.wait(self._tokens.pop(number))
        away = self._away.pop(number)
        for buffer in away.buffers if away.borrowed else ():
            self._pool.give_back(buffer)

    def _release(self, part: Part) -> None:
        for name in self._named(part.block, part.members):
            resize_storage(self._parameters[name], 0)

    def _update(self, number: int, part: Part) -> None:
        group = self._hosted[part.block]

        def update() -> None:
            for own, gradient in zip(group.own, group.gradients, strict=True):
                own.grad = gradient
            group.optimizer.step()

        span = _span(part, Stream.HOST, "update")
        self._tokens[-1 - number] = self.lanes.submit(span, update, (self._tokens[number],))

    def _return(self, number: int, part: Part) -> None:
        group = self._hosted[part.block]
        pairs = [
            (self._parameters[name].data, value)
            for name, value in zip(group.names, group.values, strict=True)
            if name not in self._home
        ]
        self._tokens[-1 - number] = self._copy(part, Stream.HOST, "return", pairs, (self._tokens[-1 - number],))

    def _copy(
        self, part: Part, stream: Stream, label: str, pairs: Sequence[tuple[torch.Tensor, torch.Tensor]], after: Sequence[Any]
    ) -> Any:
        """Queues copies (destination, source) on a lane."""

        def copy() -> None:
            for destination, source in pairs:
                destination.copy_(source, non_blocking=True)

        return self.lanes.submit(_span(part, stream, label), copy, after)


def _span(part: Part, stream: Stream, label: str) -> LaneSpan:
    return LaneSpan(stream=stream, label=label, micro_batch=part.micro_batch, block=part.block, begin=None, end=None)


def _like(buffer: torch.Tensor, tensor: torch.Tensor) -> torch.Tensor:
    """A tensor over a buffer of bytes, laid out as another one."""
    empty = torch.empty(0, dtype=tensor.dtype, device=buffer.device)
    return empty.set_(buffer.untyped_storage(), 0, tensor.size(), tensor.stride())


def _known(tensor: torch.Tensor | None) -> torch.Tensor:
    assert tensor is not None
    return tensor
