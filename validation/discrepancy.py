"""How far predictions of whole runs are off beyond what prices of kernels say: spreads per kind of run, estimated leaving one table out.

A spread widens intervals and makes out-of-memory a probability. It never moves a prediction.

**The rule of intervals**, all of it: an 80% interval is ``prediction (1 +- z sqrt(s^2 + (c k)^2))``. k: the relative standard error of the step's prices, which takes errors of one curve as one; c = `PRICE_SHARE`, since they are
those of several shapes. s: the spread of runs of the same kind (`kind_of`: within a node or across nodes, with pipeline stages or without, since contention, stragglers and what the host does around messages are
not simulated or only partly) over the *other* tables, of all kinds where no other table has that one: ``s^2 = t^2 + w^2``, random effects. Rows of a table share a cluster, a trainer and so an error (t, between tables), around which they
scatter (w, within a table); a new table draws one of the former and each of its rows one of the latter (`spread_of`).

    python -m validation.published_results --tables DIR --out validation/results
"""

from __future__ import annotations

import tomllib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from math import erf, hypot, sqrt
from pathlib import Path
from types import MappingProxyType
from typing import Any

import numpy as np

from simulator.plan import Plan

DISCREPANCY_FILE = Path(__file__).parent / "results" / "discrepancy.toml"
QUANTILE = 0.8
"""Share of measurements that an interval is to hold."""
NORMAL_Z = 1.2816
"""Half-width, in standard deviations of a normal distribution, that holds `QUANTILE`."""
PRICE_SHARE = 0.5
"""Part of the prices' stated error that counts: prices of one curve are taken as off alike, but a layer has four products of different shapes (queries to values, output, up, down) that take most of its time,
and what a curve states are errors at single shapes, found by leaving these out: independent ones average to a half."""
WITHOUT_TABLES = 0.15
"""Spread where no table was compared yet: the largest mean error that the project aims at on any table, rounded up."""
_ANY = "any"


@dataclass(frozen=True, slots=True, kw_only=True)
class Residual:
    """How far one measurement lies from its prediction, for estimating spreads."""

    table: str
    kind: str
    """Of the run: `kind_of`."""
    error: float
    """``measured / predicted - 1``: relative to the prediction, as intervals are."""
    kernel_error: float
    """Relative standard error of the row's prices."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Discrepancy:
    """Spreads by table left out and kind of run; table ``any`` leaves none out."""

    time: Mapping[str, Mapping[str, float]]
    memory: Mapping[str, Mapping[str, float]]

    def time_spread(self, table: str, kind: str) -> float:
        """Standard deviation of a step time's relative error beyond the prices'."""
        return _spread(self.time, table, kind)

    def memory_spread(self, table: str, kind: str) -> float:
        """The same of a peak of memory."""
        return _spread(self.memory, table, kind)


def kind_of(plan: Plan, devices_per_node: int) -> str:
    """The kind of a run: ``node`` or ``nodes``, and whether it has pipeline stages."""
    place = "nodes" if plan.num_gpus > devices_per_node else "node"
    return f"{place}, stages" if plan.parallel.pp > 1 else place


def _spread(spreads: Mapping[str, Mapping[str, float]], table: str, kind: str) -> float:
    of_table = spreads.get(table) or spreads.get(_ANY) or {}
    return of_table.get(kind, of_table.get(_ANY, WITHOUT_TABLES))


def half_width(spread: float, kernel_error: float) -> float:
    """Half of an 80% interval, relative to the prediction.

    **Model**: both parts are independent: ``z sqrt(spread^2 + (c kernel_error)^2)``, c = `PRICE_SHARE`.
    """
    return NORMAL_Z * hypot(spread, PRICE_SHARE * kernel_error)


def probability_above(predicted: float, limit: float, spread: float) -> float:
    """Probability that a value predicted with this relative spread exceeds a limit: of a normal distribution; 0 or 1 without spread."""
    if predicted <= 0.0 or spread <= 0.0:
        return float(predicted > limit)
    return 0.5 * (1.0 + erf((predicted - limit) / (spread * predicted) / sqrt(2.0)))


def spread_of(residuals: Sequence[Residual]) -> float:
    """The spread of a row of a table that was not seen: between tables and within one.

    **Model**: ``sqrt(t^2 + w^2)``. t: root mean square of the tables' median errors, from 0, since predictions are not moved. w: mean over the tables of the width that holds 80% of a table's rows around their median, over z.
    Tables count alike, however many rows they have; medians and quantiles, since single rows are far off (a layout that nothing explains, a run that was disturbed).

    **Not modelled**: errors of prices are in these spreads already, and count once more with a row's own, which are of its device and may be worse than the others'.

    **Source**: DerSimonian and Laird 1986, "Meta-analysis in clinical trials", Controlled Clinical Trials 7 (random effects; here with robust estimates and no common mean).
    """
    tables: dict[str, list[float]] = {}
    for one in residuals:
        tables.setdefault(one.table, []).append(one.error)
    medians = [float(np.median(errors)) for errors in tables.values()]
    widths = [
        float(np.quantile(np.abs(np.array(errors) - middle), QUANTILE)) / NORMAL_Z
        for errors, middle in zip(tables.values(), medians, strict=True)
    ]
    return hypot(float(np.sqrt(np.mean(np.square(medians)))), float(np.mean(widths)))


def spreads_of(residuals: Sequence[Residual]) -> dict[str, dict[str, float]]:
    """Spreads leaving each table out in turn, and leaving none out, by kind of run and over all kinds."""
    tables = sorted({one.table for one in residuals})
    found: dict[str, dict[str, float]] = {}
    for left_out in (_ANY, *tables):
        others = [one for one in residuals if one.table != left_out]
        if not others:
            continue
        kinds = sorted({one.kind for one in others})
        found[left_out] = {_ANY: spread_of(others)} | {
            kind: spread_of([one for one in others if one.kind == kind]) for kind in kinds
        }
    return found


@lru_cache(maxsize=4)
def read_discrepancy(path: Path = DISCREPANCY_FILE) -> Discrepancy:
    """The committed spreads; without a file the same spread everywhere."""
    if not path.is_file():
        return Discrepancy(time=MappingProxyType({}), memory=MappingProxyType({}))
    values: dict[str, Any] = tomllib.loads(path.read_text(encoding="utf-8"))
    return Discrepancy(time=MappingProxyType(values.get("time", {})), memory=MappingProxyType(values.get("memory", {})))
