"""Passes: a stretch of a tape -> a `Block` with its forward, backward and recomputing runs.

Storages live from the operator that makes them to the last one that reads them, or, where autograd saves them, to the last
backward step that does. Gradients of one value from several users are added up in place where nobody else holds them.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hardware_models.kernel import Kernel
from simulator.presets.tape import Gradient, Parameter, Step, Storage, Tape, Target, Value, pointwise
from simulator.workload import Block, BlockOption, Buffer, MemoryEvent, ParameterTensor, Pass, SavedTensor

PRODUCTS = frozenset({"mm", "addmm", "bmm", "_grouped_mm", "attention"})
"""Operators whose results the option ``selective`` keeps; all others run again inside the backward pass."""
LINEAR = frozenset({"mm", "addmm"})
"""Of these, linear layers."""


@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class Section:
    """Steps between two cuts of the chain."""

    name: str
    tape: Tape
    entering: Value | None
    """Boundary before the block; None for the first."""
    leaving: Value
    makes_shared: bool = False
    """Its backward pass is the first to make the gradients of the shared parameters that it uses."""
    alternate: bool = False
    """``selective`` leaves every second linear layer's result out."""
    unread: bool = True
    """``selective`` keeps products' results that the backward pass does not read."""
    selects: bool = True
    """There is an option ``selective`` at all."""
    remade: tuple[Kernel, ...] = ()
    """What makes the block's input again from what the block before it keeps, so that ``selective`` need not keep it."""

    @property
    def saved(self) -> tuple[Storage, ...]:
        """Every storage that autograd saves, in order, the block's input and output among them."""
        found = (value.storage for step in self.tape.steps for value in step.saved)
        return tuple(storage for storage in dict.fromkeys(found) if storage.role == "activation")

    @property
    def products(self) -> tuple[Storage, ...]:
        """Storages made by products, and the block's input: what the option ``selective`` keeps."""
        kept = [] if self.entering is None or self.remade else [self.entering.storage]
        linear = [step for step in self.tape.steps if step.op in LINEAR]
        left = linear[1::2] if self.alternate else []
        kept += [
            value.storage for step in self.tape.steps if step.op in PRODUCTS and step not in left for value in step.outputs
        ]
        found = tuple(dict.fromkeys(kept))
        if self.unread:
            return found
        saved = self.saved
        read = {*saved, *_reached(self.tape.steps, set(saved) - set(found))}
        return tuple(storage for storage in found if storage in read)


def block_of(section: Section) -> Block:
    """The block of a section, under the options ``all`` and, where it keeps less, ``selective``."""
    own = [parameter for parameter in section.tape.parameters if not parameter.shared]
    options = [_option(section, "all", section.saved)]
    selective = _option(section, "selective", section.products)
    if section.selects and selective.saved_internal_bytes < options[0].saved_internal_bytes:
        options.append(selective)
    size_bytes = sum(parameter.size_bytes for parameter in own)
    return Block(
        name=section.name, input_bytes=0 if section.entering is None else section.entering.storage.size_bytes,
        output_bytes=section.leaving.storage.size_bytes, parameter_elements=sum(parameter.elements for parameter in own),
        parameter_bytes=size_bytes, gradient_bytes=size_bytes, discard=_forward(section, ()), options=tuple(options),
        parameters=tuple(ParameterTensor(elements=one.elements, size_bytes=one.size_bytes, trained=True) for one in own),
    )  # fmt: skip


def _option(section: Section, name: str, kept: tuple[Storage, ...]) -> BlockOption:
    entering = None if section.entering is None else section.entering.storage
    return BlockOption(
        name=name, forward=_forward(section, kept), backward=_Backward(section, kept, accumulate=False).run(),
        backward_accumulate=_Backward(section, kept, accumulate=True).run(), keeps_input=entering in kept,
        keeps_output=section.leaving.storage in kept,
        saved=tuple(
            SavedTensor(
                op="input" if storage is entering else storage.op, shape=storage.shape, dtype=storage.dtype, size_bytes=storage.size_bytes,
                packed=-1 if name != "all" or storage in {entering, section.leaving.storage} else place,
            )
            for place, storage in enumerate(kept)
        ),
    )  # fmt: skip


