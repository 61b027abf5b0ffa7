"""Figures of predictions against published runs."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib as mpl
from matplotlib.figure import Figure

from validation.table_check import TableCheck

SIZE_INCHES = (9.0, 4.5)
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
                    label=check.path.stem,
                    linewidths=0,
                )
    for axis, quantity in zip(axes, ("step time, s", "peak memory, GB"), strict=True):
        axis.axhspan(1.0 - _BAND, 1.0 + _BAND, color="0.9", zorder=0)
        axis.axhline(1.0, color="0.5", linewidth=0.8)
        axis.set_xscale("log")
        axis.set_xlabel(f"measured {quantity}")
        axis.set_ylabel("predicted / measured")
        axis.legend(fontsize=5)
    return figure
