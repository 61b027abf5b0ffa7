"""Record the tensor graph of a block: which operator reads and writes which storage of its forward pass."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hardware_models.kernel import Kernel
from simulator.tensor_graph import GraphOperation, GraphTensor, TensorGraph
from simulator.tracing.live_storages import storage_of
from simulator.tracing.record import Phase, RecordedRun, Recorder, Setting


@dataclass(slots=True, kw_only=True, eq=False)
class _Step:
    name: str
    kernels: list[Kernel] = field(default_factory=list)
    reads: list[int] = field(default_factory=list)
    writes: list[int] = field(default_factory=list)
    is_repeatable: bool = True


class _GraphRecorder(Recorder):
    """Also writes down what each operator of the forward pass reads and writes."""

    def __init__(self) -> None:
        super().__init__()
        self.steps: list[_Step] = []
        self._maker: dict[int, _Step] = {}

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if self.phase is not Phase.FORWARD:
            return super().__torch_dispatch__(func, types, args, kwargs)
        reads = self._serials_of((args, kwargs))
        changed = self._changed(func, args)
        num_kernels = len(self.kernels[self.phase])
        out = super().__torch_dispatch__(func, types, args, kwargs)
        made = [serial for serial in self._serials_of(out) if serial not in reads]
        kernels = self.kernels[self.phase][num_kernels:]
        if kernels or made:
            self._add(func, kernels, reads, made, changed)
        return out

    def _add(self, func: Any, kernels: list[Kernel], reads: list[int], made: list[int], changed: list[int]) -> None:
        """A step of its own, or a part of the step whose result it changes, which then comes last."""
        step = _Step(name=func.overloadpacket.__name__)
        for owner in dict.fromkeys(id(self._maker[serial]) for serial in changed if serial in self._maker):
            self._absorb(step, owner)
        self.steps.append(step)
        step.kernels += kernels
        step.reads += [serial for serial in reads if serial not in step.writes and serial not in step.reads]
        step.writes += made
        outside = [serial for serial in changed if serial not in self._maker]
        step.is_repeatable &= not outside and torch.Tag.nondeterministic_seeded not in func.tags
        for serial in step.writes:
            self._maker[serial] = step

    def _absorb(self, step: _Step, owner: int) -> None:
        """Takes in a step, and those after it that read what it made before the change."""
        first = next((place for place, known in enumerate(self.steps) if id(known) == owner), None)
        if first is None:
            return
        rest: list[_Step] = []
        for place, known in enumerate(self.steps[first:]):
            if place and not set(known.reads) & set(step.writes):
                rest.append(known)
                continue
            step.name = known.name if not place else step.name
            step.kernels += known.kernels
            step.reads += [serial for serial in known.reads if serial not in step.writes and serial not in step.reads]
            step.writes += known.writes
            step.is_repeatable &= known.is_repeatable
        self.steps[first:] = rest

    def _serials_of(self, tree: Any) -> list[int]:
        found = [
            self.serial(leaf)
            for leaf in tree_leaves(tree)
            if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes() and self.knows(leaf)
        ]
        return list(dict.fromkeys(found))

    def _changed(self, func: Any, args: Any) -> list[int]:
        written = [
            value
            for argument, value in zip(func._schema.arguments, args, strict=False)  # noqa: SLF001 - torch's only access to it
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor)
        ]
        return self._serials_of(written)

    def knows(self, tensor: torch.Tensor) -> bool:
        """Whether the tensor's storage has been seen."""
        return storage_of(tensor) in self._serials


def record_graph(setting: Setting) -> TensorGraph:
    """The tensor graph of a block's forward pass under option ``all``.

    **Not modelled**: an operator whose result is changed in place counts as one with the change, and so do those that read it in between.
    """
    recorder = _GraphRecorder()
    run = RecordedRun(setting, recorder)
    run.train("all", accumulate=False)
    made = [serial for step in recorder.steps for serial in step.writes]
    own = ([run.input_serial] if run.input_serial >= 0 else []) + made
    number = {serial: place for place, serial in enumerate(own)}
    boundaries = {run.input_serial, *run.roles}
    tensors = tuple(
        GraphTensor(
            name=recorder.origins[serial].op,
            size_bytes=recorder.origins[serial].size_bytes,
            is_saved=serial in run.kept,
            is_boundary=serial in boundaries,
        )
        for serial in own
    )
    operations = tuple(
        GraphOperation(
            name=step.name, kernels=tuple(step.kernels), reads=tuple(number[serial] for serial in step.reads if serial in number),
            writes=tuple(number[serial] for serial in step.writes), is_repeatable=step.is_repeatable,
        )
        for step in recorder.steps
    )  # fmt: skip
    return TensorGraph(tensors=tensors, operations=operations)