@dataclass(slots=True)
class _Ledger:
    """Kernels in order and storages' comings and goings; who is who is told at the end."""

    kernels: list[Kernel] = field(default_factory=list)
    events: list[tuple[int, Storage, int]] = field(default_factory=list)

    def allocate(self, storage: Storage) -> None:
        self.events.append((len(self.kernels), storage, storage.size_bytes))

    def free(self, storage: Storage) -> None:
        self.events.append((len(self.kernels), storage, -storage.size_bytes))

    def finish(self, buffers: dict[Storage, Buffer], default: Buffer = "transient") -> Pass:
        """The pass, each storage under its buffer's name; storages without bytes are left out."""
        memory = tuple(
            MemoryEvent(kernel=kernel, buffer=buffers.get(storage, default), delta_bytes=delta)
            for kernel, storage, delta in self.events if delta
        )  # fmt: skip
        return Pass(kernels=tuple(self.kernels), memory=memory)


def _forward(section: Section, kept: tuple[Storage, ...]) -> Pass:
    """Forward run that leaves ``kept`` alive."""
    ledger = _Ledger()
    outside = set() if section.entering is None else {section.entering.storage}
    _run(ledger, section.tape.steps, outside=outside, staying={*kept, section.leaving.storage})
    buffers: dict[Storage, Buffer] = dict.fromkeys(kept, "internal")
    buffers |= {
        value.storage: "carried" for step in section.tape.steps for value in step.outputs if value.storage.role == "carried"
    }
    buffers[section.leaving.storage] = "output"
    return ledger.finish(buffers)


def _run(
    ledger: _Ledger, steps: Sequence[Step], *, outside: set[Storage], staying: set[Storage], cached: Iterable[Storage] = ()
) -> None:
    """Runs steps, freeing what is read no more; ``cached`` results are there already and their kernels do not run."""
    last = {value.storage: index for index, step in enumerate(steps) for value in (*step.inputs, *step.outputs)}
    alive = set(cached)
    for index, step in enumerate(steps):
        made = [value.storage for value in step.outputs]
        fresh = [s for s in dict.fromkeys(made) if s not in alive and s not in outside and s.role != "outside"]
        for storage in fresh:
            ledger.allocate(storage)
        alive.update(fresh)
        if fresh or step.op not in PRODUCTS:
            ledger.kernels.extend(step.kernels)
        for storage in dict.fromkeys(value.storage for value in (*step.inputs, *step.outputs)):
            if storage in alive and last[storage] == index and storage not in staying and storage.role == "activation":
                alive.discard(storage)
                ledger.free(storage)


def _reached(steps: Sequence[Step], missing: set[Storage]) -> tuple[Storage, ...]:
    """What the steps up to the last one that makes a missing storage read and write."""
    ends = [index for index, step in enumerate(steps) for value in step.outputs if value.storage in missing]
    own = steps[: 1 + max(ends, default=-1)]
    return tuple(dict.fromkeys(value.storage for step in own for value in (*step.inputs, *step.outputs)))


