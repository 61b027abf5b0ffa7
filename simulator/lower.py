"""Lower: a workload under a sequence, with prices -> Program. Here is decided when each byte comes and goes."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from typing import Any, TypeVar

import numpy as np
from numpy.typing import NDArray

from hardware_models.kernel import Kernel
from hardware_models.profile import DeviceProfile
from simulator.builder import Builder
from simulator.host_schedule import HostSchedule, updated_groups
from simulator.lower_host import HostIssuer, HostLanes, device_resident
from simulator.optimizer_states import OPTIMIZER_PASSES, OPTIMIZER_STATES, STEP_COUNT_BYTES
from simulator.program import Kind, MemoryClass, Program
from simulator.sequence import Operation, check_sequence, runs_twice
from simulator.workload import BlockOption, MemoryEvent, Pass, Workload

Derived = TypeVar("Derived")
Price = Callable[[Sequence[Kernel]], NDArray[np.float64]]
"""Seconds of each kernel, the time that its launch takes included."""


class PassPrices:
    """Times within passes; each distinct pass is priced once for the life of this object.

    Args:
        price: of kernels.
        policy_s: of the host for each of a pass's ``policy_calls``, which its kernels wait for (`policy_seconds`); they are taken to lie evenly between them.
    """

    def __init__(self, price: Price, *, policy_s: float = 0.0) -> None:
        self._price, self._policy_s = price, policy_s
        self._offsets: dict[int, tuple[Pass, NDArray[np.float64]]] = {}
        self._derived: dict[Hashable, Any] = {}

    def offsets(self, run: Pass) -> NDArray[np.float64]:
        """Start time of each kernel within a pass, and last the pass's duration; shape (kernels + 1,)."""
        key = id(run)
        if key not in self._offsets:
            self._keep(run, self._price(run.kernels) if run.kernels else np.zeros(0))
        return self._offsets[key][1]

    def once(self, key: Hashable, derive: Callable[[], Derived]) -> Derived:
        """What ``derive`` makes of these prices, made on the first call under a key."""
        if key not in self._derived:
            self._derived[key] = derive()
        found: Derived = self._derived[key]
        return found

    def fill(self, runs: Sequence[Pass]) -> None:
        """Prices passes together, which is faster than one by one."""
        self.fill_all([(self, runs)])

    @staticmethod
    def fill_all(wanted: Sequence[tuple[PassPrices, Sequence[Pass]]]) -> None:
        """The same for several models with one price of kernels: the first one's counts."""
        new = [(own, {id(run): run for run in runs if id(run) not in own._offsets and run.kernels}) for own, runs in wanted]  # noqa: SLF001 - of this class
        kernels = [kernel for _, runs in new for run in runs.values() for kernel in run.kernels]
        times, end = wanted[0][0]._price(kernels) if kernels else np.zeros(0), 0  # noqa: SLF001
        for own, runs in new:
            for run in runs.values():
                first, end = end, end + len(run.kernels)
                own._keep(run, times[first:end])  # noqa: SLF001

    def _keep(self, run: Pass, times: NDArray[np.float64]) -> None:
        if run.policy_calls and len(times):
            times = times + self._policy_s * run.policy_calls / len(times)
        self._offsets[id(run)] = (run, np.concatenate(([0.0], np.cumsum(times))))

    def seconds(self, run: Pass) -> float:
        """Duration of a pass."""
        return float(self.offsets(run)[-1])


def policy_seconds(device: DeviceProfile) -> float:
    """What a step's kernels wait for at each operator that selective checkpointing asks its policy about.

    **Not modelled**: GPUs, whose kernels wait for the host only where it is slower than they are.
    """
    return device.checkpoint_policy_s if device.kind == "cpu" else 0.0


def resident_bytes(workload: Workload, *, num_microbatches: int, optimizer: str) -> tuple[int, ...]:
    """Bytes alive before a step begins, by `MemoryClass`: parameters, optimizer states and the whole batch; no gradients."""
    sizes = [0] * len(MemoryClass)
    sizes[MemoryClass.PARAMETERS] = workload.parameter_bytes + workload.buffer_bytes
    sizes[MemoryClass.OPTIMIZER_STATES] = OPTIMIZER_STATES[optimizer] * workload.gradient_bytes + STEP_COUNT_BYTES[
        optimizer
    ] * len(workload.optimizer_tensors)
    sizes[MemoryClass.BATCH] = num_microbatches * workload.batch_bytes
    return tuple(sizes)


