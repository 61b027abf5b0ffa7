"""The caching allocator on one stream, compiled: many calls at once, as arrays. `caching_allocator` answers the same, call by call."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from hardware_models import allocator_block_kernels as place
from hardware_models.allocator_block_kernels import NONE, Integers, Rules, grown, new_store
from hardware_models.allocator_expandable import range_bytes
from hardware_models.allocator_kernels import FULL, IMPOSSIBLE, OUT_OF_MEMORY, calls_kernel
from hardware_models.allocator_settings import AllocatorSettings
from hardware_models.caching_allocator import DEFAULT_SETTINGS, AllocatorPeaks
from hardware_models.errors import InputError

_FIRST_ROWS = 256


class StepCalls(NamedTuple):
    """Calls of the allocator on one stream, in their order."""

    names: Integers
    """Which allocation, from 0; a name may be used again once it is freed."""
    size_bytes: Integers
    """Requested; 0: the allocation goes. What has no bytes has no calls: torch gives it no memory."""


class CompiledAllocator:
    """The allocator of one device and stream; what it knows is in arrays (`allocator_block_kernels.Store`).

    Args:
        num_names: names of allocations are below.
        settings: PYTORCH_ALLOC_CONF.
        capacity_bytes: what the device can give this allocator; None: no limit.
    """

    def __init__(
        self, num_names: int, settings: AllocatorSettings = DEFAULT_SETTINGS, *, capacity_bytes: int | None = None
    ) -> None:
        self.rules = _rules(settings, capacity_bytes)
        self.store = new_store(_FIRST_ROWS)
        self._block_of = np.full(num_names, NONE, dtype=np.int64)
        self._count = 0
        self._failed_at: int | None = None

    @property
    def peak_reserved_bytes(self) -> int:
        """Most bytes held of the device at one moment."""
        return int(self.store.counts[place.PEAK_RESERVED])

    def make(self, calls: StepCalls) -> bool:
        """Makes calls up to the first one that finds no memory; False: there was one.

        Raises:
            InputError: an allocation that comes twice or goes without being there, or a negative size.
        """
        end, at = FULL, 0
        while end == FULL:
            end, at = calls_kernel(self.store, self.rules, self._block_of, calls.names, calls.size_bytes, at)
            if end == FULL:
                self.store = grown(self.store)
        if end == IMPOSSIBLE:
            rule = "an allocation comes once, with bytes > 0, and then goes once"
            raise InputError(
                source="allocator calls", key=f"call {self._count + at}", value=int(calls.size_bytes[at]), rule=rule
            )
        self._count += at
        if end == OUT_OF_MEMORY:
            self._failed_at = self._count
        return bool(end != OUT_OF_MEMORY)

    def peaks(self) -> AllocatorPeaks:
        """What it has counted so far. On one stream all that is allocated is active and nothing else."""
        found = self.store.counts.tolist()
        return AllocatorPeaks(
            peak_requested_bytes=found[place.PEAK_REQUESTED], peak_allocated_bytes=found[place.PEAK_ALLOCATED],
            peak_active_bytes=found[place.PEAK_ALLOCATED], peak_reserved_bytes=found[place.PEAK_RESERVED],
            final_requested_bytes=found[place.NOW_REQUESTED], final_allocated_bytes=found[place.NOW_ALLOCATED],
            final_active_bytes=found[place.NOW_ALLOCATED], final_reserved_bytes=found[place.RESERVED],
            fragmentation_bytes=found[place.FRAGMENTATION], num_segments=found[place.PEAK_SEGMENTS],
            num_retries=found[place.RETRIES], out_of_memory_at=self._failed_at,
        )  # fmt: skip


def replay_steps(
    first: StepCalls, again: StepCalls, *, most_steps: int, settings: AllocatorSettings = DEFAULT_SETTINGS, capacity_bytes: int | None = None
) -> AllocatorPeaks:  # fmt: skip
    """Peaks and final values of a first step and as many more as add segments, and one that adds none.

    Args:
        first: calls up to the end of the first step.
        again: of each later one; all that it allocates is freed in it.
        most_steps: after which it ends in any case.
        settings: the allocator's.
        capacity_bytes: what the device can give; None: no limit.

    Returns:
        ``out_of_memory_at`` counts the calls of the whole run.
    """
    num_names = 1 + max(int(own.names.max(initial=-1)) for own in (first, again))
    allocator = CompiledAllocator(num_names, settings, capacity_bytes=capacity_bytes)
    for index in range(most_steps):
        before = allocator.peak_reserved_bytes
        if not allocator.make(again if index else first) or (index and allocator.peak_reserved_bytes == before):
            break
    return allocator.peaks()


def _rules(settings: AllocatorSettings, capacity_bytes: int | None) -> Rules:
    allowed = settings.allowed_bytes(capacity_bytes)
    threshold = settings.garbage_collection_threshold
    return Rules(
        divisions=np.array(settings.roundup_divisions, dtype=np.int64), large_segment=settings.large_segment_bytes,
        max_split=_or_none(settings.max_split_bytes), rounding_limit=settings.rounding_limit_bytes, capacity=_or_none(capacity_bytes),
        allowed=_or_none(allowed), collect_above=int(threshold * allowed) if threshold and allowed is not None else NONE,
        expandable=settings.expandable_segments, range_bytes=range_bytes(capacity_bytes),
        rejects=settings.reject_above_fraction and capacity_bytes is not None and allowed is None,
    )  # fmt: skip


def _or_none(value: int | None) -> int:
    return NONE if value is None else value
