"""Record: run a block on fakes under each option and write down its passes: kernels in order, bytes as they come and go."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from enum import IntEnum
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hardware_models.kernel import Kernel
from simulator.tracing.block_graph import BlockGraph
from simulator.tracing.block_run import SELECTIVE_KEEPS, MicroBatch
from simulator.tracing.capture import Capture
from simulator.tracing.cut import Chain
from simulator.tracing.kernels_of import dtype_name, kernels_of
from simulator.tracing.live_storages import LiveStorages, storage_of
from simulator.tracing.side_values import fake_activations
from simulator.tracing.split_backward import input_gradient, weight_gradients
from simulator.workload import Block, BlockOption, Buffer, MemoryEvent, ParameterTensor, Pass, SavedTensor, SplitBackward


class Phase(IntEnum):
    """Of a recorded run."""

    SETUP = 0
    FORWARD = 1
    LET_GO = 2
    """The runner drops the block's input and output; what stays alive is held by the graph."""
    BACKWARD = 3
    HAND_ON = 4
    """Between a backward pass for the input and one for the weights: the runner drops the boundaries' gradients."""
    WEIGHTS = 5
    END = 6


@dataclass(frozen=True, slots=True, kw_only=True)
class _Event:
    phase: Phase
    kernel: int
    serial: int
    delta_bytes: int


class Recorder(LiveStorages):
    """Writes down the kernels and the storages' lives of one block's run, phase by phase."""

    def __init__(self) -> None:
        super().__init__(self._change)
        self.phase = Phase.SETUP
        self.events: list[_Event] = []
        self.kernels: dict[Phase, list[Kernel]] = {phase: [] for phase in Phase}
        self.origins: dict[int, SavedTensor] = {}
        """By serial: what each storage was when it appeared."""
        self.changes_products = False
        """Whether an operator changed the result of a product in place: option ``selective`` could not use what it kept."""
        self._products: set[int] = set()
        self._serials: dict[int, int] = {}

    def serial(self, tensor: torch.Tensor) -> int:
        """A number for a tensor's storage that no other storage of this recording has."""
        return self._serials[storage_of(tensor)]

    @property
    def alive(self) -> frozenset[int]:
        """Serials of the storages that exist now."""
        return frozenset(self._serials.values())

    def _change(self, identity: int, delta_bytes: int) -> None:
        if delta_bytes > 0:
            self._serials[identity] = len(self.events)
        serial = self._serials[identity] if delta_bytes > 0 else self._serials.pop(identity)
        kernel = len(self.kernels[self.phase])
        self.events.append(_Event(phase=self.phase, kernel=kernel, serial=serial, delta_bytes=delta_bytes))

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        kernels = kernels_of(func, (*args, *(kwargs or {}).values()), out)
        operator = func.overloadpacket.__name__
        self._watch_products(func, args)
        for tensor in tree_leaves(out):
            if isinstance(tensor, torch.Tensor) and tensor.untyped_storage().nbytes():
                self.add((tensor,))
                self.origins.setdefault(self.serial(tensor), _saved_tensor(operator, tensor))
                if operator in SELECTIVE_KEEPS:
                    self._products.add(self.serial(tensor))
        self.kernels[self.phase].extend(kernels)
        return out

    def _watch_products(self, func: Any, args: Any) -> None:
        for argument, value in zip(func._schema.arguments, args, strict=False):  # noqa: SLF001 - torch's only access to it
            if argument.alias_info is not None and argument.alias_info.is_write and isinstance(value, torch.Tensor):
                self.changes_products |= self._serials.get(storage_of(value)) in self._products