def optimizer_pass(workload: Workload, *, optimizer: str, tensors: Sequence[int] | None = None) -> Pass:
    """The optimizer's fused step, one kernel a parameter tensor; where the loss was scaled one more that scales each gradient back.

    Args:
        workload: of the step.
        optimizer: ``adamw`` or ``sgd``.
        tensors: elements of each parameter that it updates; None: of all.
    """
    element_bytes = workload.gradient_bytes // max(1, sum(workload.optimizer_tensors))
    updated = workload.optimizer_tensors if tensors is None else tensors
    sizes = [(elements, elements * element_bytes) for elements in updated]
    return optimizer_elements_pass(sizes, optimizer=optimizer, loss_scaled=workload.loss_scaled)


def _scaling_kernels(tensors: Sequence[tuple[int, int]]) -> tuple[Kernel, ...]:
    """Gradients of (elements, bytes) scaled back in place, looking for infinities on the way.

    **Source**: torch 2.13, torch/amp/grad_scaler.py (``_unscale_grads_``); Micikevicius et al. 2018, "Mixed precision training", section 3.2.
    """
    return tuple(
        Kernel(
            kernel_class="pointwise", op="_amp_foreach_non_finite_check_and_unscale_", shape=(elements,), dtype="float32", flops=0,
            read_bytes=size_bytes, written_bytes=size_bytes,
        )
        for elements, size_bytes in tensors
    )  # fmt: skip


def optimizer_elements_pass(tensors: Sequence[tuple[int, int]], *, optimizer: str, loss_scaled: bool = False) -> Pass:
    """The optimizer's fused step over tensors of (elements, bytes), one kernel each; after a scaled loss one more each."""
    reads, writes = OPTIMIZER_PASSES[optimizer]
    kernels = tuple(
        Kernel(
            kernel_class="optimizer", op=optimizer, shape=(elements,), dtype="float32", flops=0,
            read_bytes=reads * size_bytes, written_bytes=writes * size_bytes,
        )
        for elements, size_bytes in tensors
    )  # fmt: skip
    return Pass(kernels=(*_scaling_kernels(tensors), *kernels) if loss_scaled else kernels, memory=())


def lower(
    workload: Workload,
    operations: Sequence[Operation],
    prices: PassPrices,
    *,
    num_microbatches: int = 1,
    optimizer: str = "adamw",
    host: HostSchedule | None = None,
    lanes: HostLanes | None = None,
) -> Program:
    """The program of one training step on one device.

    Args:
        workload: one micro-batch.
        operations: the order in which each micro-batch runs the blocks.
        prices: times of the workload's passes on the device.
        num_microbatches: gradients of so many micro-batches are accumulated before the optimizer's step.
        optimizer: ``adamw`` or ``sgd``.
        host: what goes to the host and when; None: nothing.
        lanes: the way there; given with ``host``.

    Raises:
        InputError: the sequence is illegal for the workload's chain.

    Not modelled: what the step of the data loader takes; gradient clipping.
    """
    check_sequence(operations, len(workload.blocks))
    builder = Builder(lanes=lanes)
    states = OPTIMIZER_STATES[optimizer]
    issuer = None if host is None or lanes is None else HostIssuer(builder, host, lanes, workload, states)
    for micro_batch in range(num_microbatches):
        one = MicroBatchLowering(workload, prices, builder, micro_batch, runs_twice(operations))
        one.issuer = issuer
        one.run(operations)
    if issuer is None:
        builder.issue(Kind.OPTIMIZER, prices.seconds(optimizer_pass(workload, optimizer=optimizer)))
        builder.change(builder.last_duration_s, -workload.gradient_bytes, MemoryClass.GRADIENTS)
    else:
        _updates(workload, prices, issuer, optimizer)
    builder.change(builder.last_duration_s, -workload.blocks[-1].output_bytes, MemoryClass.ACTIVATIONS)
    sizes = resident_bytes(workload, num_microbatches=num_microbatches, optimizer=optimizer)
    return builder.program(device_resident(workload, host, sizes, states=states, step_bytes=STEP_COUNT_BYTES[optimizer]))


def _updates(workload: Workload, prices: PassPrices, issuer: HostIssuer, optimizer: str) -> None:
    """The device's updates: first of the parameters that stay, then of each block that has some on the host; then the end."""
    builder, schedule = issuer.builder, issuer.schedule
    for block, group in updated_groups(workload, schedule):
        issuer.before()
        builder.issue(
            Kind.OPTIMIZER,
            prices.seconds(optimizer_pass(workload, optimizer=optimizer, tensors=[one.elements for one in group])),
            block=block,
        )
        builder.change(builder.last_duration_s, -sum(one.size_bytes for one in group), MemoryClass.GRADIENTS)
        issuer.after()
    issuer.end()


