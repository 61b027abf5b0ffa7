"""Modules that are built fake are converted as real ones are."""

# ruff: noqa: D101, D102 - small modules: forward is forward

from __future__ import annotations

import torch
from torch import Tensor, nn

from simulator.tracing.capture import build_fake
from simulator.tracing.traced_model import TracedModel


class Tied(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.table = nn.Embedding(10, 4)
        self.body = nn.LSTM(4, 4, batch_first=True)
        self.head = nn.Linear(4, 10, bias=False)
        self.head.weight = self.table.weight
        self.register_buffer("count", torch.zeros(3, dtype=torch.int64))
        self.register_buffer("scale", torch.ones(3))

    def forward(self, ids: Tensor) -> Tensor:
        return self.head(self.body(self.table(ids))[0])


def test_a_converted_module_is_as_torch_converts_it() -> None:
    made, _ = build_fake(lambda: Tied().bfloat16())
    real = Tied().bfloat16()
    assert {key: (value.dtype, value.shape) for key, value in made.state_dict().items()} == {
        key: (value.dtype, value.shape) for key, value in real.state_dict().items()
    }
    assert made.head.weight is made.table.weight
    assert isinstance(made.head.weight, nn.Parameter)
    assert all(
        held is getattr(made.body, name)
        for held, name in zip(made.body._flat_weights, made.body._flat_weights_names, strict=True)
    )


def test_what_is_tied_stays_tied_when_one_side_is_converted() -> None:
    def half() -> nn.Module:
        module = Tied()
        module.table.double()
        return module

    made, _ = build_fake(half)
    assert made.head.weight is made.table.weight
    assert made.head.weight.dtype == torch.float64


def test_a_converted_model_is_traced_in_its_format() -> None:
    model = TracedModel(
        name="mine", factory=lambda: (nn.Linear(4, 4).bfloat16(), {"input": torch.ones(2, 4, dtype=torch.bfloat16)})
    )
    assert model.traced().workload.parameter_bytes == 20 * 2
    torch.nn.Linear(2, 2).double()  # torch's own conversion is back
