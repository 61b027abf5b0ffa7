"""LiveStorages: every storage that operators make, from its first appearance to its end. On fakes it predicts, on real tensors it measures."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any, Self

import torch
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

OnChange = Callable[[int, int], None]


_watching: list[LiveStorages] = []
"""Modes that are entered now, of this process: what `resize_storage` tells."""


def resize_storage(tensor: torch.Tensor, size_bytes: int) -> None:
    """Gives a tensor's storage another size: 0 lets its memory go while every view of it, also those that a graph saved, stays in place.

    Contents are lost where it shrinks. No operator does this, so the modes that count live bytes are told.
    """
    storage = tensor.untyped_storage()
    storage.resize_(size_bytes)
    for mode in _watching:
        mode.resized(storage)


class LiveStorages(TorchDispatchMode):
    """Counts bytes of live tensors: one count per storage, whatever views share it. Of tensors that wrap others (DTensor) the parts on this rank count.

    Args:
        on_change: called with (storage identity, signed bytes) when a storage appears or ends.

    Not modelled: memory inside an operator that no tensor outside it ever shows (workspace), and a storage's growth after it was
    first seen by other means than `resize_storage`.
    """

    def __init__(self, on_change: OnChange) -> None:
        super().__init__()  # type: ignore[no-untyped-call]
        self._on_change = on_change
        self._alive: dict[int, tuple[weakref.ref[Any], int]] = {}

    def add(self, tensors: Iterable[torch.Tensor]) -> None:
        """Counts storages made outside the mode; each once."""
        for tensor in tensors:
            storage = tensor.untyped_storage()
            identity = storage._cdata  # noqa: SLF001 - torch's only storage identity
            size = storage.nbytes()
            if identity in self._alive or size == 0:
                continue
            self._alive[identity] = (weakref.ref(storage, lambda _, key=identity: self._end(key)), size)  # type: ignore[misc]
            self._on_change(identity, size)

    def __enter__(self) -> Self:
        _watching.append(self)
        entered: Self = super().__enter__()  # type: ignore[no-untyped-call]
        return entered

    def __exit__(self, *error: object) -> None:
        super().__exit__(*error)  # type: ignore[no-untyped-call]
        _watching.remove(self)

    def resized(self, storage: torch.UntypedStorage) -> None:
        """A storage has another size than before; one that has not been seen appears."""
        identity, size = storage._cdata, storage.nbytes()  # noqa: SLF001 - torch's only storage identity
        known = self._alive.get(identity)
        before = 0 if known is None else known[1]
        reference = weakref.ref(storage, lambda _, key=identity: self._end(key)) if known is None else known[0]  # type: ignore[misc]
        self._alive[identity] = (reference, size)
        if size != before:
            self._on_change(identity, size - before)

    def _end(self, identity: int) -> None:
        entry = self._alive.pop(identity, None)
        if entry is not None and entry[1]:
            self._on_change(identity, -entry[1])

    @property
    def alive_bytes(self) -> int:
        """Bytes of all storages alive now."""
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(one) for one in types):
            return NotImplemented  # they take themselves apart, and their parts' operators come here
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, valid while it is alive."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - torch's only storage identity


def bytes_of(tensor: torch.Tensor) -> torch.Tensor:
    """All bytes of a tensor's storage in a row."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())
