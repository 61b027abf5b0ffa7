"""Settings of PyTorch's CUDA caching allocator, their text form (PYTORCH_ALLOC_CONF) and the sizes that follow from them."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from types import MappingProxyType

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.units import MIB

MIN_BLOCK_BYTES = 512
"""Every block is a multiple of this. Source: kMinBlockSize, c10/core/AllocatorConfig.h of torch 2.13."""
SMALL_LIMIT_BYTES = MIB
"""Largest rounded size that the small pool serves. Source: kSmallSize, same file."""
SMALL_SEGMENT_BYTES = 2 * MIB
"""Size of every segment of the small pool. Source: kSmallBuffer, same file."""
LARGE_LIMIT_BYTES = 10 * MIB
"""Rounded sizes below this share segments of ``large_segment_bytes``. Source: kMinLargeAlloc, same file."""
LARGE_STEP_BYTES = 2 * MIB
"""Segments for larger blocks are multiples of this. Source: kRoundLarge, same file."""
LARGE_SEGMENT_BYTES = 20 * MIB
"""Default segment of the large pool. Source: large_segment_size_ in the same file (kLargeBuffer before torch 2.10)."""
ROUNDUP_INTERVALS = 16
"""Powers of two from 1 MiB to 32 GiB that have divisions of their own. Source: kRoundUpPowerOfTwoIntervals, AllocatorConfig.cpp."""
_LAST_MEMORY_FRACTION = 1.0
_MIB_POWER = MIB.bit_length() - 1

CONF_NAME = "PYTORCH_ALLOC_CONF"
"""Environment variable that holds the text (PYTORCH_CUDA_ALLOC_CONF is its older name)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class AllocatorSettings:
    """What PYTORCH_ALLOC_CONF can say about device memory; the defaults are torch's.

    Raises:
        InputError: a value that torch refuses.

    **Source**: c10/core/AllocatorConfig.cpp and c10/cuda/CUDAAllocatorConfig.h of torch 2.13; torch 2.8 has all but
    ``large_segment_bytes``, ``memory_fraction`` as text and ``reject_above_fraction``.

    **Not modelled**: keys about pinned host memory and locks, which leave device memory as it is; other backends; private pools.
    """

    roundup_divisions: tuple[int, ...] = (0,) * ROUNDUP_INTERVALS
    """Divisions of each power of two to which sizes are rounded up; entry i for sizes of [2**i, 2**(i+1)) MiB, the first for
    smaller and the last for larger ones too. 0 and 1: to 512 bytes only."""
    large_segment_bytes: int = LARGE_SEGMENT_BYTES
    max_split_bytes: int | None = None
    """Blocks of at least so many bytes are never split, and serve only requests of at least as many; None: no limit."""
    max_non_split_rounding_bytes: int | None = None
    """How much larger than the request an unsplit oversize block may be (exclusive); None: ``large_segment_bytes``."""
    garbage_collection_threshold: float = 0.0
    """Share of the allowed memory above which old cached segments are returned first; 0: never. Needs ``memory_fraction`` < 1."""
    expandable_segments: bool = False
    memory_fraction: float = 1.0
    """Share of the device's memory that may be reserved (torch.cuda.set_per_process_memory_fraction)."""
    reject_above_fraction: bool = False
    """Out of memory at once, without releasing cached blocks (throw_on_cudamalloc_oom)."""

    def __post_init__(self) -> None:
        """Refuses what torch refuses."""
        segment, floor = self.large_segment_bytes, f"large_segment_bytes ({self.large_segment_bytes})"
        split, rounding, threshold = self.max_split_bytes, self.max_non_split_rounding_bytes, self.garbage_collection_threshold
        powers = all(value == 0 or (value > 0 and value.bit_count() == 1) for value in self.roundup_divisions)
        for key, value, holds, rule in (
            ("roundup_divisions", self.roundup_divisions, powers, "divisions must be powers of 2, or 0 for none"),
            ("roundup_divisions", self.roundup_divisions, len(self.roundup_divisions) == ROUNDUP_INTERVALS,
             f"there must be {ROUNDUP_INTERVALS} divisions, for 1 MiB, 2 MiB .. 32 GiB"),
            ("large_segment_bytes", segment, segment > LARGE_LIMIT_BYTES, f"must be > {LARGE_LIMIT_BYTES} (10 MiB)"),
            ("max_split_bytes", split, split is None or split >= segment, f"must be >= {floor}"),
            ("max_non_split_rounding_bytes", rounding, rounding is None or rounding >= segment, f"must be >= {floor}"),
            ("garbage_collection_threshold", threshold, 0 <= threshold < 1, "must be in (0, 1), or 0 for none"),
            ("memory_fraction", self.memory_fraction, 0 <= self.memory_fraction <= _LAST_MEMORY_FRACTION, "must be in [0, 1]"),
        ):  # fmt: skip
            if not holds:
                raise InputError(source="AllocatorSettings", key=key, value=value, rule=rule)

    @property
    def rounding_limit_bytes(self) -> int:
        """``max_non_split_rounding_bytes``, or what it defaults to."""
        rounding = self.max_non_split_rounding_bytes
        return self.large_segment_bytes if rounding is None else rounding

    def round_size(self, requested_bytes: int) -> int:
        """Bytes of the block that serves a request (`bytes_of_block`)."""
        return bytes_of_block(requested_bytes, self.roundup_divisions)

    def segment_bytes(self, block_bytes: int) -> int:
        """Bytes that are taken from the device for a rounded size that no cached block serves (`bytes_of_segment`)."""
        return bytes_of_segment(block_bytes, self.large_segment_bytes)

    def allowed_bytes(self, capacity_bytes: int | None) -> int | None:
        """Most bytes that may be reserved where a fraction below 1 is set, else None."""
        if capacity_bytes is None or self.memory_fraction >= _LAST_MEMORY_FRACTION:
            return None
        return math.floor(self.memory_fraction * capacity_bytes + 0.5)


