"""From timings over three sizes to the nodes of a gridded curve: a robust Gaussian process relative to the physical law."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hardware_models.gridded import Evidence, GriddedCurve
from hardware_models.physical_law import Floats, Integers, PhysicalLaw, Sizes, coordinates, law_seconds

FREEDOM = 4.0
"""Degrees of freedom of the Student distribution of the noise: single disturbed timings do not bend the curve."""
NUM_FOLDS = 5
_REWEIGHTINGS = 4
_JITTER = 1e-8
_WAVE_TILES = ((128, 128), (128, 256), (256, 128), (256, 256), (64, 128))
_TAIL_SHARE = 0.3
"""What the ninth decile counts against the median when a covariance is chosen."""
_MOST_WASTE = 1.5
"""Octaves of idle slots in the last wave that are told apart."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Component:
    """One summand of the covariance: Matern 3/2 over some features."""

    deviation: float
    """Standard deviation of the logarithm."""
    features: tuple[int, ...]
    scales: tuple[float, ...]
    """Length scale of each feature, in octaves."""


def _sizes(*components: tuple[float, tuple[int, ...], tuple[float, ...]]) -> tuple[Component, ...]:
    return tuple(Component(deviation=deviation, features=features, scales=scales) for deviation, features, scales in components)


_WAVES = Component(deviation=0.05, features=(0, 2, 3, 4, 5, 6, 7), scales=(6.0, 6.0, 0.5, 0.5, 0.5, 0.5, 0.5))
PRODUCT_PRIORS = (
    (
        *_sizes(
            (0.12, (0, 1, 2), (3.5, 2.5, 2.6)),
            (0.07, (0, 1), (2.5, 1.7)),
            (0.07, (0, 2), (10.0, 1.4)),
            (0.05, (1, 2), (4.0, 8.0)),
        ),
        _WAVES,
    ),
    (
        *_sizes(
            (0.23, (0, 1, 2), (2.4, 0.9, 4.6)),
            (0.4, (0, 1), (18.0, 0.57)),
            (0.09, (0, 2), (16.0, 2.2)),
            (0.2, (1, 2), (0.86, 39.0)),
        ),
        _WAVES,
    ),
    (
        *_sizes(
            (0.17, (0, 1, 2), (3.0, 1.5, 3.5)),
            (0.15, (0, 1), (5.0, 1.0)),
            (0.08, (0, 2), (12.0, 1.7)),
            (0.1, (1, 2), (1.5, 15.0)),
        ),
        _WAVES,
    ),
)
"""Covariances of products that a fit chooses among: maximum marginal likelihood on one table of each of A100 and H100, and between the two. All three sizes
together; pairs of sizes (which tile and which split of the summed axis the library takes); idle slots in the last wave."""
ATTENTION_PRIORS = (
    _sizes((0.5, (0, 1, 2), (2.0, 2.0, 2.0))),
    _sizes((0.5, (0, 1, 2), (4.0, 4.0, 4.0))),
    _sizes((0.5, (0, 1, 2), (8.0, 8.0, 8.0))),
    _sizes((1.0, (3,), (0.4,)), (0.6, (0, 1, 3), (10.0, 10.0, 0.4)), (0.25, (0, 1, 2, 3), (2.5, 2.5, 2.5, 0.4))),
    _sizes((1.0, (3,), (0.4,)), (0.6, (0, 1, 3), (6.0, 6.0, 0.4)), (0.25, (0, 1, 2, 3), (2.0, 2.0, 6.0, 0.4))),
)
"""Covariances of attention; the last two tell the kernels apart that libraries take for no, some and extreme sharing of keys among heads."""
NOISES = (0.015, 0.03, 0.05)
_LEAST_EXTREME_SHARING = 6.0
"""Binary logarithm of the heads per key-value head from which on fused decode kernels were seen to give way to a general one."""


