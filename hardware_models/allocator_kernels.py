"""Compiled replay of the caching allocator under torch's default settings, one stream and no limit: the rules of `hardware_models.allocator_engine`, in arrays."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from hardware_models.allocator_settings import MIN_BLOCK_BYTES, SMALL_LIMIT_BYTES

Ints = npt.NDArray[np.int64]
_NONE = -1
_SIZE, _ADDRESS, _SMALL, _ALLOCATED, _REQUESTED, _BEFORE, _AFTER = range(7)
_FIELDS = 7
_REQUESTED_BYTES, _ALLOCATED_BYTES, _RESERVED_BYTES, _NUM_LARGE, _NUM_SMALL, _NUM_UNUSED, _NUM_USED, _NUM_SEGMENTS = range(8)
_NUMBERS = 8
_NEW_BLOCKS = 2
"""That a call may need: a segment, and what is cut off it."""


class Calls(NamedTuple):
    """Calls of the allocator in their order."""

    names: Ints
    """Which allocation; a name may be used again once it is freed."""
    size_bytes: Ints
    """Requested; 0: the allocation goes."""
    block_bytes: Ints
    """Of the block that serves a request."""
    segment_bytes: Ints
    """That are taken from the device where no cached block serves it."""


class _Free(NamedTuple):
    """Free blocks of one pool by (size, address)."""

    sizes: Ints
    addresses: Ints
    blocks: Ints


class _State(NamedTuple):
    """All blocks; numbers of those in no use; free ones; counts."""

    blocks: Ints
    unused: Ints
    large: _Free
    small: _Free
    numbers: Ints


class Counts(NamedTuple):
    """What a replay has counted; bytes."""

    requested: int
    allocated: int
    reserved: int
    peak_requested: int
    peak_allocated: int
    fragmentation: int
    """Reserved less allocated when the call that reached the reserved peak first was done."""
    segments: int


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _place_of(free: _Free, count: int, size: int, address: int) -> int:
    """Where a free block of a size and address is, or would be."""
    low, high = 0, count
    while low < high:
        middle = (low + high) // 2
        if free.sizes[middle] < size or (free.sizes[middle] == size and free.addresses[middle] < address):
            low = middle + 1
        else:
            high = middle
    return low


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _insert(free: _Free, count: int, size: int, address: int, block: int) -> None:
    place = _place_of(free, count, size, address)
    for entry in range(count, place, -1):
        free.sizes[entry], free.addresses[entry], free.blocks[entry] = (
            free.sizes[entry - 1],
            free.addresses[entry - 1],
            free.blocks[entry - 1],
        )
    free.sizes[place], free.addresses[place], free.blocks[place] = size, address, block


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _erase(free: _Free, count: int, place: int) -> None:
    for entry in range(place, count - 1):
        free.sizes[entry], free.addresses[entry], free.blocks[entry] = (
            free.sizes[entry + 1],
            free.addresses[entry + 1],
            free.blocks[entry + 1],
        )


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _absorb(blocks: Ints, own: int, other: int, free: _Free, count: int) -> bool:
    """Makes ``other``, a free neighbour, part of a block that is in no list; whether it was one."""
    if other == _NONE or blocks[other, _ALLOCATED]:
        return False
    _erase(free, count, _place_of(free, count, blocks[other, _SIZE], blocks[other, _ADDRESS]))
    if blocks[own, _BEFORE] == other:
        blocks[own, _ADDRESS], blocks[own, _BEFORE] = blocks[other, _ADDRESS], blocks[other, _BEFORE]
        if blocks[own, _BEFORE] != _NONE:
            blocks[blocks[own, _BEFORE], _AFTER] = own
    else:
        blocks[own, _AFTER] = blocks[other, _AFTER]
        if blocks[own, _AFTER] != _NONE:
            blocks[blocks[own, _AFTER], _BEFORE] = own
    blocks[own, _SIZE] += blocks[other, _SIZE]
    return True


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _split(blocks: Ints, rest: int, head: int, size: int) -> None:
    """Makes the first ``size`` bytes of a block a block of its own."""
    blocks[head] = (size, blocks[rest, _ADDRESS], blocks[rest, _SMALL], 0, 0, blocks[rest, _BEFORE], rest)
    if blocks[head, _BEFORE] != _NONE:
        blocks[blocks[head, _BEFORE], _AFTER] = head
    blocks[rest, _BEFORE] = head
    blocks[rest, _ADDRESS] += size
    blocks[rest, _SIZE] -= size


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _free_block(state: _State, own: int) -> None:
    blocks, numbers = state.blocks, state.numbers
    is_small = blocks[own, _SMALL] == 1
    pool, entries = (state.small, _NUM_SMALL) if is_small else (state.large, _NUM_LARGE)
    blocks[own, _ALLOCATED] = 0
    numbers[_ALLOCATED_BYTES] -= blocks[own, _SIZE]
    numbers[_REQUESTED_BYTES] -= blocks[own, _REQUESTED]
    for side in (_BEFORE, _AFTER):
        other = blocks[own, side]
        if _absorb(blocks, own, other, pool, numbers[entries]):
            numbers[entries] -= 1
            state.unused[numbers[_NUM_UNUSED]] = other
            numbers[_NUM_UNUSED] += 1
    _insert(pool, numbers[entries], blocks[own, _SIZE], blocks[own, _ADDRESS], own)
    numbers[entries] += 1


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _new_block(state: _State) -> int:
    numbers = state.numbers
    if numbers[_NUM_UNUSED]:
        numbers[_NUM_UNUSED] -= 1
        again: int = state.unused[numbers[_NUM_UNUSED]]
        return again
    numbers[_NUM_USED] += 1
    new: int = numbers[_NUM_USED] - 1
    return new


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _allocate(state: _State, requested: int, size: int, segment: int) -> int:
    """The block of a request."""
    blocks, numbers = state.blocks, state.numbers
    is_small = size <= SMALL_LIMIT_BYTES
    pool, entries = (state.small, _NUM_SMALL) if is_small else (state.large, _NUM_LARGE)
    place = _place_of(pool, numbers[entries], size, -1)
    if place < numbers[entries]:
        own: int = pool.blocks[place]
        _erase(pool, numbers[entries], place)
        numbers[entries] -= 1
    else:
        own = _new_block(state)
        blocks[own] = (segment, numbers[_RESERVED_BYTES], 1 if is_small else 0, 0, 0, _NONE, _NONE)
        numbers[_RESERVED_BYTES] += segment  # nothing is given back, so that the bytes taken so far are the next address
        numbers[_NUM_SEGMENTS] += 1
    rest = blocks[own, _SIZE] - size
    if rest >= MIN_BLOCK_BYTES if is_small else rest > SMALL_LIMIT_BYTES:
        head = _new_block(state)
        _split(blocks, own, head, size)
        _insert(pool, numbers[entries], blocks[own, _SIZE], blocks[own, _ADDRESS], own)
        numbers[entries] += 1
        own = head
    blocks[own, _ALLOCATED], blocks[own, _REQUESTED] = 1, requested
    numbers[_REQUESTED_BYTES] += requested
    numbers[_ALLOCATED_BYTES] += blocks[own, _SIZE]
    return own


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def replay_calls(first: Calls, again: Calls, num_names: int, most_steps: int, room: int) -> Counts:
    """Counts after a first step and as many more as add segments, and one that adds none.

    Args:
        first: calls up to the end of the first step.
        again: of each later step.
        num_names: names are smaller.
        most_steps: after which it ends in any case.
        room: for blocks; where it is too small, no segments are counted.
    """
    state = _State(
        np.zeros((room, _FIELDS), np.int64), np.empty(room, np.int64), _Free(np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)),
        _Free(np.empty(room, np.int64), np.empty(room, np.int64), np.empty(room, np.int64)), np.zeros(_NUMBERS, np.int64),
    )  # fmt: skip
    numbers, block_of = state.numbers, np.full(num_names, _NONE, np.int64)
    peak_requested = peak_allocated = fragmentation = fragmented_at = 0
    for step in range(most_steps):
        calls, before = first if step == 0 else again, numbers[_RESERVED_BYTES]
        for call in range(calls.names.size):
            name = calls.names[call]
            if calls.size_bytes[call] == 0:
                _free_block(state, block_of[name])
                continue
            if numbers[_NUM_USED] + _NEW_BLOCKS > room + numbers[_NUM_UNUSED]:
                return Counts(0, 0, 0, 0, 0, 0, 0)
            block_of[name] = _allocate(state, calls.size_bytes[call], calls.block_bytes[call], calls.segment_bytes[call])
            peak_requested = max(peak_requested, numbers[_REQUESTED_BYTES])
            peak_allocated = max(peak_allocated, numbers[_ALLOCATED_BYTES])
            if numbers[_RESERVED_BYTES] > fragmented_at:
                fragmented_at = numbers[_RESERVED_BYTES]
                fragmentation = fragmented_at - numbers[_ALLOCATED_BYTES]
        if step and numbers[_RESERVED_BYTES] == before:
            break
    return Counts(
        numbers[_REQUESTED_BYTES], numbers[_ALLOCATED_BYTES], numbers[_RESERVED_BYTES], peak_requested, peak_allocated, fragmentation,
        numbers[_NUM_SEGMENTS],
    )  # fmt: skip
