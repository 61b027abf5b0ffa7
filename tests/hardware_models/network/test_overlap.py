"""Overlap: published means, the physical estimate and its limits."""

from __future__ import annotations

import pytest

from hardware_models.errors import InputError
from hardware_models.network.overlap import overlap_factors

H100 = {"num_multiprocessors": 132, "memory_bytes_per_s": 3.35e12, "wire_bytes_per_s": 450e9, "copy_bytes_per_s": 55.6e9}


def test_published_means_hold_for_published_generations() -> None:
    factors = overlap_factors(nvlink_generation=4, **H100)
    assert (factors.compute_under_collectives, factors.collectives_under_compute, factors.evidence) == (1.189, 1.3, "published")
    assert factors.compute_under_copies == pytest.approx(1 / (1 - 55.6 / 3350))


def test_other_generations_are_estimated_and_say_so() -> None:
    factors = overlap_factors(
        nvlink_generation=5, **(H100 | {"wire_bytes_per_s": 900e9, "num_multiprocessors": 148, "memory_bytes_per_s": 8e12})
    )
    assert factors.evidence == "datasheet"
    assert factors.compute_under_collectives == pytest.approx(1 / (1 - 3 * 0.9 / 8))
    assert 1 < factors.compute_under_copies < 1.02


def test_a_slower_wire_disturbs_less() -> None:
    slow = overlap_factors(nvlink_generation=0, **(H100 | {"wire_bytes_per_s": 31.5e9}))
    fast = overlap_factors(nvlink_generation=0, **(H100 | {"wire_bytes_per_s": 63e9}))
    assert 1 < slow.compute_under_collectives < fast.compute_under_collectives
    assert 1 < slow.collectives_under_compute < fast.collectives_under_compute


def test_no_overlap_takes_more_than_half_of_a_device() -> None:
    factors = overlap_factors(nvlink_generation=5, **(H100 | {"wire_bytes_per_s": 3e12}))
    assert factors.compute_under_collectives == pytest.approx(2.0)


def test_a_device_without_memory_is_refused() -> None:
    with pytest.raises(InputError, match="counts and rates are > 0"):
        overlap_factors(nvlink_generation=4, **(H100 | {"memory_bytes_per_s": 0.0}))
