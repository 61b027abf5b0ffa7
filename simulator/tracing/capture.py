"""Capture: any ``nn.Module`` and its example inputs -> one straight graph of the operators that it calls.

The graph is taken above autograd (pre-dispatch), so running it again builds the same autograd graph as the module itself:
the same operators, in the same order, on the module's own parameters and buffers.
"""

from __future__ import annotations

import importlib
import traceback
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch._subclasses.fake_tensor import (
    DataDependentOutputException,
    DynamicOutputShapeException,
    FakeTensor,
    FakeTensorMode,
    UnsupportedOperatorException,
)
from torch.autograd.function import BackwardCFunction
from torch.fx import GraphModule
from torch.fx.experimental.proxy_tensor import make_fx
from torch.nn.modules.batchnorm import _BatchNorm
from torch.utils._pytree import tree_flatten

from hardware_models.errors import InputError
from simulator.tracing.compute_mode import compute_mode
from simulator.tracing.eight_bit_linear import EIGHT_BIT_NODES
from simulator.tracing.fake_conversion import converting_by_replacement
from simulator.tracing.side_values import fake_activations, new_fake_mode, to_fake

LossFunction = Callable[[Any], torch.Tensor]

_NOT_THE_MODEL = (str(Path(torch.__file__).parent), str(Path(__file__).parent), str(Path(importlib.__file__).parent), "<")
"""Folders whose lines a trace error does not point at."""
_OPERATOR_ERRORS: dict[type[Exception], str] = {
    DataDependentOutputException: "needs the values of an activation",
    DynamicOutputShapeException: "makes a shape that depends on the values of an activation",
    UnsupportedOperatorException: "has no shape rule",
}
"""What an operator did that fake tensors cannot do."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Capture:
    """A module's forward pass and loss as a graph; its placeholders are parameters, buffers, then tensor inputs, in order."""

    graph: GraphModule | None
    """None when the module has autograd functions of its own, which a graph of operators would not keep."""
    forward: Callable[[list[torch.Tensor]], torch.Tensor]
    """The module and loss as they are, from the placeholders' values."""
    fake_mode: FakeTensorMode
    parameters: dict[str, torch.Tensor]
    buffers: dict[str, torch.Tensor]
    inputs: dict[str, torch.Tensor]
    notes: tuple[str, ...]
    has_batch_statistics: bool
    trained: frozenset[str]
    """Parameters that the loss depends on: those whose ``.grad`` a backward pass makes."""
    precision: str = "fp32"
    """The mode in which it was run (`simulator.tracing.compute_mode`); the graph holds no casts, running it in that mode makes them."""

    @property
    def device(self) -> torch.device:
        """Of the parameters."""
        return next((value.device for value in self.parameters.values()), torch.device("cpu"))

    @property
    def names(self) -> tuple[str, ...]:
        """Placeholders' names in order: ``p:<parameter>``, ``b:<buffer>``, ``i:<input>``."""
        groups = (("p", self.parameters), ("b", self.buffers), ("i", self.inputs))
        return tuple(f"{prefix}:{name}" for prefix, group in groups for name in group)


def loss_of(output: Any) -> torch.Tensor:
    """The loss in a module's output: a scalar, an output's ``loss``, else the mean of squares of its first tensor.

    Raises:
        InputError: the output holds no floating-point tensor.
    """
    found = output.get("loss") if isinstance(output, Mapping) else getattr(output, "loss", None)
    if isinstance(found, torch.Tensor):
        if found.numel() == 1:
            return found
        raise InputError(
            source="model", key="output.loss", value=f"shape {list(found.shape)}", rule="a loss is one number",
            remedy="return its mean or sum",
        )  # fmt: skip
    for leaf in tree_flatten(output)[0]:
        if isinstance(leaf, torch.Tensor) and leaf.dtype.is_floating_point:
            return leaf if leaf.ndim == 0 else leaf.square().mean()
    raise InputError(
        source="model", key="output", value=type(output).__name__, rule="the forward pass must return a tensor or a loss",
        remedy="return a scalar loss, or an object with .loss",
    )  # fmt: skip


def build_fake(factory: Callable[[], Any]) -> tuple[Any, FakeTensorMode]:
    """What a factory of (module, example inputs) returns, built without memory for weights."""
    fake_mode = new_fake_mode()
    with fake_activations(fake_mode), converting_by_replacement() as conversions:
        made = factory()
        for part in made if isinstance(made, tuple) else (made,):
            if isinstance(part, torch.nn.Module):
                conversions.settle(part)
        return made, fake_mode


