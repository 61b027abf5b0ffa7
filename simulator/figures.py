"""Figures of runs: timeline, bytes over time, time against memory. For papers: PNG, PDF or SVG, safe for colour-blind readers.

Each function returns a `matplotlib.figure.Figure` that belongs to no window and no global state; `save_figure` writes it.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

import matplotlib as mpl
import numpy as np
from matplotlib.axes import Axes
from matplotlib.axis import Axis
from matplotlib.figure import Figure
from matplotlib.patches import Patch
from matplotlib.ticker import LogLocator, NullFormatter, StrMethodFormatter
from numpy.typing import NDArray

from hardware_models.errors import InputError
from hardware_models.files import whole_file
from hardware_models.units import GIB
from simulator.program import Kind, MemoryClass
from simulator.timeline import MemoryProfile, Span, Timeline

SUFFIXES = (".png", ".pdf", ".svg")
_DOTS_PER_INCH = 200
_WIDTH_IN = 9.0
_ROW_HEIGHT_IN = 0.62
_MARGIN_HEIGHT_IN = 1.25
_PLOT_HEIGHT_IN = 4.2
_AXES_SHARE = 0.85
"""Part of the width that the axes take, about: the rest is labels and margins."""
_LABEL_POINTS = 7.0
_POINTS_PER_INCH = 72
_GLYPH_ASPECT = 0.62
"""Width of a character over the font size, about."""
_LEAST_SHARE = 1e-3
"""Classes below this share of the peak get no entry in the legend."""

KIND_COLOURS = MappingProxyType(
    {
        Kind.FORWARD: "#0072B2", Kind.RECOMPUTE: "#E69F00", Kind.BACKWARD: "#009E73", Kind.OPTIMIZER: "#CC79A7", Kind.REDUCE: "#56B4E9", Kind.TRANSFER: "#D55E00", Kind.DISPATCH: "#999999",
    }
)  # fmt: skip
"""Colours of Okabe and Ito, which readers with any colour vision tell apart."""
CLASS_COLOURS = MappingProxyType(
    {
        MemoryClass.PARAMETERS: "#0072B2", MemoryClass.GRADIENTS: "#56B4E9", MemoryClass.OPTIMIZER_STATES: "#CC79A7",
        MemoryClass.BATCH: "#999999", MemoryClass.ACTIVATIONS: "#E69F00", MemoryClass.TRANSIENT: "#F0E442",
        MemoryClass.FRAMEWORK: "#000000",
    }
)  # fmt: skip
_RUN_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
_BUDGET_COLOUR = "black"
_HEADROOM = 1.06
"""Top of an axis over its largest value."""
_MOST_COLUMNS = 5
"""Legends with more entries than this take two rows."""
_PERCENT = 100.0
_WHITE_TEXT = frozenset({Kind.FORWARD, Kind.BACKWARD})


@dataclass(frozen=True, slots=True, kw_only=True)
class TimeMemoryPoint:
    """One schedule's step time and peak of memory."""

    time_s: float
    memory_bytes: float
    label: str = ""
    """Written beside the point."""


def timeline_figure(runs: Mapping[str, Timeline], *, title: str = "") -> Figure:
    """Spans of named runs: a row for each run, device and stream, coloured by kind, labelled where there is room."""
    rows = {
        (run, device, stream): [span for span in timeline.spans if (span.device, span.stream) == (device, stream)]
        for run, timeline in runs.items()
        for device, stream in sorted({(span.device, span.stream) for span in timeline.spans})
    }
    several = len({device for _, device, _ in rows}) > 1
    figure, axes = _figure(_MARGIN_HEIGHT_IN + _ROW_HEIGHT_IN * max(len(rows), 1))
    width_s = max((timeline.makespan_s for timeline in runs.values()), default=0.0) or 1.0
    for place, spans in enumerate(rows.values()):
        _draw_spans(axes, place, spans, width_s)
    names = [f"{run}\n{f'device {device} ' if several else ''}{stream.name.lower()}" for run, device, stream in rows]
    axes.set_yticks(range(len(rows)), names)
    axes.set_ylim(max(len(rows), 1) - 0.5, -0.5)
    axes.set_xlim(0.0, width_s)
    axes.set_xlabel("time (s)")
    axes.tick_params(axis="y", length=0)
    axes.spines["left"].set_visible(False)
    kinds = [kind for kind in Kind if any(span.kind is kind for spans in rows.values() for span in spans)]
    _legend(figure, [Patch(facecolor=KIND_COLOURS[kind], label=kind.name.lower()) for kind in kinds], title)
    return figure


