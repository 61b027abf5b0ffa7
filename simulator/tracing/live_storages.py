"""LiveStorages: every storage that operators make, from its first appearance to its end. On fakes it predicts, on real tensors it measures."""

from __future__ import annotations

import weakref
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

OnChange = Callable[[int, int], None]


class LiveStorages(TorchDispatchMode):
    """Counts bytes of live tensors: one count per storage, whatever views share it.

    Args:
        on_change: called with (storage identity, signed bytes) when a storage appears or ends.

    Not modelled: memory inside an operator that no tensor outside it ever shows (workspace), and a storage's growth after it was
    first seen.
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

    def _end(self, identity: int) -> None:
        entry = self._alive.pop(identity, None)
        if entry is not None:
            self._on_change(identity, -entry[1])

    @property
    def alive_bytes(self) -> int:
        """Bytes of all storages alive now."""
        return sum(size for _, size in self._alive.values())

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        self.add(leaf for leaf in tree_leaves(out) if isinstance(leaf, torch.Tensor))
        return out


def storage_of(tensor: torch.Tensor) -> int:
    """Identity of a tensor's storage, valid while it is alive."""
    return int(tensor.untyped_storage()._cdata)  # noqa: SLF001 - torch's only storage identity
