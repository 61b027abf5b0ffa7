"""Figures of predictions against published runs."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib as mpl
from matplotlib.figure import Figure

from hardware_models.csv_table import rows_of
from simulator.figures import plain_log_ticks
from validation.table_check import TableCheck

SIZE_INCHES = (9.0, 4.8)
PERCENT = 100.0
_BAR, _MARK = "#56B4E9", "#D55E00"
"""Of Okabe and Ito, which readers with any colour vision tell apart."""
_ROW_INCHES = 0.32
_DOT = 9.0
_BAND = 0.1
"""Relative error that is shaded."""


def scatter_figure(checks: Sequence[TableCheck]) -> Figure:
    """Step time predicted over measured, and peak memory likewise: a dot a row, a colour a table, with 10% to either side shaded."""
    figure = Figure(figsize=SIZE_INCHES, layout="constrained")
    axes = figure.subplots(1, 2)
    colours = mpl.colormaps["tab20"].colors  # type: ignore[attr-defined]
    for number, check in enumerate(checks):
        colour = colours[number % len(colours)]
        times = [(row.step_time.measured or 0.0, row.step_time.predicted) for row in check.timed]
        peaks = [
            (row.peak_memory.measured, row.peak_memory.predicted) for row in check.rows if row.peak_memory.measured is not None
        ]
        for axis, points, scale in ((axes[0], times, 1.0), (axes[1], peaks, 1e-9)):
            if points:
                measured, predicted = zip(*points, strict=True)
                axis.scatter(
                    [x * scale for x in measured],
                    [y / x for x, y in zip(measured, predicted, strict=True)],
                    s=_DOT,
                    color=colour,
                    label=check.path.stem.replace("_", " "),
                    linewidths=0,
                )
    for axis, quantity in zip(axes, ("step time, s", "peak memory, GB"), strict=True):
        axis.axhspan(1.0 - _BAND, 1.0 + _BAND, color="0.9", zorder=0)
        axis.axhline(1.0, color="0.5", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel(f"measured {quantity}")
        axis.set_ylabel("predicted / measured")
        plain_log_ticks(axis.xaxis)
    handles = {label: handle for axis in axes for handle, label in zip(*axis.get_legend_handles_labels(), strict=True)}
    figure.legend(handles.values(), handles.keys(), loc="outside lower center", ncols=4, frameon=False, fontsize=7)
    return figure


@dataclass(frozen=True, slots=True, kw_only=True)
class TableError:
    """One table of published runs: how far predictions are off."""

    table: str
    num_timed: int
    mape: float
    """Mean of |predicted / measured - 1| over step times."""
    bias: float


def read_table_errors(path: Path) -> tuple[TableError, ...]:
    """The tables of ``published.csv`` that have step times.

    Raises:
        InputError: no such file, or a cell that breaks a rule.
    """
    rows = [row for row in rows_of(path) if row.has("mape")]
    return tuple(
        TableError(table=row.text("table"), num_timed=int(row.text("num_timed")), mape=row.number("mape"), bias=float(row.text("bias")))
        for row in rows
    )  # fmt: skip


def table_errors_figure(errors: Sequence[TableError]) -> Figure:
    """Mean error of the step time by table, least on top, with the bias as a mark."""
    rows = sorted(errors, key=lambda one: -one.mape)
    figure = Figure(figsize=(SIZE_INCHES[0], _ROW_INCHES * len(rows) + 1.0), layout="constrained")
    axes = figure.add_subplot()
    places = range(len(rows))
    axes.barh(places, [one.mape * PERCENT for one in rows], color=_BAR, label="mean error")
    axes.plot([one.bias * PERCENT for one in rows], places, "D", color=_MARK, label="bias", linestyle="none")
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(places, [f"{one.table.replace('_', ' ')} ({one.num_timed})" for one in rows], fontsize=8)
    axes.set_xlabel("step time: predicted over measured, less 1 (%)")
    axes.legend(frameon=False)
    return figure
