"""Numbers that sum up how far predictions are from measurements."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

_LEAST_RANKED = 3
"""Rows of a group from which on a rank correlation says something."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ErrorSummary:
    """Of relative errors, ``predicted / measured - 1``."""

    mape: float
    """Mean magnitude."""
    median_ape: float
    max_ape: float
    bias: float
    """Mean error."""


def summary_of(errors: Sequence[float]) -> ErrorSummary | None:
    """The summary of some errors; None of none."""
    if not errors:
        return None
    magnitudes = np.abs(errors)
    return ErrorSummary(
        mape=float(magnitudes.mean()),
        median_ape=float(np.median(magnitudes)),
        max_ape=float(magnitudes.max()),
        bias=float(np.mean(errors)),
    )


def rank_correlation(predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Spearman's coefficient: correlation of ranks, equal values sharing their mean rank; None where one side does not vary.

    **Source**: Spearman 1904.
    """
    ranks = [mean_ranks(np.asarray(values, dtype=np.float64)) for values in (predicted, measured)]
    deviations = [each - each.mean() for each in ranks]
    scale = float(np.sqrt((deviations[0] ** 2).sum() * (deviations[1] ** 2).sum()))
    return float((deviations[0] * deviations[1]).sum()) / scale if scale else None


def mean_ranks(values: NDArray[np.float64]) -> NDArray[np.float64]:
    """Ranks from 1, equal values sharing their mean rank."""
    _, inverse, counts = np.unique(values, return_inverse=True, return_counts=True)
    last = np.cumsum(counts)
    shared: NDArray[np.float64] = last - (counts - 1) / 2.0
    return shared[inverse]


def grouped(keys: Sequence[Hashable]) -> Mapping[Hashable, list[int]]:
    """Places of equal keys, in order of appearance."""
    groups: dict[Hashable, list[int]] = {}
    for place, key in enumerate(keys):
        groups.setdefault(key, []).append(place)
    return groups


def mean_rank_correlation(keys: Sequence[Hashable], predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Mean of `rank_correlation` over groups of at least three rows, each weighted by its rows; None without such a group."""
    found = [
        (rank_correlation([predicted[n] for n in places], [measured[n] for n in places]), len(places))
        for places in grouped(keys).values()
        if len(places) >= _LEAST_RANKED
    ]
    known = [(value, count) for value, count in found if value is not None]
    return sum(value * count for value, count in known) / sum(count for _, count in known) if known else None


def mean_regret(keys: Sequence[Hashable], predicted: Sequence[float], measured: Sequence[float]) -> float | None:
    """Mean over groups of at least two rows of what choosing by prediction costs: measured time of the predicted best over the measured best, less 1."""
    regrets = []
    for places in grouped(keys).values():
        if len(places) > 1:
            chosen = min(places, key=lambda n: predicted[n])
            regrets.append(measured[chosen] / min(measured[n] for n in places) - 1.0)
    return float(np.mean(regrets)) if regrets else None


def balanced_accuracy(actual: Sequence[bool], predicted: Sequence[bool]) -> float | None:
    """Mean of the shares of positives and of negatives that are predicted right; of the one kind where there is no other, None of nothing."""
    shares = []
    for kind in (True, False):
        of_kind = [guess for truth, guess in zip(actual, predicted, strict=True) if truth is kind]
        if of_kind:
            shares.append(sum(guess is kind for guess in of_kind) / len(of_kind))
    return sum(shares) / len(shares) if shares else None