def _saved_tensor(operator: str, tensor: torch.Tensor) -> SavedTensor:
    return SavedTensor(
        op=operator, shape=tuple(tensor.shape), dtype=dtype_name(tensor.dtype), size_bytes=tensor.untyped_storage().nbytes()
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A block at its place, and which gradients exist when its backward pass runs."""

    chain: Chain
    index: int
    shared: frozenset[str]
    """Parameters that several blocks use."""
    fresh_shared: frozenset[str]
    """Those of them whose gradient this block is the first to make (backward runs from the end)."""

    @property
    def block(self) -> BlockGraph:
        """The block's graph."""
        return self.chain.blocks[self.index]


def record_block(setting: Setting, *, selective: bool = True) -> Block:
    """The `Block` at a place of the chain, recorded under every option.

    Args:
        setting: the block at its place.
        selective: whether the option of that name is asked for.

    Returns:
        ``options[0]`` keeps what autograd keeps. ``selective`` is there only where it keeps less and can use what it keeps.
    """
    everything, changes_products = _record_option(setting, "all")
    options: tuple[BlockOption, ...] = (everything,)
    if selective and not changes_products:
        products, _ = _record_option(setting, "selective")
        if products.saved_internal_bytes < everything.saved_internal_bytes:
            options = (everything, products)
    discard, output_bytes = _record_discard(setting)
    captured = setting.chain.capture
    own = [name for name in setting.block.names("p") if name not in setting.shared]
    parameters = [captured.parameters[name] for name in own]
    trained = [captured.parameters[name] for name in own if name in captured.trained]
    boundary = setting.chain.boundaries[setting.index]
    return Block(
        name=setting.block.name, input_bytes=0 if boundary is None else boundary.untyped_storage().nbytes(),
        output_bytes=output_bytes, parameter_elements=sum(parameter.numel() for parameter in trained),
        parameter_bytes=_num_bytes(parameters), gradient_bytes=_num_bytes(trained), discard=discard, options=options,
        state_bytes=_num_bytes([captured.buffers[name] for name in setting.block.mutated_buffers]),
        parameters=parameter_tensors(captured, own),
    )  # fmt: skip


def parameter_tensors(captured: Capture, names: Sequence[str]) -> tuple[ParameterTensor, ...]:
    """Sizes of parameters by name."""
    return tuple(
        ParameterTensor(elements=value.numel(), size_bytes=_num_bytes([value]), trained=name in captured.trained)
        for name in names
        for value in [captured.parameters[name]]
    )


def _num_bytes(tensors: Sequence[torch.Tensor]) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _record_option(setting: Setting, name: str) -> tuple[BlockOption, bool]:
    """The option, and whether the block changes the results of its products in place."""
    first = RecordedRun(setting)
    first.train(name, accumulate=False)
    later = RecordedRun(setting)
    later.train(name, accumulate=True)
    option = BlockOption(
        name=name, forward=first.pass_of(Phase.FORWARD), backward=first.pass_of(Phase.BACKWARD),
        backward_accumulate=later.pass_of(Phase.BACKWARD), keeps_input=first.input_serial in first.kept,
        keeps_output=first.output_serial in first.kept, saved=first.saved_tensors(),
    )  # fmt: skip
    return option, first.recorder.changes_products


def record_split(setting: Setting) -> SplitBackward:
    """The backward pass of a block that has an input, in two: recorded like the whole one."""
    first, later = RecordedRun(setting), RecordedRun(setting)
    first.train_split(accumulate=False)
    later.train_split(accumulate=True)
    return SplitBackward(
        inputs=later.pass_of(Phase.BACKWARD), weights=first.weights_pass(), weights_accumulate=later.pass_of(Phase.WEIGHTS),
        keeps_grad_input=first.grad_input_serial in first.waiting, keeps_grad_output=first.grad_serial in first.waiting,
    )  # fmt: skip


def _record_discard(setting: Setting) -> tuple[Pass, int]:
    run = RecordedRun(setting)
    output_bytes = run.discard()
    return run.pass_of(Phase.FORWARD), output_bytes


class RecordedRun:
    """One recorded run of a block: who holds what is told apart by when it ends."""

    def __init__(self, setting: Setting, recorder: Recorder | None = None) -> None:
        self.setting = setting
        self.recorder = recorder or Recorder()
        self.input_serial = self.output_serial = self.grad_serial = self.grad_input_serial = -1
        self.kept: frozenset[int] = frozenset()
        self.policy_calls = 0
        self.packed: list[int] = []
        """Serials of the block's own storages in the order in which autograd first saves them."""
        self.waiting: frozenset[int] = frozenset()
        """What is alive between the input's gradient and the weights' ones."""
        self.roles: dict[int, Buffer] = {}
        self.gradient_roles: dict[int, Buffer] = {}

    def discard(self) -> int:
        """Runs forward without a graph; returns the output's bytes."""
        with fake_activations(self.setting.chain.capture.fake_mode):
            micro_batch, x = self._prepare(accumulate=False)
            with self.recorder:
                self.recorder.phase = Phase.FORWARD
                y = micro_batch.discard(self.setting.block, x)
                self._name_outputs(micro_batch, y)
                self.recorder.phase = Phase.END
        return y.untyped_storage().nbytes()

    def train(self, option: str, *, accumulate: bool) -> None:
        """Runs forward with a graph, drops input and output, runs backward."""
        block = self.setting.block
        with fake_activations(self.setting.chain.capture.fake_mode):
            micro_batch, x = self._prepare(accumulate=accumulate)
            with self.recorder:
                self.recorder.phase = Phase.FORWARD
                y, *tapes = micro_batch.save(block, x, option, lambda tensor: self.packed.append(self.recorder.serial(tensor)))
                self.policy_calls = tapes[0].policy_calls
                self._name_outputs(micro_batch, y)
                self.recorder.phase = Phase.LET_GO
                grad = _like(y)
                del x, y
                self.kept = self.recorder.alive
                self.recorder.add((grad,))
                self.recorder.phase = Phase.BACKWARD
                grad_input = micro_batch.backward(tapes.pop(), grad)  # the pass is over when what it went through is gone
                self._name_gradients(micro_batch, grad, grad_input)
                self.recorder.phase = Phase.END

    def train_split(self, *, accumulate: bool) -> None:
        """Runs forward with a graph, drops input and output, makes the input's gradient, drops gradients, makes the weights' ones."""
        block = self.setting.block
        with fake_activations(self.setting.chain.capture.fake_mode):
            micro_batch, x = self._prepare(accumulate=accumulate)
            with self.recorder:
                self.recorder.phase = Phase.FORWARD
                y, tape = micro_batch.save(block, x, "all")
                self._name_outputs(micro_batch, y)
                self.recorder.phase = Phase.LET_GO
                grad = _like(y)
                del x, y
                self.kept = self.recorder.alive
                self.recorder.add((grad,))
                self.grad_serial = self.recorder.serial(grad)
                self.recorder.phase = Phase.BACKWARD
                grad_input, weight_tape = input_gradient(tape, grad)
                del tape
                self._name_gradients(micro_batch, grad, grad_input)
                self.grad_input_serial = -1 if grad_input is None else self.recorder.serial(grad_input)
                self.recorder.phase = Phase.HAND_ON
                del grad, grad_input
                self.waiting = self.recorder.alive
                self.kept |= self.waiting
                self.recorder.phase = Phase.WEIGHTS
                weight_gradients(weight_tape)
                self._name_gradients(micro_batch, None, None)
                self.recorder.phase = Phase.END

    def pass_of(self, phase: Phase) -> Pass:
        """The kernels and memory events of the forward or the backward phase."""
        events = [event for event in self.recorder.events if event.phase is phase]
        if phase is Phase.FORWARD:
            events += self._let_go_events()
        net: dict[int, int] = {}
        for event in events:
            net[event.serial] = net.get(event.serial, 0) + event.delta_bytes
        memory = tuple(
            MemoryEvent(kernel=one.kernel, buffer=self._buffer(phase, one.serial, net[one.serial]), delta_bytes=one.delta_bytes) for one in events
        )  # fmt: skip
        return Pass(kernels=tuple(self.recorder.kernels[phase]), memory=memory, policy_calls=self.policy_calls)

    def weights_pass(self) -> Pass:
        """The kernels and events of the weights' phase; what arrived before and is a parameter's gradient as it stands becomes one at its end."""
        run = self.pass_of(Phase.WEIGHTS)
        arrived = {
            event.serial: event.delta_bytes
            for event in self.recorder.events
            if event.phase is Phase.BACKWARD and event.delta_bytes > 0
        }
        became: list[MemoryEvent] = []
        for serial, role in self.gradient_roles.items():
            if serial in arrived and role in {"gradient", "shared_gradient"}:
                changes: tuple[tuple[Buffer, int], ...] = (("internal", -arrived[serial]), (role, arrived[serial]))
                became += [MemoryEvent(kernel=len(run.kernels), buffer=buffer, delta_bytes=size) for buffer, size in changes]
        return Pass(kernels=run.kernels, memory=(*run.memory, *became))

    def _let_go_events(self) -> list[_Event]:
        """Storages other than the boundaries that ended with them: freed at the end of the forward pass."""
        kernel = len(self.recorder.kernels[Phase.FORWARD])
        boundaries = {self.input_serial, self.output_serial}
        return [
            _Event(phase=Phase.FORWARD, kernel=kernel, serial=event.serial, delta_bytes=event.delta_bytes)
            for event in self.recorder.events
            if event.phase is Phase.LET_GO and event.delta_bytes < 0 and event.serial not in boundaries
        ]

    def saved_tensors(self) -> tuple[SavedTensor, ...]:
        """What the graph keeps, in the order in which it appeared."""
        made = {event.serial for event in self.recorder.events if event.phase is Phase.FORWARD}
        origins = self.recorder.origins
        kept = sorted(serial for serial in self.kept if serial in made or serial == self.input_serial)
        places = {serial: place for place, serial in enumerate(self.packed) if serial not in self.roles}
        return tuple(
            replace(origins[serial], packed=places.get(serial, -1))
            for serial in kept
            if serial in origins and self.roles.get(serial) != "carried"
        )

    def _prepare(self, *, accumulate: bool) -> tuple[MicroBatch, torch.Tensor | None]:
        """A micro-batch on fakes around the block, all that is alive before it known to the recorder."""
        chain, block, shared = self.setting.chain, self.setting.block, self.setting.shared
        first = next(iter(chain.capture.parameters), "")  # tells the device
        used = {first, *block.names("p")}  # a model has hundreds of others
        parameters = {
            name: value.detach().requires_grad_(value.requires_grad)
            for name, value in chain.capture.parameters.items()
            if name in used
        }
        micro_batch = MicroBatch(
            parameters=parameters, buffers=chain.capture.buffers, inputs=chain.capture.inputs, shared=shared, precision=chain.capture.precision,
            carried={name: value for name, value in chain.carried.items() if name not in block.carried_out},
        )  # fmt: skip
        micro_batch.arguments(block, None)  # makes the aliases of the shared parameters that the block uses
        for name in block.names("p"):
            leaf = micro_batch.aliases[name] if name in shared else parameters[name]
            exists = name not in self.setting.fresh_shared if name in shared else accumulate
            if exists and leaf.requires_grad:
                leaf.grad = _like(leaf)
                self.recorder.add((leaf.grad,))
        carried = [leaf for leaf in tree_leaves(chain.carried) if isinstance(leaf, torch.Tensor)]
        self.recorder.add([*parameters.values(), *chain.capture.buffers.values(), *chain.capture.inputs.values(), *carried])
        boundary = chain.boundaries[self.setting.index]
        if boundary is None:
            return micro_batch, None
        x = _like(boundary)
        self.recorder.add((x,))
        self.input_serial = self.recorder.serial(x)
        self.recorder.origins[self.input_serial] = _saved_tensor("input", x)
        return micro_batch, x

    def _name_outputs(self, micro_batch: MicroBatch, y: torch.Tensor) -> None:
        for name in self.setting.block.carried_out:
            for leaf in tree_leaves(micro_batch.carried[name]):
                if isinstance(leaf, torch.Tensor) and leaf.untyped_storage().nbytes():
                    self.roles[self.recorder.serial(leaf)] = "carried"
        self.output_serial = self.recorder.serial(y)
        self.roles[self.output_serial] = "output"

    def _name_gradients(self, micro_batch: MicroBatch, grad: torch.Tensor | None, grad_input: torch.Tensor | None) -> None:
        """Which storages, alive after the backward pass, are whose gradient."""
        if grad is not None and grad_input is not None and self.recorder.serial(grad_input) == self.recorder.serial(grad):
            self._pass_on(grad)
        named: list[tuple[Buffer, torch.Tensor | None]] = [("grad_input", grad_input)]
        for name in self.setting.block.names("p"):
            if name in self.setting.shared:
                named.append(("shared_gradient", micro_batch.aliases[name].grad))
            else:
                named.append(("gradient", micro_batch.parameters[name].grad))
        for buffer, tensor in named:
            if tensor is not None:
                self.gradient_roles[self.recorder.serial(tensor)] = buffer

    def _pass_on(self, grad: torch.Tensor) -> None:
        """The block handed its output's gradient on as its input's: written down as a new one, as the old one is let go."""
        serial = self.recorder.serial(grad)
        kernel = len(self.recorder.kernels[Phase.BACKWARD])
        size = grad.untyped_storage().nbytes()
        self.recorder.events.append(_Event(phase=Phase.BACKWARD, kernel=kernel, serial=serial, delta_bytes=size))

    def _buffer(self, phase: Phase, serial: int, net_bytes: int) -> Buffer:
        if phase is Phase.FORWARD:
            return self.roles.get(serial, "internal" if net_bytes else "transient")
        if serial == self.input_serial:
            return "saved_input"
        if serial == self.output_serial:
            return "saved_output"
        if phase is Phase.WEIGHTS and serial in {self.grad_serial, self.grad_input_serial}:
            return "kept_grad_output" if serial == self.grad_serial else "kept_grad_input"
        if serial in self.gradient_roles:
            return self.gradient_roles[serial]
        return "transient" if serial not in self.kept else "internal"


def _like(tensor: torch.Tensor) -> torch.Tensor:
    """A new tensor with the same shape, strides and dtype in memory of its own."""
    return torch.empty_strided(tensor.shape, tensor.stride(), dtype=tensor.dtype, device=tensor.device)
