"""Stages of a traced model hold their own parameters and inputs, and make again what crosses without a gradient."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from hardware_models.errors import InputError
from simulator.tracing.block_run import MicroBatch
from simulator.tracing.stage_chain import stage_traces
from simulator.tracing.trace import trace
from tests.small_models import build, traced


@pytest.mark.parametrize("name", ["residual-mlp", "convolution-net", "transformer", "cached-attribute"])
def test_stages_one_after_the_other_are_the_module(name: str) -> None:
    whole = traced(name)
    module, inputs = build(name)
    module.eval()
    whole = trace(module, inputs)
    num = len(whole.chain.blocks)
    x: Tensor | None = None
    for stage in stage_traces(whole, (1, num - 2, 1)):
        own = MicroBatch(
            parameters={key: dict(module.named_parameters())[key] for key in stage.chain.capture.parameters},
            buffers={key: dict(module.named_buffers())[key] for key in stage.chain.capture.buffers},
            inputs={key: inputs[key] for key in stage.chain.capture.inputs}, shared=stage.shared,
        )  # fmt: skip
        for block in stage.chain.blocks:
            x = own.discard(block, x)
    expected = MicroBatch(parameters=dict(module.named_parameters()), buffers=dict(module.named_buffers()), inputs=inputs)
    y: Tensor | None = None
    for block in whole.chain.blocks:
        y = expected.discard(block, y)
    assert x is not None
    assert y is not None
    assert torch.equal(x, y)


def test_parameters_lie_where_they_are_used() -> None:
    whole = traced("transformer")
    first, second = stage_traces(whole, (4, 4))
    both = set(first.chain.capture.parameters) & set(second.chain.capture.parameters)
    assert both == {"embedding.weight"}
    assert set(first.chain.capture.inputs) == {"tokens"}
    assert set(second.chain.capture.inputs) == {"labels", "tokens"} or set(second.chain.capture.inputs) == {"labels"}
    together = first.workload.parameter_bytes + second.workload.parameter_bytes
    assert together == whole.workload.parameter_bytes + 4 * first.chain.capture.parameters["embedding.weight"].numel()


class _Scaled(nn.Module):
    """A value that crosses without a gradient but depends on a parameter."""

    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(3))

    def forward(self, x: Tensor) -> Tensor:
        with torch.no_grad():
            scale = self.layers[0].weight.abs().mean()
        for layer in self.layers:
            x = torch.tanh(layer(x)) * scale
        return x


def test_what_depends_on_parameters_cannot_be_made_again() -> None:
    whole = trace(_Scaled(), {"x": torch.randn(2, 8)})
    with pytest.raises(InputError, match=r"crosses a stage's boundary .* depends on layers.0.weight"):
        stage_traces(whole, (1, len(whole.chain.blocks) - 1))
