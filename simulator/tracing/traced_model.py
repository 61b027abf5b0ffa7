"""Models that are traced: a named definition, or a function of the user's that returns ``(nn.Module, example inputs)``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch

from hardware_models.errors import InputError
from simulator import models
from simulator.tracing.capture import build_fake
from simulator.tracing.compute_mode import prepared
from simulator.tracing.trace import Traced, trace

Factory = Callable[[], tuple[torch.nn.Module, Mapping[str, Any]]]


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedModel:
    """A factory of a module with its example inputs, which hold one whole batch."""

    name: str
    factory: Factory

    def traced(self, micro_batch: int | None = None, precision: str = "fp32", *, compiled: bool = False) -> Traced:
        """The workload and the chain of a micro-batch of so many samples (None: the whole batch of the example), eager or compiled.

        Raises:
            InputError: the factory or the trace fails, or the example holds fewer samples.
        """
        (module, inputs), _ = build_fake(partial(self.build_in, precision))
        first = first_samples(inputs, micro_batch, name=self.name)
        return trace(module, first, name=self.name, precision=precision, compiled=compiled)

    def build_in(self, precision: str) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The module and its inputs as a precision stores them, from torch's current generator.

        Raises:
            InputError: as `build`, and what has no such format.
        """
        return prepared(*self.build(), precision, name=self.name)

    def build(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The module and its inputs, from torch's current generator.

        Raises:
            InputError: the factory does not return a module and a mapping of keyword arguments.
        """
        result = self.factory()
        if isinstance(result, tuple) and len(result) == 2:  # noqa: PLR2004 - a pair
            module, inputs = result
            if isinstance(module, torch.nn.Module) and isinstance(inputs, torch.Tensor):
                inputs = _named_inputs(module, (inputs,))
            elif isinstance(module, torch.nn.Module) and isinstance(inputs, tuple):
                inputs = _named_inputs(module, inputs)
            if isinstance(module, torch.nn.Module) and isinstance(inputs, Mapping):
                return module, dict(inputs)
        raise InputError(
            source=f"model {self.name}", key="return value", value=type(result).__name__, rule="a pair (nn.Module, example inputs)",
            remedy="return the module and a dict of the forward pass's keyword arguments (or a tensor, or a tuple of them)",
        )  # fmt: skip


def _named_inputs(module: torch.nn.Module, values: tuple[Any, ...]) -> dict[str, Any]:
    """Positional inputs by the names of the forward pass's parameters."""
    code = type(module).forward.__code__
    names = code.co_varnames[1 : code.co_argcount]
    return dict(zip(names, values, strict=False))


def batch_size(inputs: Mapping[str, Any]) -> int:
    """Samples in a batch: the length of the first tensor's first axis."""
    return next((int(value.shape[0]) for value in inputs.values() if isinstance(value, torch.Tensor) and value.ndim), 1)


def first_samples(inputs: Mapping[str, Any], count: int | None, *, name: str) -> dict[str, Any]:
    """The first ``count`` samples of every tensor that has samples along its first axis.

    Raises:
        InputError: more samples are asked for than there are.
    """
    whole = batch_size(inputs)
    if count is not None and count > whole:
        raise InputError(
            source=f"model {name}",
            key="micro_batch",
            value=count,
            rule=f"the example inputs hold {whole} samples",
            remedy="return more",
        )
    return micro_batches(inputs, count or whole)[0]


def micro_batches(inputs: Mapping[str, Any], size: int) -> list[dict[str, Any]]:
    """A batch in pieces of ``size`` samples, in order; what has no samples goes into each."""
    whole = batch_size(inputs)

    def part(value: Any, start: int) -> Any:
        has_samples = isinstance(value, torch.Tensor) and value.ndim and value.shape[0] == whole
        return value[start : start + size].contiguous() if has_samples and size < whole else value

    return [{key: part(value, start) for key, value in inputs.items()} for start in range(0, whole, size)]


def traced_model(name: str, *, batch: int | None, seq_len: int | None) -> TracedModel:
    """A named definition, ``package.module:function`` or ``FILE.py:function``.

    Raises:
        InputError: the module or file cannot be imported, has no such function, or the name is unknown.
    """
    if ":" not in name:
        return TracedModel(name=name, factory=partial(models.build, name, batch=batch, seq_len=seq_len))
    module_name, function = name.rsplit(":", 1)
    try:
        module = _module_of_file(Path(module_name)) if module_name.endswith(".py") else importlib.import_module(module_name)
        factory = getattr(module, function)
    except (ImportError, AttributeError, OSError, SyntaxError) as error:
        raise InputError(
            source="--model", key="name", value=name, rule=f"cannot be imported: {error}",
            remedy="name a module on the Python path, or a file, and a function in it: package.module:function, FILE.py:function",
        ) from error  # fmt: skip
    if batch is not None or seq_len is not None:
        factory = _with_arguments(factory, name, batch=batch, seq_len=seq_len)
    return TracedModel(name=name, factory=factory)


def _module_of_file(path: Path) -> ModuleType:
    """The module in a file, run once; modules beside it can be imported, as where the file is run itself."""
    whole = path.resolve()
    name = f"model_file_{hashlib.sha256(str(whole).encode()).hexdigest()[:16]}"
    if name in sys.modules:
        return sys.modules[name]
    spec = importlib.util.spec_from_file_location(name, whole)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    if str(whole.parent) not in sys.path:
        sys.path.append(str(whole.parent))
    sys.modules[name] = module
    try:
        spec.loader.exec_module(module)
    except BaseException:
        del sys.modules[name]
        raise
    return module


def _with_arguments(factory: Any, name: str, *, batch: int | None, seq_len: int | None) -> Any:
    """A user's factory with the sizes that the command line gives, where it takes them."""
    accepted = factory.__code__.co_varnames[: factory.__code__.co_argcount + factory.__code__.co_kwonlyargcount]
    given = {key: value for key, value in (("batch", batch), ("seq_len", seq_len)) if value is not None}
    for key, value in given.items():
        if key not in accepted:
            raise InputError(
                source=f"model {name}",
                key=key,
                value=value,
                rule=f"the function takes no argument {key}",
                remedy=f"add it: def f({key})",
            )
    return partial(factory, **given)
