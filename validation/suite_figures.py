"""Figures of a replay suite: predicted against measured times and bytes, and timelines of single cases."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib.figure import Figure

from hardware_models.units import GIB, MS_PER_S
from simulator.figures import plain_log_ticks, save_figure, timeline_figure
from simulator.program import Kind, Stream
from simulator.timeline import Span, Timeline
from validation.suite_report import SuiteRow

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#999999", "#000000")
"""Okabe and Ito's."""
_KINDS = {"F": Kind.FORWARD, "R": Kind.RECOMPUTE, "B": Kind.BACKWARD, "s": Kind.OPTIMIZER, "T": Kind.TRANSFER}


def scatter_figure(rows: Sequence[SuiteRow]) -> Figure:
    """Measured against predicted: step times left, allocated bytes right; a colour a model, the diagonal is a perfect prediction."""
    figure = Figure(figsize=(9.0, 4.2), layout="constrained")
    known = [row for row in rows if row.predicted is not None and not row.failed]
    models = list(dict.fromkeys(row.model for row in known))
    panels = {"step, ms": [_times_ms(row) for row in known], "allocated, GiB": [_bytes_gib(row) for row in known]}
    for axes, (title, pairs) in zip(figure.subplots(1, 2), panels.items(), strict=True):
        points = np.array(pairs)
        for number, model in enumerate(models):
            own = np.array([row.model == model for row in known])
            axes.plot(points[own, 0], points[own, 1], "o", color=_COLOURS[number % len(_COLOURS)], label=model, markersize=4)
        ends = [points.min(), points.max()]
        axes.plot(ends, ends, color="black", linewidth=0.8)
        axes.set(xscale="log", yscale="log", xlabel=f"predicted {title}", ylabel=f"measured {title}")
        axes.set_aspect("equal", adjustable="datalim")
        plain_log_ticks(axes.xaxis, axes.yaxis)
    figure.axes[0].legend(fontsize=7)
    return figure


def _times_ms(row: SuiteRow) -> tuple[float, float]:
    assert row.predicted is not None
    return row.predicted.step_time_s * MS_PER_S, row.measured["step_time_s"]["median"] * MS_PER_S


def _bytes_gib(row: SuiteRow) -> tuple[float, float]:
    assert row.predicted is not None
    return row.predicted.peak_allocated_bytes[0] / GIB, row.measured["allocated_bytes"] / GIB


def measured_timeline(row: SuiteRow) -> Timeline:
    """The spans of a measured step."""
    spans = tuple(
        Span(
            device=0,
            stream=Stream[stream],
            kind=_KINDS[name[0]],
            name=name,
            micro_batch=-1,
            block=-1,
            start_s=start_s,
            end_s=end_s,
        )
        for stream, name, start_s, end_s in row.measured["spans"]
    )
    return Timeline(spans=spans)


def write_figures(rows: Sequence[SuiteRow], out: Path) -> None:
    """The scatter, and the timeline of each model's case with most errands on the host."""
    save_figure(scatter_figure(rows), out / "scatter.png")
    for row in rows:
        if row.predicted is not None and not row.failed and row.case.name.endswith(": all on host"):
            runs = {"predicted": row.predicted.timeline, "measured": measured_timeline(row)}
            save_figure(timeline_figure(runs, title=row.case.name), out / f"timeline-{row.model.replace(' ', '-')}.png")
