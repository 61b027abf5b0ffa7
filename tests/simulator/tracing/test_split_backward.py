"""A backward pass in two gives the gradients of the whole one, bitwise, and is recorded as it runs."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simulator.tracing.block_run import MicroBatch
from simulator.tracing.split_backward import input_gradient, weight_gradients
from simulator.tracing.stage_chain import split_passes, stage_traces
from simulator.tracing.trace import Traced, trace
from tests.small_models import build, traced

MODELS = (
    "residual-mlp",
    "convolution-net",
    "transformer",
    "spectral",
    "shared-layer",
    "no-grad-region",
    "frozen-middle",
    "transposing",
)


def gradients(trace_of: Traced, module: nn.Module, inputs: dict[str, Tensor], *, split: bool) -> dict[str, Tensor | None]:
    """All blocks forward, all input gradients, then all weight gradients."""
    torch.manual_seed(5)
    micro_batch = MicroBatch(
        parameters=dict(module.named_parameters()), buffers=dict(module.named_buffers()), inputs=inputs, shared=trace_of.shared
    )
    x: Tensor | None = None
    tapes, left = [], []
    for block in trace_of.chain.blocks:
        x, tape = micro_batch.save(block, x, "all")
        tapes.append(tape)
    assert x is not None
    grad: Tensor | None = torch.ones_like(x)
    while tapes:
        tape = tapes.pop()
        assert grad is not None
        if split and tapes:
            grad, waiting = input_gradient(tape, grad)
            left.append(waiting)
        else:
            for waiting in left:
                weight_gradients(waiting)
            grad = micro_batch.backward(tape, grad)
    micro_batch.finish()
    return {name: parameter.grad for name, parameter in module.named_parameters()}


def assert_same(found: dict[str, Tensor | None], expected: dict[str, Tensor | None]) -> None:
    for name, value in expected.items():
        own = found[name]
        assert (own is None) == (value is None), name
        assert own is None or value is None or torch.equal(own, value), name


@pytest.mark.parametrize("name", MODELS)
def test_two_passes_make_the_gradients_of_one(name: str) -> None:
    trace_of = traced(name)
    assert_same(gradients(trace_of, *build(name), split=True), gradients(trace_of, *build(name), split=False))


class _UsedTwice(nn.Module):
    """A weight that is used twice on the way through one block."""

    def __init__(self) -> None:
        super().__init__()
        self.first, self.weight = nn.Linear(8, 8), nn.Parameter(torch.randn(8, 8))

    def forward(self, x: Tensor) -> Tensor:
        x = self.first(x)
        skip = x
        return (skip + torch.tanh(torch.tanh(x @ self.weight) @ self.weight)).square().mean()


def test_a_weight_used_twice_on_the_way_counts_twice_and_no_more() -> None:
    torch.manual_seed(0)
    inputs = {"x": torch.randn(4, 8)}
    found = []
    for split in (True, False):
        torch.manual_seed(1)
        module = _UsedTwice()
        found.append(gradients(trace(module, inputs), module, inputs, split=split))
    mine, expected = found[0]["weight"], found[1]["weight"]
    assert mine is not None
    assert expected is not None
    torch.testing.assert_close(mine, expected)


def test_recording_holds_what_the_passes_hold() -> None:
    (_, stage) = stage_traces(traced("residual-mlp", 3), (2, 3))
    for block, split in zip(stage.workload.blocks, split_passes(stage), strict=True):
        kept = sum(event.delta_bytes for event in block.options[0].forward.memory if event.buffer == "internal")
        arrived = sum(event.delta_bytes for event in split.inputs.memory if event.buffer == "internal")
        freed = sum(event.delta_bytes for event in split.weights.memory if event.buffer == "internal")
        assert kept + arrived + freed == 0
        assert sum(event.delta_bytes for event in split.weights.memory if event.buffer == "gradient") == block.gradient_bytes
        assert not any(event.buffer == "gradient" for event in (*split.inputs.memory, *split.weights_accumulate.memory))
        assert split.inputs.flops + split.weights.flops == block.options[0].backward.flops