class _Backward:
    """One backward run of a section."""

    def __init__(self, section: Section, kept: tuple[Storage, ...], *, accumulate: bool) -> None:
        self.section, self.kept, self.accumulate = section, kept, accumulate
        self.remakes = bool(section.remade) and bool(set(section.saved) - set(kept))
        self.ledger = _Ledger()
        self.incoming = Storage(op="gradient", shape=section.leaving.shape, dtype=section.leaving.dtype, role="outside")
        self.gradients: dict[Value, Storage] = {section.leaving: self.incoming}
        self.holders: Counter[Storage] = Counter({self.incoming: 1})
        self.buffers: dict[Storage, Buffer] = {}
        self.made: set[Parameter] = set()

    def run(self) -> Pass:
        """Recomputes what is missing, then walks the steps from the last to the first."""
        section = self.section
        saved = section.saved
        unread = self._recompute(saved) if set(saved) - set(self.kept) else ()
        first_use: dict[Storage, int] = {}
        for index, step in enumerate(section.tape.steps):
            for value in step.saved:
                first_use.setdefault(value.storage, index)
        ending: dict[int, list[Storage]] = {}
        for storage in saved:
            ending.setdefault(first_use[storage], []).append(storage)
        for index in reversed(range(len(section.tape.steps))):
            self._step(section.tape.steps[index], ending.get(index, []))
        for storage in unread:
            self.ledger.free(storage)
        if section.entering is not None:
            self.buffers[self.gradients[section.entering]] = "grad_input"
            if not self.remakes:
                self.buffers[section.entering.storage] = "saved_input"
        for storage in self.kept:
            self.buffers.setdefault(storage, "internal")
        self.buffers[section.leaving.storage] = "saved_output"
        return self.ledger.finish(self.buffers)

    def _recompute(self, saved: tuple[Storage, ...]) -> tuple[Storage, ...]:
        """Runs again what made the saved storages that were not kept; returns the kept ones that this does not reach."""
        steps, entering = self.section.tape.steps, self.section.entering
        missing = set(saved) - set(self.kept)
        end = 1 + max(index for index, step in enumerate(steps) for value in step.outputs if value.storage in missing)
        outside = set() if entering is None or self.remakes else {entering.storage}
        outside |= {value.storage for step in steps for value in step.outputs if value.storage.role == "carried"}
        cached = set(self.kept)
        if self.remakes and entering is not None:
            self.ledger.allocate(entering.storage)
            self.ledger.kernels.extend(self.section.remade)
            cached.add(entering.storage)
        _run(self.ledger, steps[:end], outside=outside, staying=set(saved), cached=cached)
        read = _reached(steps, missing)
        return tuple(storage for storage in self.kept if storage not in saved and storage not in read)

    def _step(self, step: Step, ending: Sequence[Storage]) -> None:
        """One step's gradients, all made before its incoming gradient and saved tensors go and before any is handed on."""
        incoming = [self.gradients.pop(value) for value in step.outputs if value in self.gradients]
        made = [pair for gradient in step.gradients if incoming for pair in self._make(gradient, incoming[0])]
        for storage in incoming:
            self._release(storage)
        for storage in ending:
            self.ledger.free(storage)
        for target, storage in made:
            if isinstance(target, Parameter):
                self._deliver_parameter(target, storage)
            else:
                self._deliver(target, storage)

    def _make(self, gradient: Gradient, incoming: Storage) -> list[tuple[Target, Storage]]:
        targets = [target for target in gradient.targets if isinstance(target, Parameter) or target.needs_gradient]
        if gradient.passes_on:
            made = [incoming] * len(targets)
        else:
            made = [Storage(op="gradient", shape=target.shape, dtype=target.dtype) for target in targets]
            for storage in made:
                self.ledger.allocate(storage)
            scratch = Storage(op="scratch", shape=(gradient.scratch_bytes,), dtype="uint8")
            self.ledger.allocate(scratch)
            self.ledger.kernels.extend(gradient.kernels)
            self.ledger.free(scratch)
        self.holders.update(made)
        return list(zip(targets, made, strict=True))

    def _deliver(self, target: Value, storage: Storage) -> None:
        known = self.gradients.get(target)
        if known is None:
            self.gradients[target] = storage
            return
        own = next((held for held in (known, storage) if self.holders[held] == 1 and held.role == "activation"), None)
        total = own or Storage(op="gradient", shape=target.shape, dtype=target.dtype)
        if own is None:
            self.ledger.allocate(total)
            self.holders[total] += 1
        self.ledger.kernels.append(pointwise("add", target.elements, target.dtype, num_read=2))
        self.gradients[target] = total
        for held in (known, storage):
            if held is not total:
                self._release(held)

    def _deliver_parameter(self, parameter: Parameter, storage: Storage) -> None:
        """A first gradient becomes the parameter's own; a later one is added to it."""
        exists = parameter in self.made or (not self.section.makes_shared if parameter.shared else self.accumulate)
        if exists:
            self.ledger.kernels.append(pointwise("add_", parameter.elements, parameter.dtype, num_read=2))
            self._release(storage)
        else:
            self.made.add(parameter)
            self.buffers[storage] = "shared_gradient" if parameter.shared else "gradient"

    def _release(self, storage: Storage) -> None:
        self.holders[storage] -= 1
        if self.holders[storage] == 0 and storage.role == "activation":
            self.ledger.free(storage)
