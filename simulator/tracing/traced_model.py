"""Models that are traced: a named definition, or a function of the user's that returns ``(nn.Module, example inputs)``."""

from __future__ import annotations

import hashlib
import importlib
import importlib.util
import inspect
import sys
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hardware_models.errors import InputError
from simulator import models
from simulator.tracing.capture import build_fake, said_by_model
from simulator.tracing.compute_mode import prepared
from simulator.tracing.trace import Traced, trace

_FUNCTION = "name a module on the Python path, or a file, and a function in it: package.module:function, FILE.py:function"
"""What a name of a model of one's own is."""
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

    def _made(self) -> Any:
        """What the factory returns.

        Raises:
            InputError: it raises; names its line.
        """
        try:
            return self.factory()
        except InputError:
            raise
        except (Exception, SystemExit) as error:
            raise InputError(
                source=f"model {self.name}", key="", value=None, rule=f"the function that makes it fails: {said_by_model(error)}",
                remedy="it is called without arguments beyond batch and seq_len, and must return (nn.Module, example inputs) on the CPU",
            ) from error  # fmt: skip

    def build(self) -> tuple[torch.nn.Module, dict[str, Any]]:
        """The module and its inputs, from torch's current generator.

        Raises:
            InputError: the factory fails, does not return a module and a mapping of keyword arguments, or returns what cannot be traced.
        """
        result = self._made()
        if isinstance(result, tuple) and len(result) == 2 and isinstance(result[0], torch.nn.Module):  # noqa: PLR2004 - a pair
            module, inputs = result
            if isinstance(inputs, torch.Tensor | tuple):
                inputs = _named_inputs(module, inputs if isinstance(inputs, tuple) else (inputs,), name=self.name)
            if isinstance(inputs, Mapping):
                _check_example(module, inputs, name=self.name)
                return module, dict(inputs)
        raise InputError(
            source=f"model {self.name}", key="return value", value=type(result).__name__, rule="a pair (nn.Module, example inputs)",
            remedy="return the module and a dict of the forward pass's keyword arguments (or a tensor, or a tuple of them)",
        )  # fmt: skip


def _named_inputs(module: torch.nn.Module, values: tuple[Any, ...], *, name: str) -> dict[str, Any]:
    """Positional inputs by the names of the forward pass's parameters.

    Raises:
        InputError: the forward pass names fewer.
    """
    kinds = (inspect.Parameter.POSITIONAL_ONLY, inspect.Parameter.POSITIONAL_OR_KEYWORD)
    names = [one.name for one in inspect.signature(module.forward).parameters.values() if one.kind in kinds]
    if len(values) > len(names):
        raise InputError(
            source=f"model {name}", key="example inputs", value=f"{len(values)} of them", rule=f"the forward pass names {len(names)}: {', '.join(names) or 'none'}",
            remedy="give each input a parameter of forward",
        )  # fmt: skip
    return dict(zip(names, values, strict=False))


def _check_example(module: torch.nn.Module, inputs: Mapping[str, Any], *, name: str) -> None:
    """Refuses modules and inputs that cannot be traced, in words that say what would do.

    Raises:
        InputError: names the input or the module.
    """

    def refusal(key: str, value: object, rule: str, remedy: str) -> InputError:
        return InputError(source=f"model {name}", key=key, value=value, rule=rule, remedy=remedy)

    if isinstance(module, torch.jit.ScriptModule) or hasattr(module, "_orig_mod"):
        remedy = "return the module itself; runtime.compile = true compiles it"
        raise refusal("return value", type(module).__name__, "the module is compiled or scripted already", remedy)
    for key, part in module.named_modules():
        if isinstance(part, torch.nn.Embedding | torch.nn.EmbeddingBag) and part.sparse:
            raise refusal(f"{key}.sparse", True, "sparse gradients are not simulated", "leave sparse at False")
    for key, value in inputs.items():
        if not isinstance(value, torch.Tensor) and any(isinstance(leaf, torch.Tensor) for leaf in tree_leaves(value)):
            rule = "each tensor is an input of its own, but these are inside another"
            raise refusal(key, type(value).__name__, rule, "let the forward pass take them as arguments")
    if batch_size(inputs) == 0:
        raise refusal("example inputs", 0, "they hold one sample or more", "return a batch")


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
    except (Exception, SystemExit) as error:
        said = str(error) if isinstance(error, ImportError | AttributeError | OSError | SyntaxError) else said_by_model(error)
        raise InputError(
            source="--model", key="name", value=name, rule=f"cannot be imported: {said}", remedy=_FUNCTION
        ) from error
    if not callable(factory):
        rule = f"a function is asked for, but {function} is {type(factory).__name__}"
        raise InputError(source="--model", key="name", value=name, rule=rule, remedy=_FUNCTION)
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
    parameters = inspect.signature(factory).parameters.values()
    accepted = {one.name for one in parameters}
    takes_any = any(one.kind is inspect.Parameter.VAR_KEYWORD for one in parameters)
    given = {key: value for key, value in (("batch", batch), ("seq_len", seq_len)) if value is not None}
    for key, value in given.items():
        if key not in accepted and not takes_any:
            raise InputError(
                source=f"model {name}",
                key=key,
                value=value,
                rule=f"the function takes no argument {key}",
                remedy=f"add it: def f({key})",
            )
    return partial(factory, **given)
