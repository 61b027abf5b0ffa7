"""Gap and status of a proof."""

from __future__ import annotations

import pytest

from hardware_models.errors import InputError
from search.solvers.proof import Proof


def test_gap_and_status() -> None:
    assert (Proof.of(4.0, 3.0).gap, Proof.of(4.0, 3.0).status) == (0.25, "bound")
    assert Proof.of(4.0, 4.0000001) == Proof(objective_s=4.0, lower_bound_s=4.0)
    assert Proof.of(4.0, 4.0).is_exact
    assert (Proof.of(0.0, 0.0).gap, Proof.of(0.0, -1.0).status) == (0.0, "exact")


def test_a_bound_above_the_objective_is_refused() -> None:
    with pytest.raises(InputError, match=r"0 <= lower_bound_s <= objective_s must hold, but got 2.0 and 1.0"):
        Proof(objective_s=1.0, lower_bound_s=2.0)
