"""Bounds on samples of points: of small spaces, of the sizes for which plans are searched, of all trainers."""

from __future__ import annotations

import numpy as np
import pytest

from tests.search.joint.bound_samples import LARGE, SMALL, Setting, checked_points


def violations(setting: Setting, count: int, *, seed: int, optimal: bool = False) -> list[str]:
    found = list(checked_points(setting, count, np.random.default_rng(seed), optimal=optimal))
    assert len(found) >= count
    return [str(one) for one in found if not one.holds]


def test_no_plan_is_faster_than_its_bound() -> None:
    assert violations(SMALL[0], 12, seed=0) == []


@pytest.mark.slow
@pytest.mark.parametrize("setting", SMALL, ids=lambda one: f"{one.model}-{one.trainer}")
def test_no_plan_of_small_spaces_is_faster_than_its_bound(setting: Setting) -> None:
    assert violations(setting, 40, seed=1, optimal=True) == []


@pytest.mark.slow
@pytest.mark.parametrize("setting", LARGE[:2] + LARGE[5:7], ids=lambda one: f"{one.model}-{one.trainer}")
def test_no_plan_of_large_spaces_is_faster_than_its_bound(setting: Setting) -> None:
    assert violations(setting, 15, seed=2) == []
