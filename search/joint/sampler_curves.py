"""Curves of the best plan over simulations, and their file."""

from __future__ import annotations

import csv
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite
from pathlib import Path

from hardware_models.csv_table import Cells, rows_of
from hardware_models.files import whole_file

OURS = "best bound first"
COLUMNS = ("setting", "method", "seed", "simulations", "best_s", "bound_s")


@dataclass(frozen=True, slots=True, kw_only=True)
class CurvePoint:
    """How far a method had come after some simulations."""

    setting: str
    method: str
    """`OURS` or a sampler."""
    seed: int
    simulations: int
    best_s: float
    """Time of its best plan; infinite before the first one that fits."""
    bound_s: float
    """A time that no plan of the space is below, as far as it was proven then."""


def write_curves(points: Sequence[CurvePoint], path: Path) -> None:
    """A line for each point; an infinite time is an empty cell."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.writer(stream, lineterminator="\n")
        writer.writerow(COLUMNS)
        for one in points:
            best = f"{one.best_s:.6g}" if isfinite(one.best_s) else ""
            writer.writerow((one.setting, one.method, one.seed, one.simulations, best, f"{one.bound_s:.6g}"))


def read_curves(path: Path) -> tuple[CurvePoint, ...]:
    """What `write_curves` wrote.

    Raises:
        InputError: no such file, or a cell that breaks a rule.
    """
    return tuple(_point(row) for row in rows_of(path))


def _point(row: Cells) -> CurvePoint:
    return CurvePoint(
        setting=row.text("setting"), method=row.text("method"), seed=int(row.text("seed")), simulations=int(row.text("simulations")),
        best_s=row.number("best_s") if row.has("best_s") else inf, bound_s=row.number("bound_s"),
    )  # fmt: skip
