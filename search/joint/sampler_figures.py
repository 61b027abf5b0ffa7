"""Figure of the best plan over simulations: best bound first beside samplers that know no bounds."""

from __future__ import annotations

from collections.abc import Sequence
from math import isfinite, nan
from types import MappingProxyType

from matplotlib.axes import Axes
from matplotlib.figure import Figure

from search.joint.sampler_curves import OURS, CurvePoint
from simulator.figures import plain_log_ticks

COLOURS = MappingProxyType({OURS: "#0072B2", "tpe": "#D55E00", "nsga2": "#009E73", "random": "#CC79A7"})
"""Of Okabe and Ito, which readers with any colour vision tell apart."""
_WIDTH_IN, _HEIGHT_IN = 4.2, 3.6
_HEADROOM = 1.6
"""Times above this multiple of the best one are cut off: what samplers begin with would hide where they end."""


def sampler_figure(points: Sequence[CurvePoint]) -> Figure:
    """Best step time over simulated plans, an axis for each setting, a line for each run; the search's proven bound is dotted."""
    settings = list(dict.fromkeys(point.setting for point in points))
    figure = Figure(figsize=(_WIDTH_IN * max(len(settings), 1), _HEIGHT_IN), layout="constrained")
    for place, setting in enumerate(settings):
        axes = figure.add_subplot(1, len(settings), place + 1)
        _draw(axes, [point for point in points if point.setting == setting])
        axes.set_title(setting, fontsize=9)
    handles = {label: handle for axes in figure.axes for handle, label in zip(*axes.get_legend_handles_labels(), strict=True)}
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=len(handles) or 1, frameon=False, fontsize=9
    )
    return figure


def _draw(axes: Axes, points: Sequence[CurvePoint]) -> None:
    runs = list(dict.fromkeys((point.method, point.seed) for point in points))
    last = max(point.simulations for point in points)
    for method, seed in runs:
        run = [point for point in points if (point.method, point.seed) == (method, seed)]
        x = [*(point.simulations for point in run), last]
        best = [point.best_s if isfinite(point.best_s) else nan for point in (*run, run[-1])]
        axes.step(x, best, where="post", color=COLOURS[method], linewidth=1.2, label=method if seed == 0 else None)
        if method == OURS:
            bounds = [point.bound_s for point in (*run, run[-1])]
            axes.step(x, bounds, where="post", color=COLOURS[method], linewidth=1.0, linestyle=":", label="its proven bound")
    found = [point.best_s for point in points if isfinite(point.best_s)]
    axes.set_ylim(min([*found, *(point.bound_s for point in points)]) * 0.97, min(found) * _HEADROOM)
    axes.set_xscale("log")
    plain_log_ticks(axes.xaxis)
    axes.set_xlabel("simulated plans")
    axes.set_ylabel("best step time (s)")
