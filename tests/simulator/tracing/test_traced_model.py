"""Models that users name: factories, how their inputs are split, and what is refused."""

# ruff: noqa: D101, D102 - small modules: forward is forward

from __future__ import annotations

import functools
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from hardware_models.errors import InputError, UnknownNameError
from simulator.tracing.traced_model import TracedModel, batch_size, first_samples, micro_batches, traced_model
from tests.small_models import BATCH, WIDTH


class TwoInputs(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(4, 4)

    def forward(self, x: Tensor, y: Tensor, scale: float = 1.0) -> Tensor:
        return ((self.layer(x) - y) * scale).square().mean()


def model(factory: Any) -> TracedModel:
    return TracedModel(name="mine", factory=factory)


def test_a_batch_is_split_along_the_first_axis() -> None:
    inputs = {"x": torch.arange(12).view(6, 2), "table": torch.zeros(5), "scale": 2.0, "n": torch.tensor(3)}
    parts = micro_batches(inputs, 2)
    assert [part["x"].flatten().tolist() for part in parts] == [[0, 1, 2, 3], [4, 5, 6, 7], [8, 9, 10, 11]]
    assert all(part["table"] is inputs["table"] and part["scale"] == 2.0 and part["n"] is inputs["n"] for part in parts)
    assert micro_batches(inputs, 6)[0]["x"] is inputs["x"]
    assert batch_size(inputs) == 6
    assert batch_size({"scale": 1.0}) == 1


def test_first_samples() -> None:
    inputs = {"x": torch.arange(6)}
    assert first_samples(inputs, 2, name="mine")["x"].tolist() == [0, 1]
    assert first_samples(inputs, None, name="mine")["x"].tolist() == list(range(6))
    with pytest.raises(InputError, match=r"model mine: micro_batch = 7: the example inputs hold 6 samples; return more"):
        first_samples(inputs, 7, name="mine")


@pytest.mark.parametrize(
    "inputs", [{"x": torch.ones(2, 4), "y": torch.ones(2, 4)}, (torch.ones(2, 4), torch.ones(2, 4))], ids=["dict", "tuple"]
)
def test_a_factory_returns_a_module_and_its_inputs(inputs: Any) -> None:
    module, named = model(lambda: (TwoInputs(), inputs)).build()
    assert isinstance(module, TwoInputs)
    assert list(named) == ["x", "y"]


def test_one_tensor_is_the_first_argument() -> None:
    _, named = model(lambda: (nn.Linear(4, 4), torch.ones(2, 4))).build()
    assert list(named) == ["input"]


@pytest.mark.parametrize("result", [None, nn.Linear(1, 1), (nn.Linear(1, 1), 3), ("model", {}), (1, 2, 3)], ids=repr)
def test_what_is_no_pair_is_refused(result: Any) -> None:
    with pytest.raises(
        InputError, match=r"model mine: return value = '\w+': a pair \(nn.Module, example inputs\); return the module and a"
    ):
        model(lambda: result).build()


def test_a_micro_batch_is_traced_at_its_size_and_without_weights() -> None:
    seen: list[str] = []

    def factory() -> Any:
        module = TwoInputs()
        seen.append(type(module.layer.weight.data).__name__)
        return module, {"x": torch.ones(6, 4), "y": torch.ones(6, 4)}

    found = model(factory).traced(2)
    assert found.workload.model == "mine"
    assert found.workload.micro_batch == 2
    assert found.workload.batch_bytes == 2 * 2 * 4 * 4
    assert seen == ["FakeTensor"]
    assert model(factory).traced().workload.micro_batch == 6


def test_a_function_of_the_users() -> None:
    found = traced_model("tests.small_models:residual_mlp", batch=None, seq_len=None)
    _, inputs = found.build()
    assert inputs["x"].shape == (BATCH, WIDTH, WIDTH)
    _, inputs = traced_model("tests.small_models:residual_mlp", batch=2, seq_len=None).build()
    assert inputs["x"].shape == (2, WIDTH, WIDTH)


def test_an_argument_that_the_function_does_not_take_is_refused() -> None:
    with pytest.raises(InputError, match=r"seq_len = 8: the function takes no argument seq_len; add it: def f\(seq_len\)"):
        traced_model("tests.small_models:residual_mlp", batch=2, seq_len=8)


@pytest.mark.parametrize("name", ["no_such_module:f", "tests.small_models:no_such_function"])
def test_a_function_that_is_not_there_is_refused(name: str) -> None:
    with pytest.raises(
        InputError, match=rf"--model: name = '{name}': cannot be imported: .*no_such.*; name a module on the Python path"
    ):
        traced_model(name, batch=None, seq_len=None)


def test_a_module_whose_import_fails_is_the_users_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "schedlab_test_broken.py").write_text("import no_such_package\n", encoding="utf-8")
    monkeypatch.syspath_prepend(tmp_path)
    with pytest.raises(InputError, match="cannot be imported: No module named 'no_such_package'"):
        traced_model("schedlab_test_broken:f", batch=None, seq_len=None)
    sys.modules.pop("schedlab_test_broken", None)


