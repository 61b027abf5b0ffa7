"""Spreads beyond the prices of kernels, and what follows from them."""

from __future__ import annotations

from math import sqrt
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tests.simulator.parallel.step_cases import plan_of
from validation.discrepancy import (
    NORMAL_Z,
    PRICE_SHARE,
    WITHOUT_TABLES,
    Residual,
    half_width,
    kind_of,
    probability_above,
    read_discrepancy,
    spread_of,
    spreads_of,
)


def residual(table: str, error: float, *, kernel_error: float = 0.0, kind: str = "node") -> Residual:
    return Residual(table=table, kind=kind, error=error, kernel_error=kernel_error)


def test_half_width_by_hand() -> None:
    assert half_width(0.03, 0.04 / PRICE_SHARE) == pytest.approx(NORMAL_Z * 0.05)
    assert half_width(0.0, 0.0) == 0.0


def test_probability_of_exceeding_a_limit() -> None:
    assert probability_above(80.0, 80.0, 0.1) == pytest.approx(0.5)
    assert probability_above(80.0, 72.0, 0.1) == pytest.approx(0.8413447)
    assert (probability_above(80.0, 79.0, 0.0), probability_above(78.0, 79.0, 0.0)) == (1.0, 0.0)


@given(st.floats(1.0, 100.0), st.floats(1.0, 100.0), st.floats(0.01, 0.5))
def test_more_bytes_are_never_less_likely_to_be_too_many(bytes_used: float, more: float, spread: float) -> None:
    assert probability_above(bytes_used + more, 80.0, spread) >= probability_above(bytes_used, 80.0, spread)


def test_the_spread_within_a_table_is_the_width_that_holds_four_fifths_around_the_median() -> None:
    """Errors -0.05 ... 0.05: half of them lie on either side of 0, four fifths within 0.04."""
    errors = [0.01 * n for n in range(-5, 6)]
    assert spread_of([residual("a", error) for error in errors]) == pytest.approx(0.04 / NORMAL_Z)


def test_tables_that_are_off_as_one_spread_by_what_they_share() -> None:
    """Medians 0.3 and -0.4, nothing within: the root of the mean square; with 0.12 within each, that is added in squares."""
    off = [residual(table, error) for table, error in (("a", 0.3), ("b", -0.4)) for _ in range(3)]
    assert spread_of(off) == pytest.approx(sqrt(0.125))
    scattered = [residual(one.table, one.error + side) for one in off[::3] for side in (-0.12 * NORMAL_Z, 0.0, 0.12 * NORMAL_Z)]
    assert spread_of(scattered) == pytest.approx(sqrt(0.125 + 0.12**2))


def test_a_random_table_is_held_four_times_in_five() -> None:
    """Tables whose rows share an error of 0.1 and scatter by 0.05 (normal): intervals learned from some hold four fifths of the rows of others."""
    rng = np.random.default_rng(0)

    def drawn(name: str) -> list[Residual]:
        return [residual(name, float(error)) for error in rng.normal(rng.normal(0.0, 0.1), 0.05, 40)]

    spread = spread_of([one for n in range(200) for one in drawn(f"seen {n}")])
    held = [abs(one.error) <= half_width(spread, 0.0) for n in range(200) for one in drawn(f"new {n}")]
    assert sum(held) / len(held) == pytest.approx(0.8, abs=0.03)


def test_tables_count_alike_however_long_they_are() -> None:
    many = [residual("long", 0.0) for _ in range(100)] + [residual("short", 0.5)]
    assert spread_of(many) == pytest.approx(sqrt(0.125))


def test_a_table_does_not_widen_its_own_intervals() -> None:
    spreads = spreads_of([residual("good", 0.01), residual("bad", 0.4)])
    assert spreads["bad"]["any"] == pytest.approx(0.01)
    assert spreads["good"]["any"] == pytest.approx(0.4)


def test_spreads_are_looked_up_by_table_and_kind(tmp_path: Path) -> None:
    path = tmp_path / "discrepancy.toml"
    path.write_text('[time.any]\nany = 0.1\n"nodes, stages" = 0.05\n[time.mine]\nany = 0.2\n', encoding="utf-8")
    found = read_discrepancy(path)
    assert found.time_spread("other", "nodes, stages") == 0.05
    assert found.time_spread("mine", "nodes, stages") == 0.2
    assert found.memory_spread("mine", "node") == WITHOUT_TABLES


def test_kinds_are_places_and_stages() -> None:
    assert kind_of(plan_of(tp=8), 8) == "node"
    assert kind_of(plan_of(tp=8), 4) == "nodes"
    assert kind_of(plan_of(tp=4, pp=4), 8) == "nodes, stages"
    assert kind_of(plan_of(tp=2, pp=4), 8) == "node, stages"


def test_spreads_are_those_of_the_kind() -> None:
    spreads = spreads_of([residual("a", 0.1), residual("b", 0.3, kind="nodes"), residual("c", 0.2, kind="nodes, stages")])
    assert spreads["c"]["node"] == pytest.approx(0.1)
    assert spreads["c"]["nodes"] == pytest.approx(0.3)
    assert "nodes, stages" not in spreads["c"]
