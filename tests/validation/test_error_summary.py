"""Errors, ranks and regret by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from validation.error_summary import balanced_accuracy, mean_rank_correlation, mean_regret, rank_correlation, summary_of


def test_summary_by_hand() -> None:
    found = summary_of([0.1, -0.3, 0.05])
    assert found is not None
    assert (found.mape, found.median_ape, found.max_ape, found.bias) == pytest.approx((0.15, 0.1, 0.3, -0.05))
    assert summary_of([]) is None


def test_rank_correlation_by_hand() -> None:
    assert rank_correlation([1, 2, 3, 4], [10, 30, 20, 40]) == pytest.approx(1 - 6 * 2 / (4 * 15))
    assert rank_correlation([1, 2, 2], [1, 2, 3]) == pytest.approx(0.8660254)
    assert rank_correlation([1, 1, 1], [1, 2, 3]) is None


@given(st.lists(st.floats(0.1, 1e3), min_size=3, max_size=20, unique=True))
def test_order_alone_counts(values: list[float]) -> None:
    assert rank_correlation(values, [value**3 for value in values]) == pytest.approx(1.0)


def test_correlation_is_a_mean_over_groups_of_three_rows_and_more() -> None:
    keys = ["a", "a", "a", "b", "b"]
    assert mean_rank_correlation(keys, [1, 2, 3, 1, 2], [1, 2, 3, 2, 1]) == pytest.approx(1.0)
    assert mean_rank_correlation(["a", "b"], [1, 2], [1, 2]) is None


def test_regret_is_what_the_predicted_best_costs() -> None:
    assert mean_regret(["a", "a", "b", "b", "c"], [1.0, 2.0, 5.0, 4.0, 1.0], [3.0, 2.0, 8.0, 4.0, 1.0]) == pytest.approx(0.25)
    assert mean_regret(["a"], [1.0], [1.0]) is None


def test_balanced_accuracy_counts_both_kinds_alike() -> None:
    assert balanced_accuracy([True, True, True, True, False], [True, True, True, False, False]) == pytest.approx(
        (0.75 + 1.0) / 2
    )
    assert balanced_accuracy([False, False], [False, True]) == 0.5
    assert balanced_accuracy([], []) is None
