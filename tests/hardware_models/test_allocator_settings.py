"""Settings of the caching allocator: rounding, and the text of PYTORCH_ALLOC_CONF."""

from __future__ import annotations

import pytest

from hardware_models.caching_allocator import AllocationEvent, AllocatorSettings, parse_alloc_conf, replay_allocations
from hardware_models.errors import InputError
from hardware_models.units import KIB, MIB


@pytest.mark.parametrize(
    ("requested", "divisions", "allocated"),
    [
        (1200 * KIB, 4, 1280 * KIB),  # [1024, 2048) KiB in steps of 256
        (1280 * KIB, 4, 1280 * KIB),
        (1281 * KIB, 4, 1536 * KIB),
        (1200 * KIB, 2, 1536 * KIB),
        (1200 * KIB, 1, 1200 * KIB),  # 1 division is none
        (1800 * KIB, 4, 2048 * KIB),
        (2000, 4, 2048),  # not above 4 x 512: to 512
        (2049, 4, 2560),  # [2048, 4096) in steps of 512
    ],
)
def test_sizes_round_to_divisions_of_a_power_of_two(requested: int, divisions: int, allocated: int) -> None:
    assert parse_alloc_conf(f"roundup_power2_divisions:{divisions}").round_size(requested) == allocated


def test_divisions_hold_for_their_interval() -> None:
    settings = parse_alloc_conf("roundup_power2_divisions:[256:1,512:2,1024:4,>:8]")
    assert settings.round_size(300 * MIB + 1) == 300 * MIB + 512
    assert settings.round_size(600 * MIB) == 768 * MIB  # [512, 1024) by 256
    assert settings.round_size(1100 * MIB) == 1280 * MIB  # [1024, 2048) by 256
    assert settings.round_size(2100 * MIB) == 2304 * MIB  # [2048, 4096) by 256
    assert settings.round_size(100 * 1024 * MIB) == 104 * 1024 * MIB  # the last interval's divisions hold beyond it: 64 GiB / 8


@pytest.mark.parametrize(
    ("text", "divisions"),
    [  # read back from torch 2.13's own parser (AcceleratorAllocatorConfig.roundup_power2_divisions of libc10)
        ("[256:1,512:2,1024:4,>:8]", (1,) * 9 + (2, 4) + (8,) * 5),
        ("[64:8,256:4,1024:4,>:1]", (8,) * 7 + (0, 4, 0, 4) + (1,) * 5),
        ("4", (4,) * 16),
        ("[>:2]", (0,) + (2,) * 15),
        ("[131072:2]", (2,) * 16),
        ("[256:2,128:4]", (2,) * 7 + (4, 2) + (0,) * 7),
        ("[256:2,]", (2,) * 9 + (0,) * 7),
    ],
)
def test_divisions_are_read_as_torch_reads_them(text: str, divisions: tuple[int, ...]) -> None:
    assert parse_alloc_conf(f"roundup_power2_divisions:{text}").roundup_divisions == divisions


def test_all_keys_are_read() -> None:
    assert parse_alloc_conf("") == AllocatorSettings()
    text = "garbage_collection_threshold:0.5 , max_split_size_mb : 128,large_segment_size_mb:40,expandable_segments:True,backend:native,"
    assert parse_alloc_conf(text + "pinned_num_register_threads:8,max_split_size_mb:64,") == AllocatorSettings(
        garbage_collection_threshold=0.5, max_split_bytes=64 * MIB, large_segment_bytes=40 * MIB, expandable_segments=True
    )
    settings = parse_alloc_conf("large_segment_size_mb:40,per_process_memory_fraction:0.25,throw_on_cudamalloc_oom:True")
    assert (settings.memory_fraction, settings.reject_above_fraction) == (0.25, True)
    assert settings.rounding_limit_bytes == 40 * MIB
    assert (
        replay_allocations([AllocationEvent(action="allocate", size_bytes=2 * MIB)], settings).peak_reserved_bytes == 40 * MIB
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "max_split_size:20",
            "PYTORCH_ALLOC_CONF: key = 'max_split_size': unknown name; known are backend, expandable_segments",
        ),
        ("max_split_size_mb", "max_split_size_mb.*a key has a value; write max_split_size_mb:VALUE"),
        ("max_split_size_mb:19", "must be >= large_segment_bytes"),
        ("max_split_size_mb:30,large_segment_size_mb:40", "must be >= large_segment_bytes"),
        ("max_split_size_mb:12x", "must be a whole number without sign"),
        ("max_split_size_mb:-1", "must be a whole number without sign"),
        ("max_non_split_rounding_mb:5", "must be >= large_segment_bytes"),
        ("large_segment_size_mb:10", "must be > 10485760"),
        ("garbage_collection_threshold:1.0", r"must be in \(0, 1\)"),
        ("garbage_collection_threshold:0", r"must be in \(0, 1\); leave the key out"),
        ("garbage_collection_threshold:nan", r"must be in \(0, 1\)"),
        ("garbage_collection_threshold:high", "must be a number"),
        ("per_process_memory_fraction:1.5", r"must be in \[0, 1\]"),
        ("expandable_segments:true", "must be True or False"),
        ("roundup_power2_divisions:3", "divisions must be powers of 2"),
        ("roundup_power2_divisions:0", "must be a power of 2"),
        ("roundup_power2_divisions:[256:3]", "divisions must be powers of 2"),
        ("roundup_power2_divisions:[100:2]", "sizes must be powers of 2, in MiB"),
        ("roundup_power2_divisions:[256:2", "every . has its"),
        ("roundup_power2_divisions:[256:2]]", "every . has its"),
        ("roundup_power2_divisions:[256]", "must be a whole number"),
        ("backend:cudaMallocAsync", "only the native backend is modelled"),
        ("expandable_segments:True;max_split_size_mb:40", "must be True or False"),
    ],
)
def test_bad_texts_are_refused(text: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        parse_alloc_conf(text)


def test_settings_are_checked_without_a_text() -> None:
    with pytest.raises(InputError, match="there must be 16 divisions"):
        AllocatorSettings(roundup_divisions=(1, 2))