def bytes_of_block(requested_bytes: int, divisions: Sequence[int]) -> int:
    """Bytes of the block that serves a request; numba compiles it too.

    **Model**: the next multiple of 512; with d > 1 divisions and a size above 512 d, the next multiple of 2**k / d, where 2**k is the size's power of two.

    **Source**: round_size and roundup_power2_next_division in c10/cuda/CUDACachingAllocator.cpp.

    Args:
        requested_bytes: below 2**53.
        divisions: as ``roundup_divisions``.
    """
    if requested_bytes < MIN_BLOCK_BYTES:
        return MIN_BLOCK_BYTES
    power = math.frexp(requested_bytes)[1] - 1
    number = divisions[min(max(power - _MIB_POWER, 0), ROUNDUP_INTERVALS - 1)]
    step = MIN_BLOCK_BYTES
    if number > 1 and requested_bytes > MIN_BLOCK_BYTES * number:
        step = (1 << power) // number
    return -(-requested_bytes // step) * step


def bytes_of_segment(block_bytes: int, large_segment_bytes: int) -> int:
    """Bytes that are taken from the device for a block (get_allocation_size); numba compiles it too."""
    if block_bytes <= SMALL_LIMIT_BYTES:
        return SMALL_SEGMENT_BYTES
    if block_bytes < LARGE_LIMIT_BYTES:
        return large_segment_bytes
    return -(-block_bytes // LARGE_STEP_BYTES) * LARGE_STEP_BYTES


def parse_alloc_conf(text: str) -> AllocatorSettings:
    """Settings of a text such as ``max_split_size_mb:128,expandable_segments:True``; spaces do not matter, a later key wins.

    Raises:
        InputError: a key without value, a value that torch refuses, a backend that is not modelled. Numbers are read more
            strictly than torch reads them (``12x`` is refused).
        UnknownNameError: a key that torch 2.13 does not know.
    """
    changes: dict[str, object] = {}
    for item in _items("".join(text.split())):
        key, colon, value = item.partition(":")
        if key not in _READERS:
            raise UnknownNameError(source=CONF_NAME, key="key", value=key, known=tuple(sorted(_READERS)))
        if not colon or not value:
            raise InputError(source=CONF_NAME, key=key, value=item, rule="a key has a value", remedy=f"write {key}:VALUE")
        field, read = _READERS[key]
        found = read(key, value)
        if field:
            changes[field] = found
    return AllocatorSettings(**changes)  # type: ignore[arg-type]


def _items(text: str) -> list[str]:
    """Parts between commas outside brackets; one trailing comma is allowed, as torch allows it."""
    items, depth, start = [], 0, 0
    for position, letter in enumerate(text):
        depth += {"[": 1, "]": -1}.get(letter, 0)
        if depth < 0:
            break
        if letter == "," and depth == 0:
            items.append(text[start:position])
            start = position + 1
    if depth != 0:
        raise InputError(source=CONF_NAME, key="", value=text, rule="every [ has its ]")
    return items if start == len(text) else [*items, text[start:]]


def _count(key: str, value: str) -> int:
    if not value.isascii() or not value.isdigit():
        raise InputError(source=CONF_NAME, key=key, value=value, rule="must be a whole number without sign")
    return int(value)


def _mebibytes(key: str, value: str) -> int:
    return _count(key, value) * MIB


def _fraction(key: str, value: str) -> float:
    try:
        found = float(value)
    except ValueError:
        raise InputError(source=CONF_NAME, key=key, value=value, rule="must be a number") from None
    if key == "garbage_collection_threshold" and found == 0:
        raise InputError(source=CONF_NAME, key=key, value=value, rule="must be in (0, 1)", remedy="leave the key out for none")
    return found


def _flag(key: str, value: str) -> bool:
    if value not in {"True", "False"}:
        raise InputError(source=CONF_NAME, key=key, value=value, rule="must be True or False")
    return value == "True"


def _backend(key: str, value: str) -> str:
    if value != "native":
        raise InputError(
            source=CONF_NAME, key=key, value=value, rule="only the native backend is modelled", remedy="write backend:native"
        )
    return value


def _divisions(key: str, value: str) -> tuple[int, ...]:
    """One number for all sizes, or ``[256:1,512:2,>:8]``: powers of two in MiB, each with its divisions, ``>`` for all beyond.

    The first entry holds for smaller sizes too, ``>`` for all beyond the entry before it (torch 2.8 let it replace that entry as
    well), and sizes between two entries have none.
    """
    if not (value.startswith("[") and value.endswith("]")):
        if _count(key, value) == 0:
            raise InputError(source=CONF_NAME, key=key, value=value, rule="must be a power of 2", remedy="leave the key out")
        return (_count(key, value),) * ROUNDUP_INTERVALS
    divisions, last, first = [0] * ROUNDUP_INTERVALS, 0, True
    for entry in value[1:-1].removesuffix(",").split(","):
        boundary, _, number = entry.partition(":")
        count = _count(key, number)
        if boundary == ">":
            divisions[last + 1 :] = [count] * (ROUNDUP_INTERVALS - last - 1)
            continue
        size = _count(key, boundary)
        if size.bit_count() != 1:
            raise InputError(source=CONF_NAME, key=key, value=boundary, rule="sizes must be powers of 2, in MiB")
        last = min(size.bit_length() - 1, ROUNDUP_INTERVALS - 1)
        if first:
            divisions[:last] = [count] * last
        divisions[last], first = count, False
    return tuple(divisions)


_Reader = Callable[[str, str], object]
_READERS: MappingProxyType[str, tuple[str, _Reader]] = MappingProxyType(
    {
        "backend": ("", _backend),
        "expandable_segments": ("expandable_segments", _flag),
        "garbage_collection_threshold": ("garbage_collection_threshold", _fraction),
        "graph_capture_record_stream_reuse": ("", _flag),
        "large_segment_size_mb": ("large_segment_bytes", _mebibytes),
        "max_non_split_rounding_mb": ("max_non_split_rounding_bytes", _mebibytes),
        "max_split_size_mb": ("max_split_bytes", _mebibytes),
        "per_process_memory_fraction": ("memory_fraction", _fraction),
        "pinned_free_catch_all": ("", _flag),
        "pinned_max_cached_size_mb": ("", _count),
        "pinned_max_round_threshold_mb": ("", _count),
        "pinned_num_register_threads": ("", _count),
        "pinned_reserve_segment_size_mb": ("", _count),
        "pinned_use_background_threads": ("", _flag),
        "pinned_use_cuda_host_register": ("", _flag),
        "release_lock_on_cudamalloc": ("", _flag),
        "roundup_power2_divisions": ("roundup_divisions", _divisions),
        "throw_on_cudamalloc_oom": ("reject_above_fraction", _flag),
    }
)
"""Field (empty: leaves device memory as it is) and reader of each key of torch 2.13 (getKeys of the two configuration classes)."""
