"""What the plain module does on one process with the same micro-batches: loss, gradients, and where its random numbers stand."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from simulator.sequence import Operation, keep_all
from simulator.tracing.block_run import random_state
from simulator.tracing.capture import loss_of
from simulator.tracing.compute_mode import LOSS_SCALED, compute_mode, float32_products
from simulator.tracing.trace import Traced
from validation.run_step import ScheduledStep
from validation.session import FIRST_LOSS_SCALE, GradientsMatch


@dataclass(frozen=True, slots=True, kw_only=True)
class Reference:
    """Of one step over all replicas."""

    gradients: Mapping[str, torch.Tensor | None]
    """Of the loss as it is."""
    loss_scale: float
    """At which a dynamic scale comes to rest; 1 where the loss is not scaled."""
    random_states: Mapping[tuple[int, int], Any]
    """By (micro-batch, block): what blocks that draw random numbers find."""


def plain_reference(
    module: torch.nn.Module, traced: Traced, micro_batches: Sequence[Mapping[str, Any]], *, seed: int
) -> Reference:
    """Runs the module as it is, in the precision that was traced, on every micro-batch in turn; its buffers are left as they were.

    Where blocks draw random numbers, the same step is run once more block by block, to see where the generator stands before each of them.
    """
    before = {name: buffer.clone() for name, buffer in module.named_buffers()}
    states: dict[tuple[int, int], Any] = {}
    if any(block.uses_randomness for block in traced.chain.blocks):
        states = _random_states(module, traced, micro_batches, seed=seed)
        _restore(module, before)
    precision = traced.chain.capture.precision
    scale = FIRST_LOSS_SCALE if precision in LOSS_SCALED else 1.0
    while True:
        torch.manual_seed(seed)
        gradients = _gradients(module, micro_batches, precision, scale)
        _restore(module, before)
        if scale <= 1.0 or all(one is None or bool(one.isfinite().all()) for one in gradients.values()):
            break
        scale /= 2.0
    unscaled = {name: None if one is None else one / scale for name, one in gradients.items()}
    return Reference(gradients=unscaled if scale != 1.0 else gradients, loss_scale=scale, random_states=states)


def _gradients(
    module: torch.nn.Module, micro_batches: Sequence[Mapping[str, Any]], precision: str, scale: float
) -> dict[str, torch.Tensor | None]:
    """Those of the scaled loss."""
    device = next(module.parameters()).device
    for piece in micro_batches:
        with compute_mode(precision, device):
            loss = loss_of(module(**piece))
        with float32_products(precision, device):
            (loss * (1.0 / len(micro_batches)) * scale).backward()
    found = {name: parameter.grad for name, parameter in module.named_parameters()}
    module.zero_grad(set_to_none=True)
    return found


class _StateReader:
    """Notes where the generator stands before each forward pass of a block."""

    def __init__(self, device: torch.device, num_blocks: int) -> None:
        self._device, self._last = device, num_blocks - 1
        self.states: dict[tuple[int, int], Any] = {(0, 0): random_state(device)}

    def begin(self) -> None:
        """Nothing: which operation comes is told at its end."""

    def end(self, operation: Operation, micro_batch: int) -> None:
        """An operation has ended: the next forward pass finds the generator as it is now."""
        if operation.kind != "B" and operation.block < self._last:
            self.states[micro_batch, operation.block + 1] = random_state(self._device)
        elif operation.kind == "B" and operation.block == 0:
            self.states[micro_batch + 1, 0] = random_state(self._device)


def _random_states(
    module: torch.nn.Module, traced: Traced, micro_batches: Sequence[Mapping[str, Any]], *, seed: int
) -> dict[tuple[int, int], Any]:
    torch.manual_seed(seed)
    blocks = traced.chain.blocks
    reader = _StateReader(next(module.parameters()).device, len(blocks))
    step = ScheduledStep(module=module, traced=traced, operations=keep_all(len(blocks)))
    tensors = [{name: value for name, value in piece.items() if isinstance(value, torch.Tensor)} for piece in micro_batches]
    step(tensors, reader)
    module.zero_grad(set_to_none=True)
    random = {index for index, block in enumerate(blocks) if block.uses_randomness}
    return {key: state for key, state in reader.states.items() if key[1] in random and key[0] < len(micro_batches)}


def _restore(module: torch.nn.Module, buffers: Mapping[str, torch.Tensor]) -> None:
    with torch.no_grad():
        for name, buffer in module.named_buffers():
            buffer.copy_(buffers[name])


def compare(found: Mapping[str, torch.Tensor | None], expected: Mapping[str, torch.Tensor | None]) -> GradientsMatch:
    """Gradients of a rank against the plain module's."""
    bitwise, max_abs, max_rel = True, 0.0, 0.0
    for name, mine in found.items():
        theirs = expected[name]
        if mine is None or theirs is None:
            bitwise = bitwise and mine is theirs
            max_rel = max_rel if mine is theirs else float("inf")
            continue
        if torch.equal(mine, theirs) or not mine.numel():
            continue
        bitwise = False
        difference, scale = float(torch.linalg.vector_norm(mine - theirs)), float(torch.linalg.vector_norm(theirs))
        max_abs = max(max_abs, float((mine - theirs).abs().max()))
        max_rel = max(max_rel, difference / scale if scale else difference)
    return GradientsMatch(reference="same micro-batches", bitwise=bitwise, max_abs=max_abs, max_rel=max_rel)
