"""Capture: what the graph holds, that the module stays as it was, and what a trace that fails says."""

# ruff: noqa: D101, D102 - small modules: forward is forward

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, library, nn

from hardware_models.errors import InputError
from simulator.tracing.capture import build_fake, capture, loss_of
from tests.small_models import SMALL_MODELS, CachedAttribute, Cube, build


class Linear(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)


class ReadsValue(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        if y.sum().item() > 0:
            y = y * 2
        return y


class ShapeOfValues(Linear):
    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        return y[y > 0].sum()


class NoShapeRule(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.schedlab_test.odd(self.layer(x))


class Misspelt(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layr(x)


class Detached(Linear):
    def forward(self, x: Tensor) -> Tensor:
        return self.layer(x).detach()


class NoTensor(Linear):
    def forward(self, x: Tensor) -> int:
        return len(x)


class Caching(Linear):
    """Fills containers and counts calls in its forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.tables: dict[int, Tensor] = {}
        self.seen: list[Tensor] = []
        self.register_buffer("total", torch.zeros(4))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))

    def forward(self, x: Tensor) -> Tensor:
        y = self.layer(x)
        self.tables[len(x)] = torch.ones(4)
        self.seen.append(y)
        self.total += y.detach().sum(0)
        self.count += 1
        return y * self.tables[len(x)]


def x() -> dict[str, Any]:
    return {"x": torch.randn(2, 4)}


@pytest.fixture(scope="module")
def odd_operator() -> Any:
    operators = library.Library("schedlab_test", "DEF")
    operators.define("odd(Tensor x) -> Tensor")
    operators.impl("odd", lambda x: x * 2, "CPU")
    return operators


@pytest.mark.parametrize(
    ("module", "said", "line"),
    [
        (ReadsValue, "operator aten._local_scalar_dense.default needs the values of an activation", "if y.sum().item() > 0:"),
        (ShapeOfValues, "operator aten.nonzero.default makes a shape that depends on the values", "return y[y > 0].sum()"),
        (NoShapeRule, "operator schedlab_test.odd.default has no shape rule", "return torch.ops.schedlab_test.odd"),
        (Misspelt, "AttributeError: 'Misspelt' object has no attribute 'layr'", "return self.layr(x)"),
    ],
)
@pytest.mark.usefixtures("odd_operator")
def test_a_trace_that_fails_names_the_operator_and_the_line(module: Any, said: str, line: str) -> None:
    with pytest.raises(InputError) as caught:
        capture(module(), x(), name="mine")
    message = str(caught.value)
    assert "model: mine: cannot be traced" in message
    assert said in message
    assert f"{__file__}:" in message
    assert line in message


def test_a_loss_without_a_parameter_is_refused() -> None:
    with pytest.raises(InputError, match=r"mine: the loss depends on no parameter that needs a gradient; train one"):
        capture(Detached(), x(), name="mine")


def test_an_output_without_a_tensor_is_refused() -> None:
    with pytest.raises(InputError, match=r"output = 'int': the forward pass must return a tensor or a loss"):
        capture(NoTensor(), x())


def test_the_loss_is_found_in_what_modules_return() -> None:
    scalar, field = torch.tensor(3.0), torch.tensor([1.0, 3.0])
    assert loss_of(scalar) is scalar
    assert loss_of((scalar, field)) is scalar
    assert loss_of({"logits": field, "loss": scalar}) is scalar
    assert loss_of(SimpleNamespace(loss=scalar)) is scalar
    assert loss_of({"labels": torch.tensor([1]), "logits": field}).item() == pytest.approx(5.0)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_trace_leaves_the_module_as_it_was(name: str) -> None:
    module, inputs = build(name)
    tensors = {key: value.clone() for key, value in module.state_dict().items()}
    attributes = {key: dict(part.__dict__) for key, part in module.named_modules()}
    random = torch.get_rng_state()
    capture(module, inputs)
    assert {key: dict(part.__dict__) for key, part in module.named_modules()} == attributes
    assert all(torch.equal(value, tensors[key]) for key, value in module.state_dict().items())
    assert all(type(value) is nn.Parameter and value.grad is None for value in module.parameters())
    assert torch.equal(random, torch.get_rng_state())


def test_containers_and_buffers_that_a_forward_pass_fills_are_emptied_again() -> None:
    module = Caching()
    tables, seen = module.tables, module.seen
    capture(module, x())
    assert module.tables is tables
    assert module.seen is seen
    assert not tables
    assert not seen
    assert module.total.tolist() == [0.0] * 4
    assert module.count.item() == 0


def test_a_filled_cache_is_used_as_a_constant() -> None:
    module = CachedAttribute()
    _, inputs = build("cached-attribute")
    module(**inputs)
    table = module.table
    captured = capture(module, inputs)
    assert module.table is table
    assert captured.graph is not None
    assert not any("linspace" in str(node.target) for node in captured.graph.graph.nodes)


def test_placeholders_come_in_a_fixed_order() -> None:
    module = Caching()
    captured = capture(module, x())
    assert captured.names == ("p:layer.weight", "p:layer.bias", "b:total", "b:count", "i:x")
    assert captured.trained == {"layer.weight", "layer.bias"}


def test_parameters_without_a_gradient_are_told_apart() -> None:
    module, inputs = build("unused-parameter")
    captured = capture(module, inputs)
    assert set(captured.parameters) - captured.trained == {"unused"}
    module, inputs = build("frozen-first")
    captured = capture(module, inputs)
    frozen = {name for name, value in module.named_parameters() if not value.requires_grad}
    assert frozen
    assert set(captured.parameters) - captured.trained == frozen


def test_a_module_with_its_own_autograd_function_has_no_graph() -> None:
    module, inputs = build("own-function")
    captured = capture(module, inputs)
    assert captured.graph is None
    assert captured.notes == (f"one block: the module defines autograd functions ({Cube.__name__}Backward)",)


def test_a_module_built_fake_needs_no_memory() -> None:
    huge = 1 << 20
    (module, inputs), _ = build_fake(lambda: (nn.Linear(huge, huge), {"input": torch.randn(2, huge)}))
    captured = capture(module, inputs)
    assert captured.parameters["weight"].numel() == huge**2
    assert captured.graph is not None


def test_batch_statistics_count_in_training_only() -> None:
    for name, expected in (("convolution-net", True), ("eval-convolution", False), ("residual-mlp", False)):
        module, inputs = build(name)
        assert capture(module, inputs).has_batch_statistics is expected, name