def test_a_named_definition() -> None:
    found = traced_model("resnet18", batch=2, seq_len=None)
    _, inputs = found.build()
    assert inputs["images"].shape[0] == 2
    with pytest.raises(UnknownNameError, match="known are resnet18"):
        traced_model("resnet19", batch=None, seq_len=None).build()


def test_a_function_in_a_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    (tmp_path / "sizes_beside.py").write_text("WIDTH = 3\n", encoding="utf-8")
    path = tmp_path / "my model.py"
    path.write_text(
        "import torch\nfrom sizes_beside import WIDTH\n"
        "def made(batch=4):\n    return torch.nn.Linear(WIDTH, 2), torch.zeros(batch, WIDTH)\n",
        encoding="utf-8",
    )
    _, inputs = traced_model(f"{path}:made", batch=None, seq_len=None).build()
    assert inputs["input"].shape == (4, 3)
    _, inputs = traced_model(f"{path}:made", batch=2, seq_len=None).build()
    assert inputs["input"].shape == (2, 3)
    sys.modules.pop("sizes_beside", None)


@pytest.mark.parametrize(("text", "rule"), [(None, "No such file"), ("def (", "invalid syntax"), ("x = 1", "no attribute 'f'")])
def test_a_file_that_has_no_such_function_is_refused(
    text: str | None, rule: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(sys, "path", [*sys.path])
    path = tmp_path / "broken.py"
    if text is not None:
        path.write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=rf"cannot be imported: .*{rule}"):
        traced_model(f"{path}:f", batch=None, seq_len=None)


@pytest.mark.parametrize(
    ("result", "message"),
    [
        ((TwoInputs(), (torch.ones(2, 4),) * 4), "the forward pass names 3: x, y, scale"),
        ((TwoInputs(), {"x": {"x": torch.ones(2, 4)}}), "x = 'dict': each tensor is an input of its own"),
        ((TwoInputs(), {"x": torch.ones(0, 4)}), "example inputs = 0: they hold one sample or more"),
        ((nn.Embedding(4, 4, sparse=True), {}), "sparse gradients are not simulated"),
    ],
)
def test_examples_that_cannot_be_traced_are_refused(result: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(lambda: result).build()


class Wrapped(TwoInputs):
    @functools.wraps(TwoInputs.forward)
    def forward(self, *args: Any, **kwargs: Any) -> Tensor:
        return super().forward(*args, **kwargs)


def test_inputs_of_a_wrapped_forward_pass_have_its_names() -> None:
    _, named = model(lambda: (Wrapped(), (torch.ones(2, 4), torch.ones(2, 4)))).build()
    assert list(named) == ["x", "y"]


def fails() -> None:
    raise KeyError("my own mistake")


def exits() -> None:
    raise SystemExit(7)


@pytest.mark.parametrize(
    ("factory", "message"), [(fails, "KeyError: 'my own mistake', called at .*test_traced_model.py:"), (exits, "SystemExit: 7")]
)
def test_a_factory_that_fails_is_the_users_error(factory: Any, message: str) -> None:
    with pytest.raises(InputError, match=message):
        model(factory).build()


@pytest.mark.parametrize("name", [":", ".relative:f", "tests.small_models:BATCH"])
def test_names_that_mean_no_function_are_refused(name: str) -> None:
    with pytest.raises(InputError, match="name a module on the Python path"):
        traced_model(name, batch=None, seq_len=None)


def test_sizes_go_to_anything_that_is_called() -> None:
    _, inputs = traced_model("tests.simulator.tracing.test_traced_model:partial_factory", batch=3, seq_len=None).build()
    assert inputs["input"].shape == (3, 4)


partial_factory = functools.partial(lambda width, batch=2: (nn.Linear(width, 2), torch.zeros(batch, width)), 4)
