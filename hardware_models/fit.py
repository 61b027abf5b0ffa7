"""Fits a `Curve` to measured kernels: physical coefficients first, then a Gaussian process through what they leave."""

from __future__ import annotations

from collections.abc import Sequence
from itertools import combinations

import numpy as np

from hardware_models.curves import FEATURES, Curve, Floats, covariance, physical_terms
from hardware_models.kernel import Kernel

_LENGTH_SCALES = (1.0, 2.0, 4.0, 8.0, 16.0, 32.0)
"""Candidates, in octaves of a size."""
_NOISES = (0.03, 0.1, 0.3)
_MOST = 0.5
_LEAST_SPILLING = 2
_ALMOST_ONE = 1.0 - 1e-9


def nonnegative_least_squares(matrix: Floats, target: Floats) -> Floats:
    """The x >= 0 that minimises ``|matrix @ x - target|``, by trying every support (few columns).

    Args:
        matrix: shape ``(rows, columns)``, at most a handful of columns.
        target: shape ``(rows,)``.
    """
    columns = matrix.shape[1]
    scale = np.maximum(np.linalg.norm(matrix, axis=0), np.finfo(np.float64).tiny)
    best, best_error = np.zeros(columns), float(np.sum(target**2))
    for size in range(1, columns + 1):
        for support in combinations(range(columns), size):
            chosen = list(support)
            solution = np.linalg.lstsq(matrix[:, chosen] / scale[chosen], target, rcond=None)[0]
            error = float(np.sum((matrix[:, chosen] / scale[chosen] @ solution - target) ** 2))
            if (solution >= 0).all() and error < best_error * _ALMOST_ONE:
                best = np.zeros(columns)
                best[chosen] = solution / scale[chosen]
                best_error = error
    return best


def fit_curve(kernels: Sequence[Kernel], seconds: Sequence[float], *, group: str, cache_bytes: int = 0) -> Curve:
    """The curve through measured kernels of one class, operator group and dtype.

    Args:
        kernels: at least two; kernels with the same features are merged by the geometric mean.
        seconds: of each, positive.
        group: operator whose curve this is.
        cache_bytes: size of the device's last-level cache.
    """
    first = kernels[0]
    times = np.array(seconds, dtype=np.float64)
    terms = _determined(physical_terms(kernels, cache_bytes))
    coefficients = nonnegative_least_squares(terms / times[:, None], np.ones(len(times)))
    base = np.maximum(terms @ coefficients, np.finfo(np.float64).tiny)
    points, log_times, log_base = _merged(kernels, np.log(times), np.log(base))
    length_scale, noise, errors = _best_process(points, log_times - log_base, _weights(log_times))
    return Curve(
        kernel_class=first.kernel_class, group=group, dtype=first.dtype, evidence="measured",
        points=tuple(tuple(float(x) for x in row) for row in points),
        seconds=tuple(float(x) for x in np.exp(log_times)), physical_seconds=tuple(float(x) for x in np.exp(log_base)),
        cache_bytes=cache_bytes,
        coefficients=tuple(float(value) for value in coefficients),
        length_scale=length_scale, noise=noise,
        relative_standard_error=float(np.sqrt(np.average(errors**2, weights=_weights(log_times)))), median_error=float(np.median(np.abs(errors))),
    )  # fmt: skip


def _merged(kernels: Sequence[Kernel], log_times: Floats, log_base: Floats) -> tuple[Floats, Floats, Floats]:
    """Distinct points in lexicographic order with mean logarithms."""
    features = FEATURES[kernels[0].kernel_class]
    rows: dict[tuple[float, ...], list[int]] = {}
    for position, kernel in enumerate(kernels):
        rows.setdefault(features(kernel), []).append(position)
    order = sorted(rows)
    mean_times = np.array([log_times[rows[point]].mean() for point in order])
    mean_base = np.array([log_base[rows[point]].mean() for point in order])
    return np.array(order, dtype=np.float64), mean_times, mean_base


def _determined(terms: Floats) -> Floats:
    """Without the spilled bytes, unless they are most of the traffic of two kernels: a rate cannot be told from a few bytes."""
    if np.count_nonzero(terms[:, 4] > _MOST * (terms[:, 2] + terms[:, 3])) < _LEAST_SPILLING:
        terms[:, 4] = 0.0
    return terms


def _weights(log_times: Floats) -> Floats:
    """Square roots of the times: what a kernel adds to a step matters, yet small kernels are many."""
    return np.asarray(np.exp((log_times - log_times.max()) / 2), dtype=np.float64)


def _best_process(points: Floats, residuals: Floats, weights: Floats) -> tuple[float, float, Floats]:
    """Length scale and noise with the least leave-one-out error, and its residuals.

    **Model**: leaving point i out changes the prediction at i by ``[K^-1 r]_i / [K^-1]_ii``.
    """
    best = (_LENGTH_SCALES[0], _NOISES[0], residuals)
    best_score = float("inf")
    for length_scale in _LENGTH_SCALES:
        gram = covariance(points, points, length_scale)
        for noise in _NOISES:
            inverse = np.linalg.inv(gram + noise**2 * np.eye(len(points)))
            errors = (inverse @ residuals) / np.diag(inverse)
            score = float(np.average(np.abs(errors), weights=weights) + np.sqrt(np.average(errors**2, weights=weights)))
            if score < best_score:
                best, best_score = (length_scale, noise, errors), score
    return best
