"""BlockGraph: one block of a captured module, ready to run on fake or real tensors."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockGraph:
    """A stretch of the captured graph.

    ``graph`` takes the values named by ``arguments`` in order and returns a tuple: the next boundary, then the values named by
    ``carried_out``. An argument is ``x`` (the boundary before), ``p:<parameter>``, ``b:<buffer>``, ``i:<input>`` or
    ``c:<carried value>``.
    """

    name: str
    graph: Callable[..., tuple[Any, ...]]
    arguments: tuple[str, ...]
    carried_out: tuple[str, ...]
    mutated_buffers: tuple[str, ...]
    """Buffers that a forward pass changes (running statistics): a second run must not change them again."""
    uses_randomness: bool
    mixes_samples: bool
    operators: tuple[str, ...]
    """Names of the operators in order, for reports."""

    def names(self, prefix: str) -> tuple[str, ...]:
        """Arguments of one kind (``p``, ``b``, ``i`` or ``c``) without their prefix."""
        return tuple(name[2:] for name in self.arguments if name.startswith(prefix + ":"))
