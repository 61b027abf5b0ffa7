"""Whether the order of plans is known beforehand: rank correlation over plans of one model, and over the pairs of them that measurement tells apart."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import sqrt
from typing import Any

import numpy as np

from validation.error_summary import mean_ranks, rank_correlation

TOLD_APART = 0.05
"""Measured step times that differ by less than this fraction of the shorter are not asked to be in order."""
POOLED = "all"


@dataclass(frozen=True, slots=True, kw_only=True)
class PlanOrder:
    """Of one model's plans, or of several models' together."""

    model: str
    num_plans: int
    spearman: float | None
    """Rank correlation over its plans, near ties too; None for several models, whose ranks have nothing in common."""
    num_pairs: int
    """Pairs of plans of one model whose measured times differ by more than `TOLD_APART`."""
    num_in_order: int
    products: tuple[float, float, float]
    """Over those pairs: sums of predicted times measured difference of ranks, of the predicted one's square, of the measured one's."""
    repeat_products: tuple[float, float, float] = (0.0, 0.0, 0.0)
    """The same of two halves of the measurement, every second round as if it predicted the others, over the pairs that these tell apart."""

    @property
    def pair_spearman(self) -> float | None:
        """Rank correlation over those pairs alone; None where a side does not vary.

        **Model**: ``sum p_ij m_ij / sqrt(sum p_ij^2 sum m_ij^2)``, p_ij and m_ij the differences of the predicted and of the measured ranks of plans i and j among the plans of their
        model: over all pairs of one model that is Spearman's coefficient.

        **Source**: Daniels 1944, "The relation between measures of correlation in the universe of sample permutations" (the general coefficient).
        """
        return _coefficient(self.products)

    @property
    def repeat_spearman(self) -> float | None:
        """What measurement reaches against itself: `pair_spearman` of every second round against the others; a prediction is held to no more than that."""
        return _coefficient(self.repeat_products)

    @property
    def share_in_order(self) -> float | None:
        """Of those pairs, how many are predicted in the measured order (a predicted tie is not)."""
        return self.num_in_order / self.num_pairs if self.num_pairs else None

    def to_json(self) -> dict[str, Any]:
        """As ``summary.json`` has it."""
        return {
            "model": self.model, "num_plans": self.num_plans, "spearman": self.spearman, "num_pairs": self.num_pairs, "num_in_order": self.num_in_order,
            "share_in_order": self.share_in_order, "pair_spearman": self.pair_spearman, "repeat_spearman": self.repeat_spearman,
        }  # fmt: skip


def plan_order(model: str, predicted_s: Sequence[float], measured_s: Sequence[float]) -> PlanOrder:
    """How well the order of a model's plans is predicted.

    Args:
        model: its name.
        predicted_s: step times by plan.
        measured_s: medians, all measured in the same rounds.
    """
    predicted, measured = (np.asarray(values, dtype=np.float64) for values in (predicted_s, measured_s))
    first, second = np.triu_indices(len(measured), k=1)
    apart = np.maximum(measured[first], measured[second]) > (1.0 + TOLD_APART) * np.minimum(measured[first], measured[second])
    first, second = first[apart], second[apart]
    ours, theirs = (ranks[first] - ranks[second] for ranks in (mean_ranks(predicted), mean_ranks(measured)))
    return PlanOrder(
        model=model, num_plans=len(measured), spearman=rank_correlation(predicted_s, measured_s) if len(measured) > 1 else None, num_pairs=len(first),
        num_in_order=int(np.count_nonzero(ours * theirs > 0)), products=(float(ours @ theirs), float(ours @ ours), float(theirs @ theirs)),
    )  # fmt: skip


def pooled(orders: Sequence[PlanOrder]) -> PlanOrder:
    """All models' pairs together."""
    return PlanOrder(
        model=POOLED, num_plans=sum(one.num_plans for one in orders), spearman=None, num_pairs=sum(one.num_pairs for one in orders),
        num_in_order=sum(one.num_in_order for one in orders), products=_summed([one.products for one in orders]), repeat_products=_summed([one.repeat_products for one in orders]),
    )  # fmt: skip


def orders_of(times: Mapping[str, Sequence[tuple[float, Sequence[float]]]]) -> tuple[PlanOrder, ...]:
    """Of each model with its predicted and, round by round, measured seconds by plan, then `pooled`."""
    own = [_with_repeat(model, [one[0] for one in pairs], [one[1] for one in pairs]) for model, pairs in times.items()]
    return (*own, pooled(own))


def _with_repeat(model: str, predicted_s: Sequence[float], rounds_s: Sequence[Sequence[float]]) -> PlanOrder:
    found = plan_order(model, predicted_s, [float(np.median(seconds)) for seconds in rounds_s])
    if not all(len(seconds) > 1 for seconds in rounds_s):
        return found
    halves = ([float(np.median(seconds[start::2])) for seconds in rounds_s] for start in range(2))
    return replace(found, repeat_products=plan_order(model, *halves).products)


def _coefficient(products: tuple[float, float, float]) -> float | None:
    both, first, second = products
    scale = sqrt(first * second)
    return both / scale if scale else None


def _summed(products: Sequence[tuple[float, float, float]]) -> tuple[float, float, float]:
    both, first, second = (sum(one[place] for one in products) for place in range(3))
    return both, first, second


def order_table(orders: Sequence[PlanOrder]) -> str:
    """The same as a Markdown table."""
    lines = [
        f"| model | plans | rank correlation over its plans | pairs that differ by more than {TOLD_APART:.0%} | rank correlation over them | in order | measurement against itself |",
        "|---|---|---|---|---|---|---|",
    ]
    lines += [
        f"| {one.model} | {one.num_plans} | {_number(one.spearman)} | {one.num_pairs} | {_number(one.pair_spearman)} "
        f"| {'' if one.share_in_order is None else f'{one.share_in_order:.0%}'} | {_number(one.repeat_spearman)} |"
        for one in orders
    ]
    return "\n".join(lines) + "\n"


def _number(value: float | None) -> str:
    return "" if value is None else f"{value:.2f}"