def capture(
    module: torch.nn.Module, example_inputs: Mapping[str, Any], *, loss: LossFunction = loss_of, name: str = "model",
    precision: str = "fp32",
) -> Capture:  # fmt: skip
    """The graph of ``loss(module(**example_inputs))``.

    Args:
        module: real, or built by `build_fake`; it is not changed.
        example_inputs: keyword arguments; tensors among them may be nested no deeper than the top level.
        loss: picks or computes the scalar loss from the module's output.
        name: for messages.
        precision: in which it runs.

    Raises:
        InputError: the module cannot be traced: names the operator and the line of the model that calls it.
    """
    existing = next((p.fake_mode for p in module.parameters() if isinstance(p, FakeTensor)), None)
    fake_mode = existing or new_fake_mode()
    parameters = {key: _fake_parameter(value, fake_mode) for key, value in module.named_parameters()}
    buffers = {key: to_fake(value, fake_mode) for key, value in module.named_buffers()}
    tensors = {key: to_fake(value, fake_mode) for key, value in example_inputs.items() if isinstance(value, torch.Tensor)}
    constants = {key: value for key, value in example_inputs.items() if not isinstance(value, torch.Tensor)}
    device = next((value.device for value in parameters.values()), torch.device("cpu"))
    forward = _forward_of(module, (parameters, buffers, tensors), constants, loss)
    values = [*parameters.values(), *buffers.values(), *tensors.values()]
    traced: GraphModule | None
    try:
        with _attributes_kept(module), fake_activations(fake_mode), torch.enable_grad(), compute_mode(precision, device):
            traced, own_functions, leaves = _graph_of(forward, values)
    except InputError:
        raise
    except Exception as error:
        raise _trace_error(error, name) from error
    trained = frozenset(key for key, value in parameters.items() if id(value) in leaves)
    if not trained:
        raise InputError(
            source="model", key=name, value=None, rule="the loss depends on no parameter that needs a gradient",
            remedy="train one, or check that the output is not detached",
        )  # fmt: skip
    notes: tuple[str, ...] = ()
    if own_functions:
        traced = None
        notes = (f"one block: the module defines autograd functions ({', '.join(sorted(own_functions))})",)
    return Capture(
        graph=traced, forward=forward, fake_mode=fake_mode, parameters=parameters, buffers=buffers, inputs=tensors, notes=notes,
        has_batch_statistics=any(isinstance(part, _BatchNorm) and part.training for part in module.modules()),
        trained=trained, precision=precision,
    )  # fmt: skip


def _forward_of(
    module: torch.nn.Module,
    groups: tuple[Mapping[str, torch.Tensor], Mapping[str, torch.Tensor], Mapping[str, torch.Tensor]],
    constants: Mapping[str, Any],
    loss: LossFunction,
) -> Callable[[list[torch.Tensor]], torch.Tensor]:
    """The module and loss as a function of the values of its (parameters, buffers, tensor inputs), in their order."""
    parameters, buffers, tensors = groups

    def forward(values: list[torch.Tensor]) -> torch.Tensor:
        num_states = len(parameters) + len(buffers)
        state = dict(zip((*parameters, *buffers), values[:num_states], strict=True))
        inputs = {**dict(zip(tensors, values[num_states:], strict=True)), **constants}
        return loss(torch.func.functional_call(module, state, kwargs=inputs, tie_weights=True))

    return forward


def _graph_of(
    forward: Callable[[list[torch.Tensor]], torch.Tensor], values: list[torch.Tensor]
) -> tuple[GraphModule, frozenset[str], frozenset[int]]:
    """The operators of ``forward(values)``, the user's own autograd functions in it, and ids of the leaves that get a gradient."""
    own_functions: set[str] = set()
    leaves: set[int] = set()

    def traced(values: list[torch.Tensor]) -> torch.Tensor:
        result = forward(values)
        for node in _autograd_nodes(result):
            if isinstance(node, BackwardCFunction) and not isinstance(node, EIGHT_BIT_NODES):
                own_functions.add(type(node).__name__)
            leaves.add(id(getattr(node, "variable", None)))
        return result

    graph: GraphModule = make_fx(traced, pre_dispatch=True, tracing_mode="real", _error_on_data_dependent_ops=False)(values)
    return graph, frozenset(own_functions), frozenset(leaves)


@contextmanager
def _attributes_kept(module: torch.nn.Module) -> Iterator[None]:
    """Takes back what the forward pass sets on its modules: a cache filled with fakes must not outlive the trace."""
    holders: list[Any] = []
    for part in module.modules():
        holders += [part.__dict__, *(value for value in part.__dict__.values() if isinstance(value, dict | list | set))]
    before = [(holder, copy(holder)) for holder in holders]
    try:
        yield
    finally:
        for holder, contents in before:
            holder.clear()
            (holder.extend if isinstance(holder, list) else holder.update)(contents)


def _fake_parameter(value: torch.Tensor, fake_mode: FakeTensorMode) -> torch.Tensor:
    return to_fake(value, fake_mode).detach().requires_grad_(value.requires_grad)


def _autograd_nodes(loss: torch.Tensor) -> Iterator[Any]:
    """Nodes of a loss's graph, each once."""
    seen, stack = set[Any](), [loss.grad_fn]
    while stack:
        node = stack.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        yield node
        stack.extend(parent for parent, _ in node.next_functions)


def said_by_model(error: BaseException) -> str:
    """What a model's code raised, in one line: kind, message and the last line of the model that it passed."""
    text = (str(error).strip() or "no message").splitlines()[0]
    return f"{type(error).__name__}: {text}{_line_of_model(error)}"


def _line_of_model(error: BaseException) -> str:
    frames = [frame for frame in traceback.extract_tb(error.__traceback__) if not frame.filename.startswith(_NOT_THE_MODEL)]
    return f", called at {frames[-1].filename}:{frames[-1].lineno} ({frames[-1].line})" if frames else ""


def _trace_error(error: Exception, name: str) -> InputError:
    """The operator that stopped a trace and the model's line that called it."""
    what = next((said for kind, said in _OPERATOR_ERRORS.items() if isinstance(error, kind)), "")
    operator = getattr(error, "func", None)
    of_operator = what and operator is not None
    reason = f"operator {operator} {what}{_line_of_model(error)}" if of_operator else said_by_model(error)
    return InputError(
        source="model", key=name, value=None, rule=f"cannot be traced: {reason}",
        remedy="make shapes and branches independent of activations' values there, or pass a module that is" if what else "see that module(**inputs) runs",
    )  # fmt: skip
