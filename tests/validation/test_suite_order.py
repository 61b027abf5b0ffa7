"""The order of plans: Spearman's coefficient over pairs that are told apart."""

from __future__ import annotations

import numpy as np
import pytest

from validation.error_summary import rank_correlation
from validation.suite_order import order_table, orders_of, plan_order


def test_over_all_pairs_it_is_spearmans_coefficient() -> None:
    generator = np.random.default_rng(0)
    measured = np.cumprod(1.0 + generator.uniform(0.06, 0.3, size=9))
    predicted = generator.permutation(measured)
    found = plan_order("m", predicted.tolist(), measured.tolist())
    assert found.num_pairs == 9 * 8 // 2
    assert found.spearman == pytest.approx(rank_correlation(predicted.tolist(), measured.tolist()))
    assert found.pair_spearman == pytest.approx(found.spearman)


def test_near_ties_are_not_asked_to_be_in_order() -> None:
    measured, predicted = [1.0, 1.04, 2.0], [1.1, 1.0, 3.0]
    found = plan_order("m", predicted, measured)
    # ranks: measured 1 2 3, predicted 2 1 3; the pairs (1, 3) and (2, 3) differ by 2 and 1 measured, by 1 and 2 predicted
    assert (found.num_pairs, found.num_in_order) == (2, 2)
    assert found.pair_spearman == pytest.approx((2 * 1 + 1 * 2) / 5)
    assert found.spearman == pytest.approx(0.5)


def test_a_predicted_tie_is_not_in_order_whichever_comes_first() -> None:
    for measured in ([1.0, 2.0], [2.0, 1.0]):
        found = plan_order("m", [1.0, 1.0], measured)
        assert (found.num_pairs, found.num_in_order, found.pair_spearman) == (1, 0, None)


def test_models_are_pooled_by_their_own_pairs() -> None:
    right, wrong = [(1.0, [1.0]), (2.0, [2.0]), (3.0, [3.0])], [(200.0, [100.0]), (100.0, [200.0])]
    one, other, both = orders_of({"right": right, "wrong": wrong})
    assert (one.pair_spearman, other.pair_spearman) == (pytest.approx(1.0), pytest.approx(-1.0))
    assert (both.num_plans, both.num_pairs, both.num_in_order) == (5, 4, 3)
    assert both.pair_spearman == pytest.approx((6 - 1) / (6 + 1))
    assert order_table((one, other, both)).splitlines()[-1] == "| all | 5 |  | 4 | 0.71 | 75% |  |"


def test_alike_plans_have_no_order() -> None:
    found = plan_order("m", [1.0, 2.0], [1.0, 1.01])
    assert (found.num_pairs, found.share_in_order, found.pair_spearman) == (0, None, None)
    assert order_table(orders_of({})).splitlines()[-1] == "| all | 0 |  | 0 |  |  |  |"


def test_measurement_is_held_against_itself() -> None:
    # every second round: 1, 2, 3 ms; the others: 1, 3, 2 ms; the third of the first plan's rounds is slow and changes neither median's place
    rounds = [[1.0, 1.0, 1.1, 1.0], [2.0, 3.0, 2.0, 3.0], [3.0, 2.0, 3.0, 2.0]]
    (own, pooled) = orders_of({"m": list(zip([1.0, 2.0, 3.0], rounds, strict=True))})
    assert own.repeat_spearman == pytest.approx(0.5)
    assert pooled.repeat_spearman == own.repeat_spearman
    (once, _) = orders_of({"m": [(1.0, [1.0]), (2.0, [2.0])]})
    assert once.repeat_spearman is None