def memory_figure(profiles: Mapping[str, MemoryProfile], *, budget_bytes: float | None = None, title: str = "") -> Figure:
    """Bytes over time: areas by class for a single run that tells classes apart, else a line for each run.

    Args:
        profiles: runs by name.
        budget_bytes: drawn as a dashed line.
        title: of the figure.
    """
    figure, axes = _figure(_PLOT_HEIGHT_IN)
    profile = next(iter(profiles.values())) if len(profiles) == 1 else None
    if profile is not None and profile.alive_bytes.shape[1] == len(MemoryClass):
        _draw_classes(axes, profile)
    else:
        for place, (run, one) in enumerate(profiles.items()):
            colour = _RUN_COLOURS[place % len(_RUN_COLOURS)]
            label = f"{run}, peak {one.peak_bytes / GIB:.3g} GiB"
            axes.step(one.time_s, one.total_bytes / GIB, where="post", color=colour, linewidth=1.2, label=label)
    if budget_bytes is not None:
        axes.axhline(
            budget_bytes / GIB,
            color=_BUDGET_COLOUR,
            linestyle="--",
            linewidth=1.4,
            label=f"budget {budget_bytes / GIB:.3g} GiB",
        )
    axes.set_xlim(0.0, max((float(one.time_s[-1]) for one in profiles.values()), default=0.0) or 1.0)
    highest_bytes = max([1.0, budget_bytes or 0.0, *(one.peak_bytes for one in profiles.values())])
    axes.set_ylim(0.0, highest_bytes / GIB * _HEADROOM)
    axes.set_xlabel("time (s)")
    axes.set_ylabel("memory (GiB)")
    handles, _ = axes.get_legend_handles_labels()
    _legend(figure, handles, title)
    return figure


def time_memory_figure(
    predicted: Sequence[TimeMemoryPoint],
    replayed: Sequence[TimeMemoryPoint] = (),
    *,
    plain: TimeMemoryPoint | None = None,
    title: str = "",
) -> Figure:
    """Step time against peak memory: predicted schedules as a line with points, replayed ones as crosses, the plain one as a star."""
    figure, axes = _figure(_PLOT_HEIGHT_IN)
    line = sorted(predicted, key=lambda point: point.memory_bytes)
    axes.plot(*_coordinates(line), "o-", color=_RUN_COLOURS[0], markersize=6, linewidth=1.4, label="predicted")
    if replayed:
        axes.plot(*_coordinates(replayed), "X", color=_RUN_COLOURS[1], markersize=8, markeredgecolor="white", label="replayed")
    if plain is not None:
        axes.plot(*_coordinates([plain]), "*", color="black", markersize=12, label="plain schedule")
    for point in line:
        if point.label:
            place = (point.memory_bytes / GIB, point.time_s)
            axes.annotate(point.label, place, xytext=(6, 8), textcoords="offset points", fontsize=_LABEL_POINTS + 1)
    everything = [*line, *replayed, *([] if plain is None else [plain])]
    axes.set_ylim(0.0, max((point.time_s for point in everything), default=1.0) * _HEADROOM)
    axes.set_xlabel("peak memory (GiB)")
    axes.set_ylabel("step time (s)")
    axes.grid(visible=True, color="#dddddd", linewidth=0.6)
    axes.set_axisbelow(True)
    handles, _ = axes.get_legend_handles_labels()
    _legend(figure, handles, title)
    return figure


def tornado_figure(effects: Sequence[tuple[str, float, float]], *, title: str = "") -> Figure:
    """How far single values move the step's time: a bar to either side for each, the longest on top.

    Args:
        effects: (name, relative change of the step's time with the better value, with the worse one).
        title: of the figure.
    """
    rows = sorted(effects, key=lambda row: abs(row[1]) + abs(row[2]))
    figure, axes = _figure(_MARGIN_HEIGHT_IN + _ROW_HEIGHT_IN * max(len(rows), 1) / 2)
    for place, (_, better, worse) in enumerate(rows):
        axes.barh(place, better * _PERCENT, color=_RUN_COLOURS[2], label="better" if place == 0 else None)
        axes.barh(place, worse * _PERCENT, color=_RUN_COLOURS[1], label="worse" if place == 0 else None)
    axes.axvline(0.0, color="black", linewidth=0.8)
    axes.set_yticks(range(len(rows)), [name for name, _, _ in rows])
    axes.set_xlabel("change of the step's time (%)")
    handles, _ = axes.get_legend_handles_labels()
    _legend(figure, handles, title)
    return figure


