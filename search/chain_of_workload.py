"""The rematerialization problem that a workload poses on a device: a `ChainProblem` from recorded passes and prices."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise

from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from search.chain_problem import ChainProblem
from simulator.workload import BlockOption, MemoryEvent, Pass, Workload


def chain_of_workload(
    workload: Workload, device: DeviceProfile, *, first_micro_batch: bool, pass_seconds: Callable[[Pass], float] | None = None
) -> ChainProblem:
    """Times and bytes of a workload's chain; the memory limit that goes with it excludes parameters, optimizer states and batch.

    Args:
        workload: one micro-batch.
        device: prices its kernels.
        first_micro_batch: gradients come into being as the backward pass proceeds; in later micro-batches all exist from the
            start, which needs more memory at every moment.
        pass_seconds: in place of the device's plain prices.

    **Not modelled**: a boundary that neither neighbour's graph keeps goes once it is read, here it counts until the backward pass
    (`overcount_bytes` says how much that can be); second copies of carried tensors while a block runs again.
    """
    blocks = workload.blocks
    seconds = pass_seconds or partial(_seconds, device=device)
    carried = sum(_net(block.discard, ("carried",)) for block in blocks)
    lasting = carried + sum(block.state_bytes for block in blocks)
    gradients = [_net(_backward(block.options[0], first=True), ("gradient", "shared_gradient")) for block in blocks]
    if first_micro_batch:
        resident = [lasting + sum(gradients[index + 1 :]) for index in range(len(blocks))]
    else:
        shared = [_net(_backward(block.options[0], first=False), ("shared_gradient",)) for block in blocks]
        resident = [lasting + workload.gradient_bytes + sum(shared[index + 1 :]) for index in range(len(blocks))]
    return ChainProblem(
        discard_s=tuple(seconds(block.discard) for block in blocks),
        discard_peak_bytes=tuple(_peak(block.discard.memory) + block.state_bytes for block in blocks),
        boundary_bytes=(0, *(block.output_bytes for block in blocks)),
        boundary_gradient_bytes=(*(_net(_backward(b.options[0], first=True), ("grad_input",)) for b in blocks), 0),
        resident_bytes=tuple(resident),
        option_names=tuple(tuple(option.name for option in block.options) for block in blocks),
        forward_s=tuple(tuple(seconds(option.forward) for option in block.options) for block in blocks),
        backward_s=tuple(
            tuple(seconds(_backward(option, first=first_micro_batch)) for option in block.options) for block in blocks
        ),
        saved_bytes=tuple(
            tuple(option.saved_internal_bytes + block.output_bytes for option in block.options) for block in blocks
        ),
        forward_peak_bytes=tuple(
            tuple(_peak(option.forward.memory) + block.state_bytes for option in block.options) for block in blocks
        ),
        backward_peak_bytes=tuple(
            tuple(_backward_peak(workload, index, option, first=first_micro_batch) for option in block.options)
            for index, block in enumerate(blocks)
        ),
        source=f"{workload.model}, micro-batch {workload.micro_batch}",
    )


def overcount_bytes(workload: Workload) -> int:
    """The most by which `chain_of_workload` can overstate the memory of a sequence.

    Boundaries that no graph keeps, the one that a backward pass lets go before it ends, and what is counted throughout although it
    comes into being with the first forward passes (carried tensors, copies of running statistics).
    """
    blocks = workload.blocks
    unkept = sum(
        before.output_bytes
        for before, after in pairwise(blocks)
        if not (all(option.keeps_input for option in after.options) or all(option.keeps_output for option in before.options))
    )
    lasting = sum(_net(block.discard, ("carried",)) + 2 * block.state_bytes for block in blocks)
    return unkept + lasting + max(block.output_bytes for block in blocks)


def _seconds(run: Pass, *, device: DeviceProfile) -> float:
    return float(price(run.kernels, device).sum()) if run.kernels else 0.0


def _backward(option: BlockOption, *, first: bool) -> Pass:
    return option.backward if first else option.backward_accumulate


def _net(run: Pass, buffers: tuple[str, ...]) -> int:
    return sum(event.delta_bytes for event in run.memory if event.buffer in buffers)


def _peak(events: Iterable[MemoryEvent]) -> int:
    """Most bytes above the start."""
    level = peak = 0
    for event in events:
        level += event.delta_bytes
        peak = max(peak, level)
    return peak


def _backward_peak(workload: Workload, index: int, option: BlockOption, *, first: bool) -> int:
    """Saved bytes, the output's gradient and whatever the backward pass adds, at its highest moment; boundary i not counted."""
    block = workload.blocks[index]
    is_last = index == len(workload.blocks) - 1
    run = _backward(option, first=first)
    grad_output = (
        block.output_bytes if is_last else _net(_backward(workload.blocks[index + 1].options[0], first=first), ("grad_input",))
    )
    own = [event for event in run.memory if event.buffer not in {"saved_input", "saved_output"}]
    again = block.state_bytes if option.name != "all" else 0
    held = option.saved_internal_bytes + (block.output_bytes if option.keeps_output else 0)
    return held + grad_output + again + _peak(own)
