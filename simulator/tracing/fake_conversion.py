"""``module.to(dtype)`` and its kin on modules that are built fake.

torch converts a parameter by exchanging it in place with the converted one. It refuses to where anything refers to either weakly (`torch.utils.swap_tensors`),
as a fake mode does with the tensors that it knows. A module that is built fake gets the converted parameter in the old one's place instead.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch._subclasses.fake_tensor import FakeTensor

Conversion = Callable[[torch.Tensor], torch.Tensor]


class Conversions:
    """What was converted, and into what; the latest holds."""

    def __init__(self) -> None:
        self._converted: dict[int, tuple[torch.Tensor, torch.Tensor]] = {}

    def newest(self, value: torch.Tensor) -> torch.Tensor:
        """What a tensor has become; itself where it was not converted."""
        while id(value) in self._converted:
            value = self._converted[id(value)][1]
        return value

    def convert(self, value: torch.Tensor, fn: Conversion) -> torch.Tensor:
        """What ``fn`` makes of what a tensor has become, a parameter of a parameter."""
        before = self.newest(value)
        with torch.no_grad():
            after = fn(before)
        if after is not before:
            if isinstance(before, torch.nn.Parameter):
                after = torch.nn.Parameter(after, requires_grad=before.requires_grad)
            self._converted[id(before)] = (before, after)
        return after

    def settle(self, module: torch.nn.Module) -> None:
        """Gives a module what its parameters and buffers became where others that are tied to them were converted."""
        for part in module.modules():
            for held in _held(part):
                held.update({key: self.newest(value) for key, value in held.items() if value is not None})


def _held(part: torch.nn.Module) -> tuple[dict[str, Any], dict[str, Any]]:
    """A module's own parameters and buffers by name, as ``torch.nn.Module._apply`` finds them."""
    return part._parameters, part._buffers  # noqa: SLF001 - torch has no other way to replace them all


@contextmanager
def converting_by_replacement() -> Iterator[Conversions]:
    """Context in which modules with fake parameters are converted (``to``, ``half``, ``bfloat16``, ``double``, ``to_empty``); `Conversions.settle` ends it."""
    done = Conversions()
    of_torch = torch.nn.Module._apply  # noqa: SLF001 - the one place through which modules are converted

    def apply(self: torch.nn.Module, fn: Conversion, recurse: bool = True) -> torch.nn.Module:  # noqa: FBT002 - as torch has it
        if not any(isinstance(value, FakeTensor) for value in self.parameters(recurse=recurse)):
            return of_torch(self, fn, recurse)  # type: ignore[no-untyped-call, no-any-return]
        for part in self.children() if recurse else ():
            part._apply(fn)  # noqa: SLF001
        for held in _held(self):
            held.update({key: done.convert(value, fn) for key, value in held.items() if value is not None})
        return self

    torch.nn.Module._apply = apply  # type: ignore[method-assign]  # noqa: SLF001
    try:
        yield done
    finally:
        torch.nn.Module._apply = of_torch  # type: ignore[method-assign]  # noqa: SLF001