def plain_log_ticks(*axes: Axis) -> None:
    """Logarithmic axes labelled 1, 2, 5, 10, ... in plain numbers, however short they are."""
    for axis in axes:
        axis.set_major_locator(LogLocator(base=10.0, subs=(1.0, 2.0, 5.0)))
        axis.set_major_formatter(StrMethodFormatter("{x:g}"))
        axis.set_minor_formatter(NullFormatter())


def save_figure(figure: Figure, path: Path) -> None:
    """Writes a figure in the format that the suffix names; equal figures give equal files.

    Raises:
        InputError: a suffix other than .png, .pdf and .svg.
    """
    if path.suffix.lower() not in SUFFIXES:
        rule = f"figures are {', '.join(SUFFIXES)}, but got {path.suffix or 'no suffix'!r}"
        raise InputError(source=str(path), key="", value=None, rule=rule, remedy="change the suffix")
    undated = {".png": {}, ".pdf": {"CreationDate": None}, ".svg": {"Date": None}}[path.suffix.lower()]
    with (
        mpl.rc_context({"svg.hashsalt": "schedlab", "svg.fonttype": "none", "pdf.fonttype": 42}),
        whole_file(path) as temporary,
    ):
        figure.savefig(temporary, dpi=_DOTS_PER_INCH, metadata=undated)


def _figure(height_in: float) -> tuple[Figure, Axes]:
    figure = Figure(figsize=(_WIDTH_IN, height_in), layout="constrained")
    axes = figure.add_subplot()
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    return figure, axes


def _legend(figure: Figure, handles: Sequence[object], title: str) -> None:
    if title:
        figure.suptitle(title, fontsize=11)
    if handles:
        columns = len(handles) if len(handles) <= _MOST_COLUMNS else (len(handles) + 1) // 2
        figure.legend(handles=handles, loc="outside lower center", ncols=columns, frameon=False, fontsize=9)


def _draw_spans(axes: Axes, place: int, spans: Sequence[Span], width_s: float) -> None:
    for kind, colour in KIND_COLOURS.items():
        bars = [(span.start_s, span.duration_s) for span in spans if span.kind is kind]
        hatch = "////" if kind is Kind.RECOMPUTE else None
        axes.broken_barh(bars, (place - 0.4, 0.8), facecolors=colour, edgecolor="white", linewidth=0.3, hatch=hatch)
    for span in spans:
        room = span.duration_s / width_s * _WIDTH_IN * _AXES_SHARE * _POINTS_PER_INCH
        label = next(
            (text for text in (span.name, span.name.split()[0]) if len(text) * _LABEL_POINTS * _GLYPH_ASPECT < room), ""
        )
        if label:
            colour = "white" if span.kind in _WHITE_TEXT else "black"
            middle = (span.start_s + span.end_s) / 2
            axes.text(middle, place, label, ha="center", va="center", fontsize=_LABEL_POINTS, color=colour, clip_on=True)


def _draw_classes(axes: Axes, profile: MemoryProfile) -> None:
    base: NDArray[np.float64] = np.zeros(len(profile.time_s))
    for one in MemoryClass:
        top = base + profile.alive_bytes[:, one] / GIB
        shown = profile.alive_bytes[:, one].max() > _LEAST_SHARE * profile.peak_bytes
        label = one.name.lower().replace("_", " ") if shown else None
        axes.fill_between(profile.time_s, base, top, step="post", color=CLASS_COLOURS[one], linewidth=0, label=label)
        base = top
    peak = int(profile.total_bytes.argmax())
    label = f"peak {profile.peak_bytes / GIB:.3g} GiB"
    axes.plot(
        [profile.time_s[peak]], [profile.peak_bytes / GIB], "v", color="black", markersize=5, linestyle="none", label=label
    )


def _coordinates(points: Sequence[TimeMemoryPoint]) -> tuple[list[float], list[float]]:
    return [point.memory_bytes / GIB for point in points], [point.time_s for point in points]
