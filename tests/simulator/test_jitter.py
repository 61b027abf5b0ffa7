"""Sampled durations: reproducible, unbiased, and felt where they should be."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from simulator import engine_compiled
from simulator.jitter import with_jitter
from simulator.program import Stream, no_slowdown, no_transfers
from tests.simulator.test_engines_agree import two_copies


def test_no_jitter_is_the_program_itself() -> None:
    priced = two_copies(slowdown=no_slowdown())
    same = with_jitter(priced, np.random.default_rng(0))
    np.testing.assert_array_equal(same.duration_s, priced.duration_s)
    np.testing.assert_array_equal(same.transfers.size_bytes, priced.transfers.size_bytes)


def test_one_seed_gives_one_program() -> None:
    priced = two_copies(slowdown=no_slowdown())
    one, other = (with_jitter(priced, np.random.default_rng(7), relative_deviation=0.2) for _ in range(2))
    np.testing.assert_array_equal(one.transfers.size_bytes, other.transfers.size_bytes)
    assert (one.transfers.size_bytes != priced.transfers.size_bytes).all()


def test_factors_have_mean_one_and_the_deviation_asked_for() -> None:
    priced, generator = two_copies(slowdown=no_slowdown()), np.random.default_rng(1)
    factors = np.concatenate(
        [
            with_jitter(priced, generator, relative_deviation=0.3).transfers.size_bytes / priced.transfers.size_bytes
            for _ in range(10_000)
        ]
    )
    assert factors.mean() == pytest.approx(1.0, abs=0.01)
    assert factors.std() == pytest.approx(0.3, abs=0.01)


def test_a_straggler_slows_its_own_compute_only() -> None:
    priced = replace(
        two_copies(slowdown=no_slowdown()),
        transfers=no_transfers(),
        duration_s=np.array([2.0, 2.0]),
        stream=np.array([Stream.COMPUTE] * 2, dtype=np.int8),
    )
    slow = with_jitter(priced, np.random.default_rng(0), stragglers={1: 1.5})
    assert engine_compiled.record(slow).end_s.tolist() == [2.0, 3.0]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"relative_deviation": -0.1}, ">= 0"),
        ({"stragglers": {5: 1.1}}, "device < 2"),
        ({"stragglers": {0: 0.0}}, "factor > 0"),
    ],
)
def test_what_makes_no_sense_is_refused(changes: dict[str, object], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        with_jitter(two_copies(slowdown=no_slowdown()), np.random.default_rng(0), **changes)  # type: ignore[arg-type]
