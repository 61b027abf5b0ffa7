"""Recompute in a module that runs as it is: each unit keeps its inputs, or the results of its products, and runs again in the backward pass."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from functools import partial
from typing import Any

from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from simulator.tracing.block_run import selective_policy

Contexts = tuple[AbstractContextManager[Any], AbstractContextManager[Any]]
"""Those of a unit's first run and of its run in the backward pass."""

_HOLDERS = (nn.ModuleList, nn.Sequential)
_running_again: list[bool] = []
"""Not empty while a unit runs again in this process."""


def units_of(module: nn.Module) -> tuple[nn.Module, ...]:
    """The outermost entries of lists and sequences that hold parameters: what is gathered, and checkpointed, one at a time."""
    found: list[nn.Module] = []
    for child in module.children():
        if isinstance(module, _HOLDERS) and not isinstance(child, nn.ModuleList):
            found.extend([child] if any(True for _ in child.parameters()) else [])
        else:
            found.extend(units_of(child))
    return tuple(found)


def checkpoint_units(module: nn.Module, recompute: str) -> None:
    """Has every unit keep what a plan says; ``module`` is changed in place.

    **Model**: ``full`` keeps a unit's inputs, ``selective`` the results of its products too (`simulator.tracing.block_run.SELECTIVE_KEEPS`); the rest runs again when the
    backward pass comes to it, with the random numbers of the first run. What lies outside the units keeps everything.

    **Source**: Chen et al. 2016, "Training deep nets with sublinear memory cost"; torch 2.13, torch/utils/checkpoint.py.

    Args:
        module: before FSDP2 or parallel styles take it, so that a unit is gathered once and runs again on what was gathered.
        recompute: ``none``, ``selective`` or ``full``.
    """
    if recompute == "none":
        return
    contexts = {"full": _all_again, "selective": _pointwise_again}[recompute]
    for unit in units_of(module):
        unit.forward = partial(_checkpointed, unit.forward, contexts)


def runs_again() -> bool:
    """Whether operators run now that a forward pass has run before."""
    return bool(_running_again)


def _checkpointed(forward: Callable[..., Any], contexts: Callable[[], Contexts], *args: Any, **kwargs: Any) -> Any:
    return checkpoint(forward, *args, use_reentrant=False, context_fn=contexts, **kwargs)


def _all_again() -> Contexts:
    return nullcontext(), _again(nullcontext())


def _pointwise_again() -> Contexts:
    first, again = create_selective_checkpoint_contexts(selective_policy)
    return first, _again(again)


@contextmanager
def _again(inner: AbstractContextManager[Any]) -> Iterator[None]:
    _running_again.append(True)
    try:
        with inner:
            yield
    finally:
        _running_again.pop()
