"""Smooths what measurements leave beside physics: one Gaussian process over all curves of a table, so that like curves help each other."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hardware_models.network.collective_algorithms import Floats

_SHARES = (0.06, 0.04, 0.03)
"""Prior variances of the logarithm that collectives of one device family, one collective of it, and one curve have to themselves; chosen by
cross-validation on the nccl-tests tables among a few."""
_OCTAVES = (3.0, 2.5, 2.0)
"""Length scales of these three over size."""
_RANK_OCTAVES = 2.0
"""Length scale over the number of ranks."""
_LEAST_NOISE = 0.02
"""Standard deviation of a repeated timing of nccl-tests, at least."""
_NOISE_OF_BEND = 0.25
"""Share of the median distance from the neighbours' line that is noise; the rest is the curve's own bend."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """One measured residual: ``log(seconds / physical)``."""

    family: str
    """Devices whose curves look alike."""
    collective: str
    curve: str
    """Stack, collective and placement."""
    num_ranks: int
    log2_bytes: float
    residual: float


def smooth(points: Sequence[Point], wanted: Sequence[Point]) -> Floats:
    """Posterior mean of the residual at ``wanted`` (their own ``residual`` is not looked at), shape ``(len(wanted),)``.

    **Model**: Gaussian process of mean 0; covariance: the sum over family, family and collective, and curve of a variance times
    Matern 3/2 in ``log2 bytes`` and, for the first two, in ``log2 ranks``; independent noise for each curve.

    **Source**: Rasmussen and Williams 2006, equation 2.25.
    """
    noise = _noise_of_curves(points)
    variance = np.array([noise[point.curve] ** 2 for point in points])
    gram = _covariance(points, points) + np.diag(variance)
    weights = np.linalg.solve(gram, np.array([point.residual for point in points]))
    return np.asarray(_covariance(wanted, points) @ weights, dtype=np.float64)


def _covariance(a: Sequence[Point], b: Sequence[Point]) -> Floats:
    sizes = _distances([point.log2_bytes for point in a], [point.log2_bytes for point in b])
    ranks = _matern(
        _distances([np.log2(point.num_ranks) for point in a], [np.log2(point.num_ranks) for point in b]) / _RANK_OCTAVES
    )
    family = _same([point.family for point in a], [point.family for point in b])
    collective = family * _same([point.collective for point in a], [point.collective for point in b])
    curve = _same([point.curve for point in a], [point.curve for point in b])
    total = np.zeros_like(sizes)
    for share, octaves, mask in zip(_SHARES, _OCTAVES, (family * ranks, collective * ranks, curve), strict=True):
        total += share * mask * _matern(sizes / octaves)
    return total


def _matern(distance: Floats) -> Floats:
    scaled = np.sqrt(3.0) * distance
    return np.asarray((1.0 + scaled) * np.exp(-scaled))


def _distances(a: Sequence[float], b: Sequence[float]) -> Floats:
    return np.abs(np.asarray(a, dtype=np.float64)[:, None] - np.asarray(b, dtype=np.float64)[None, :])


def _same(a: Sequence[str], b: Sequence[str]) -> Floats:
    return np.asarray(np.array(a)[:, None] == np.array(b)[None, :], dtype=np.float64)


def _noise_of_curves(points: Sequence[Point]) -> dict[str, float]:
    """Noise of each curve, from how far its points lie off the line through their neighbours."""
    curves: dict[str, list[Point]] = {}
    for point in points:
        curves.setdefault(point.curve, []).append(point)
    noise = {}
    for name, of_curve in curves.items():
        ordered = sorted(of_curve, key=lambda point: point.log2_bytes)
        values = np.array([point.residual for point in ordered])
        bends = np.abs(values[1:-1] - (values[:-2] + values[2:]) / 2)
        noise[name] = max(_LEAST_NOISE, _NOISE_OF_BEND * float(np.median(bends)) if bends.size else 0.0)
    return noise


def thin(knots: Floats, values: Floats, tolerance: float) -> list[int]:
    """Positions of the fewest knots (greedily) whose broken line stays within ``tolerance`` of all values.

    Args:
        knots: increasing, shape ``(n,)``.
        values: shape ``(n,)``.
        tolerance: largest absolute deviation.
    """
    kept = [0]
    start = 0
    while start < len(knots) - 1:
        end = len(knots) - 1
        while end > start + 1:
            inner = slice(start, end + 1)
            line = np.interp(knots[inner], knots[[start, end]], values[[start, end]])
            if np.abs(line - values[inner]).max() <= tolerance:
                break
            end -= 1
        kept.append(end)
        start = end
    return kept
