"""Stand-ins for what a trainer imports for its data, its logs or its GPU kernels and its parser never touches: so the parser runs without hundreds of megabytes of packages."""

from __future__ import annotations

import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from importlib.abc import Loader, MetaPathFinder
from importlib.machinery import ModuleSpec
from importlib.util import find_spec
from types import ModuleType
from unittest.mock import MagicMock

VERSION = "99.0"
"""torch compares tensorboard's."""


class StandIn(ModuleType):
    """A module in which every name is there and means nothing."""

    __version__ = VERSION

    def __getattr__(self, name: str) -> object:
        if name.startswith("__"):
            raise AttributeError(name)
        return MagicMock(name=f"{self.__name__}.{name}")


class _Finder(MetaPathFinder, Loader):
    def __init__(self, modules: Sequence[str]) -> None:
        self._modules = modules

    def find_spec(self, fullname: str, path: object = None, target: object = None) -> ModuleSpec | None:  # noqa: ARG002 - Python's interface
        wanted = any(fullname == name or fullname.startswith(f"{name}.") for name in self._modules)
        return ModuleSpec(fullname, self, is_package=True) if wanted else None

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return StandIn(spec.name)

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


@contextmanager
def stand_ins(modules_by_package: dict[str, str]) -> Iterator[None]:
    """Stands in for modules until the end, wherever the package that they need is not installed.

    Args:
        modules_by_package: package -> the module that is stood in for: itself, or one of the trainer's that needs it.
    """
    finder = _Finder([module for package, module in modules_by_package.items() if find_spec(package) is None])
    sys.meta_path.insert(0, finder)
    try:
        yield
    finally:
        sys.meta_path.remove(finder)
        for name in [name for name, module in sys.modules.items() if isinstance(module, StandIn)]:
            del sys.modules[name]  # others must not take them for the packages