def features(sizes: Sizes, at: Floats, num_multiprocessors: int) -> Floats:
    """Coordinates, then what else kernels are chosen by: idle slots of the last wave by tile (products), kind of head sharing (attention)."""
    if sizes != "product":
        kind = np.where(at[:, 2] <= 0.0, 0.0, np.where(at[:, 2] >= _LEAST_EXTREME_SHARING, 2.0, 1.0))
        return np.column_stack([at, kind])
    m, n = np.rint(np.exp2(at[:, :2])).astype(np.int64).T
    idle = []
    for rows, columns in _WAVE_TILES:
        tiles = -(-m // rows) * -(-n // columns)
        idle.append(np.log2(-(-tiles // num_multiprocessors) * num_multiprocessors / tiles))
    return np.column_stack([at, *(np.minimum(column, _MOST_WASTE) for column in idle)])


def covariance_of(prior: Sequence[Component], a: Floats, b: Floats) -> Floats:
    """Sum of the components between rows of features; shape ``(len(a), len(b))``."""
    total = np.zeros((len(a), len(b)))
    for component in prior:
        chosen, scales = list(component.features), np.array(component.scales)
        x, y = a[:, chosen] / scales, b[:, chosen] / scales
        squared = (x * x).sum(axis=1)[:, None] + (y * y).sum(axis=1)[None, :] - 2.0 * x @ y.T
        distance = np.sqrt(3.0 * np.maximum(squared, 0.0))
        total += component.deviation**2 * (1.0 + distance) * np.exp(-distance)
    return total


def robust_weights(gram: Floats, residuals: Floats, noise: float) -> tuple[Floats, float]:
    """Weights of the posterior mean under Student noise, shape ``(num,)``, and the centre that was taken off.

    **Model**: iteratively reweighted: noise variance ``noise^2 / w`` with ``w = (v + 1) / (v + d^2 / noise^2)``, v = `FREEDOM`, d the last misfit.

    **Source**: Gelman et al. 2013, Bayesian Data Analysis, section 17.2 (EM for the t model); Rasmussen and Williams 2006, equation 2.25 (mean).
    """
    from scipy import linalg  # noqa: PLC0415 - slow to import, needed where timings are fitted

    centre = float(np.median(residuals))
    target = residuals - centre
    trust = np.ones(len(target))
    solution: Floats = target
    for _ in range(_REWEIGHTINGS):
        system = gram.copy()
        system.flat[:: len(target) + 1] += noise**2 / trust + _JITTER
        # symmetric, so that it is factored in place if it is handed on as columns
        factor = linalg.cho_factor(system.T, overwrite_a=True, check_finite=False)
        solution = np.asarray(linalg.cho_solve(factor, target, check_finite=False), dtype=np.float64)
        misfit = target - gram @ solution
        trust = (FREEDOM + 1.0) / (FREEDOM + (misfit / noise) ** 2)
    return solution, centre


def cross_validated(gram: Floats, residuals: Floats, noise: float, *, seed: int) -> Floats:
    """Predicted minus measured logarithm of each timing from the other folds; shape ``(num,)``."""
    order = np.random.default_rng(seed).permutation(len(residuals))
    errors = np.empty(len(residuals))
    for fold in range(NUM_FOLDS):
        held, kept = order[fold::NUM_FOLDS], np.setdiff1d(order, order[fold::NUM_FOLDS])
        solution, centre = robust_weights(gram[np.ix_(kept, kept)], residuals[kept], noise)
        errors[held] = gram[np.ix_(held, kept)] @ solution + centre - residuals[held]
    return errors


def fit_gridded(
    shapes: Integers, seconds: Floats, *, kernel_class: str, group: str, dtype: str, stack: str, sizes: Sizes, law: PhysicalLaw, source: str,
    evidence: Evidence = "published",
) -> GriddedCurve:  # fmt: skip
    """The curve through timings.

    **Model**: logarithm of time over law = Gaussian process + Student noise; covariance and noise by the least sum of median and `_TAIL_SHARE` of the ninth decile
    of cross-validated errors (`NUM_FOLDS` folds over shapes, seed 1); the errors that are kept are those of other folds (seed 0). Nodes: the posterior mean
    on the product of all sizes that occur.

    Args:
        shapes: as in `Kernel`, shape ``(num, dims)``.
        seconds: of each, shape ``(num,)``, positive.
        kernel_class: of the kernels.
        group: operator.
        dtype: torch's name.
        stack: software.
        sizes: which axes.
        law: of the device and dtype.
        source: of the timings.
        evidence: kind of the timings.
    """
    at = features(sizes, coordinates(sizes, shapes), law.num_multiprocessors)
    residuals = np.log(seconds) - np.log(law_seconds(sizes, shapes, law))
    prior, noise = _best(at, residuals, PRODUCT_PRIORS if sizes == "product" else ATTENTION_PRIORS)
    gram = covariance_of(prior, at, at)
    errors = np.abs(np.expm1(cross_validated(gram, residuals, noise, seed=0)))
    solution, centre = robust_weights(gram, residuals, noise)
    axes = _axes(sizes, shapes)
    nodes = np.stack([part.ravel() for part in np.meshgrid(*(np.log2(axis) for axis in axes), indexing="ij")], axis=1)
    ratios = covariance_of(prior, features(sizes, nodes, law.num_multiprocessors), at) @ solution + centre
    kept = np.sort(errors)[: max(1, int(0.99 * len(errors)))]
    return GriddedCurve(
        kernel_class=kernel_class, group=group, dtype=dtype, stack=stack, evidence=evidence, source=source, sizes=sizes, axes=axes,
        log_ratios=ratios.reshape([len(axis) for axis in axes]), law=law, relative_standard_error=float(np.sqrt(np.mean(kept**2))),
        median_error=float(np.median(errors)), p90_error=float(np.quantile(errors, 0.9)), p99_error=float(np.quantile(errors, 0.99)), num_points=len(seconds),
    )  # fmt: skip


def _best(at: Floats, residuals: Floats, priors: Sequence[tuple[Component, ...]]) -> tuple[tuple[Component, ...], float]:
    """Covariance and noise with the least cross-validated error."""
    best, least = (priors[0], NOISES[0]), float("inf")
    for prior in priors:
        gram = covariance_of(prior, at, at)
        for noise in NOISES:
            errors = np.abs(cross_validated(gram, residuals, noise, seed=1))
            score = float(np.median(errors) + _TAIL_SHARE * np.quantile(errors, 0.9))
            if score < least:
                best, least = (prior, noise), score
    return best


def _axes(sizes: Sizes, shapes: Integers) -> tuple[tuple[float, ...], ...]:
    """Sizes that occur, by axis."""
    at = coordinates(sizes, shapes)
    return tuple(tuple(float(size) for size in np.unique(np.rint(np.exp2(at[:, axis])))) for axis in range(at.shape[1]))