class MicroBatchLowering:
    """Issues one micro-batch's operations. Boundaries are freed when the last of their holders lets go.

    A pipeline stage ``receives`` its first boundary and ``sends`` its last one; the whole model does neither.
    """

    def __init__(
        self,
        workload: Workload,
        prices: PassPrices,
        builder: Builder,
        micro_batch: int,
        twice: frozenset[int],
        *,
        receives: bool = False,
        sends: bool = False,
    ) -> None:
        self.receives, self.sends = receives, sends
        self.workload, self.prices, self.builder, self.micro_batch = workload, prices, builder, micro_batch
        self.twice = twice
        self.state_bytes = 0
        self.holders: dict[int, set[str]] = {}
        self.tapes: dict[int, str] = {}
        self.ran_before: set[int] = set()
        self.gradient_of: dict[int, int] = {}
        """Bytes of the gradient of each boundary that has one now."""
        self.carried_bytes = 0
        self.shared_bytes = 0
        self.first_micro_batch = micro_batch == 0
        self.issuer: HostIssuer | None = None

    def run(self, operations: Sequence[Operation]) -> None:
        """Issues the operations in their order."""
        self.run_part(operations, 0, len(operations))
        self._finish()

    def run_part(self, operations: Sequence[Operation], first: int, end: int) -> None:
        """Issues the operations from ``first`` up to ``end``."""
        for position, operation in enumerate(operations[first:end], start=first):
            if self.issuer is not None:
                self.issuer.before()
            if operation.kind == "B":
                self._backward(operation.block)
            else:
                following = operations[position + 1] if position + 1 < len(operations) else None
                consumed = following is not None and following.kind != "B" and following.block == operation.block + 1
                self._forward(operation, output_needed=consumed)
            if self.issuer is not None:
                self.issuer.after()

    def _boundary_bytes(self, boundary: int) -> int:
        if boundary:
            return self.workload.blocks[boundary - 1].output_bytes
        return self.workload.blocks[0].input_bytes if self.receives else 0

    def _let_go(self, boundary: int, holder: str, time_s: float) -> None:
        holders = self.holders.get(boundary, set())
        if holder in holders:
            holders.remove(holder)
            if not holders:
                self.builder.change(time_s, -self._boundary_bytes(boundary), MemoryClass.ACTIVATIONS)

    def _forward(self, operation: Operation, *, output_needed: bool) -> None:
        kind, index, name = operation
        block = self.workload.blocks[index]
        saves = kind == "F_all"
        option = block.option(name) if saves else None
        run = option.forward if option else block.discard
        again = index in self.ran_before
        offsets = self.prices.offsets(run)
        self.builder.issue(
            Kind.RECOMPUTE if again else Kind.FORWARD, offsets[-1], micro_batch=self.micro_batch, block=index, option=name
        )
        if index == 0 and not again and self.receives:
            self._receive_input()
        self._copy_state(index, again=again)
        self._forward_events(run, offsets, index, again=again)
        end = float(offsets[-1])
        self._drop_state_copy(index, end, again=again)
        if index == len(self.workload.blocks) - 1 and not again and not self.sends:
            self.builder.change(end, block.output_bytes, MemoryClass.ACTIVATIONS)  # the loss, scaled by the share of the batch
        self.ran_before.add(index)
        if again:
            self._drop_duplicates(run, end)
        if kind == "F_ck":
            self.holders.setdefault(index, set()).add("checkpoint")
        if option:
            self.tapes[index] = name
            if option.keeps_input:
                self.holders.setdefault(index, set()).add(self._tape(index))
            if option.keeps_output:
                self.holders[index + 1].add(self._tape(index))
        self._let_go(index, "flow", end)
        if kind != "F_ck":
            self._let_go(index, "checkpoint", end)
        if not output_needed:
            self._hand_on(index + 1, end)

    def _tape(self, index: int) -> str:
        """Name of a block's graph among the holders of its boundaries."""
        return f"tape {index}"

    def _receive_input(self) -> None:
        self.builder.change(0.0, self._boundary_bytes(0), MemoryClass.ACTIVATIONS)
        self.holders[0] = {"flow"}

    def _hand_on(self, boundary: int, time_s: float) -> None:
        """No operation of this sequence takes the boundary next."""
        self._let_go(boundary, "flow", time_s)

    def _receive_gradient(self, boundary: int) -> None:
        """The gradient of the last boundary."""
        self.gradient_of[boundary] = self._boundary_bytes(boundary)
        self.builder.change(0.0, self.gradient_of[boundary], MemoryClass.ACTIVATIONS)

    def _hand_back(self) -> None:
        """The input's gradient goes to the rank before."""
        self.builder.change(self.builder.last_duration_s, -self.gradient_of.pop(0, 0), MemoryClass.ACTIVATIONS)

    def _copy_state(self, index: int, *, again: bool) -> None:
        """A block that runs twice keeps its state before the first run, and sets the present one aside while it runs again."""
        if index in self.twice:
            state_bytes = self.workload.blocks[index].state_bytes
            self.builder.change(0.0, state_bytes, MemoryClass.ACTIVATIONS)
            self.state_bytes += 0 if again else state_bytes

    def _drop_state_copy(self, index: int, end: float, *, again: bool) -> None:
        if index in self.twice and again:
            self.builder.change(end, -self.workload.blocks[index].state_bytes, MemoryClass.ACTIVATIONS)

    def _forward_events(self, run: Pass, offsets: NDArray[np.float64], index: int, *, again: bool) -> None:
        for event in run.memory:
            self._forward_event(event, offsets, index, again=again)

    def _forward_event(self, event: MemoryEvent, offsets: NDArray[np.float64], index: int, *, again: bool) -> None:
        time_s = float(offsets[event.kernel])
        memory_class = MemoryClass.TRANSIENT if event.buffer == "transient" else MemoryClass.ACTIVATIONS
        if event.buffer == "output":
            self.holders.setdefault(index + 1, set()).add("flow")
        elif event.buffer == "carried" and not again:
            self.carried_bytes += event.delta_bytes
        self.builder.change(time_s, event.delta_bytes, memory_class)

    def _drop_duplicates(self, run: Pass, end: float) -> None:
        """A second forward pass makes carried tensors again; the first ones stay, these go."""
        again = sum(event.delta_bytes for event in run.memory if event.buffer == "carried")
        self.builder.change(end, -again, MemoryClass.ACTIVATIONS)

    def _backward(self, index: int) -> None:
        block = self.workload.blocks[index]
        option = block.option(self.tapes.pop(index))
        offsets = self.prices.offsets(run := self._backward_pass(option, index))
        self.builder.issue(Kind.BACKWARD, offsets[-1], micro_batch=self.micro_batch, block=index)
        recomputes = option.name != "all"
        if recomputes:
            self._copy_state(index, again=True)
        if index == len(self.workload.blocks) - 1:
            self._receive_gradient(index + 1)
        self._backward_events(run, offsets, index)
        self._drop_state_copy(index, float(offsets[-1]), again=recomputes)
        self.builder.change(float(offsets[-1]), -self.gradient_of.pop(index + 1), MemoryClass.ACTIVATIONS)

    def _backward_pass(self, option: BlockOption, _index: int) -> Pass:
        return option.backward if self.first_micro_batch else option.backward_accumulate

    def _backward_events(self, run: Pass, offsets: NDArray[np.float64], index: int) -> None:
        for event in run.memory:
            self._backward_event(event, float(offsets[event.kernel]), index)

    def _backward_event(self, event: MemoryEvent, time_s: float, index: int) -> None:
        if event.buffer == "saved_input":
            self._let_go(index, self._tape(index), time_s)
            return
        if event.buffer == "saved_output":
            self._let_go(index + 1, self._tape(index), time_s)
            return
        memory_class = MemoryClass.ACTIVATIONS
        if event.buffer == "transient":
            memory_class = MemoryClass.TRANSIENT
        elif event.buffer in {"gradient", "shared_gradient"}:
            memory_class = MemoryClass.GRADIENTS
        if event.buffer == "shared_gradient":
            self.shared_bytes += event.delta_bytes
        elif event.buffer == "grad_input":
            self.gradient_of[index] = self.gradient_of.get(index, 0) + event.delta_bytes
        self.builder.change(time_s, event.delta_bytes, memory_class)

    def _finish(self) -> None:
        """Hands shared gradients over and lets the carried tensors go."""
        if self.shared_bytes and not self.first_micro_batch:
            offsets = self.prices.offsets(self.workload.shared_accumulate)
            self.builder.issue(Kind.REDUCE, offsets[-1], micro_batch=self.micro_batch)
            self.builder.change(float(offsets[-1]), -self.shared_bytes, MemoryClass.GRADIENTS)
        if self.receives:
            self._hand_back()
        if not self.first_micro_batch and not self.sends:
            loss_bytes = self.workload.blocks[
                -1
            ].output_bytes  # added to the first micro-batch's, which stays to the end of the step
            self.builder.change(self.builder.last_duration_s, -loss_bytes, MemoryClass.ACTIVATIONS)
        self.builder.change(self.builder.last_duration_s, -self.carried_bytes - self.state_bytes, MemoryClass.ACTIVATIONS)
