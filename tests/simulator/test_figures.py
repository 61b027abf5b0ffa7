"""Figures: they show what they were given, need no window, and repeat byte by byte."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

from hardware_models.errors import InputError
from hardware_models.units import GIB
from simulator.figures import TimeMemoryPoint, memory_figure, save_figure, time_memory_figure, timeline_figure
from simulator.program import Kind, MemoryClass, Stream
from simulator.timeline import MemoryProfile, Span, Timeline


def span(name: str, kind: Kind, start_s: float, end_s: float) -> Span:
    return Span(device=0, stream=Stream.COMPUTE, kind=kind, name=name, micro_batch=0, block=0, start_s=start_s, end_s=end_s)


TIMELINE = Timeline(
    spans=(
        span("F0 mb0", Kind.FORWARD, 0.0, 1.0),
        span("B0 mb0", Kind.BACKWARD, 1.0, 3.0),
        span("step", Kind.OPTIMIZER, 3.0, 3.01),
    )
)
PROFILE = MemoryProfile(
    device=0,
    time_s=np.array([0.0, 1.0, 3.0]),
    alive_bytes=np.array([[GIB, 0, 2 * GIB, 0, 0, 0, 0], [GIB, 0, 2 * GIB, 0, 3 * GIB, 0, 0], [GIB, GIB, 2 * GIB, 0, 0, 0, 0]]),
)
MEASURED = MemoryProfile(device=0, time_s=np.array([0.0, 1.5]), alive_bytes=np.array([[3 * GIB], [5 * GIB]]))


def texts(figure: object) -> list[str]:
    return [text.get_text() for text in figure.legends[0].get_texts()]  # type: ignore[attr-defined]


def test_the_timeline_has_a_row_for_each_run_and_labels_what_is_wide_enough() -> None:
    figure = timeline_figure({"predicted": TIMELINE, "measured": TIMELINE}, title="two runs")
    (axes,) = figure.axes
    assert [tick.get_text() for tick in axes.get_yticklabels()] == ["predicted\ncompute", "measured\ncompute"]
    assert [text.get_text() for text in axes.texts] == ["F0 mb0", "B0 mb0"] * 2
    assert texts(figure) == ["forward", "backward", "optimizer"]


def test_the_memory_of_one_run_is_areas_by_class() -> None:
    figure = memory_figure({"predicted": PROFILE}, budget_bytes=6.5 * GIB)
    (axes,) = figure.axes
    assert texts(figure) == ["parameters", "gradients", "optimizer states", "activations", "peak 6 GiB", "budget 6.5 GiB"]
    assert len(axes.collections) == len(MemoryClass)
    assert axes.get_ylim()[1] > 6.5


def test_the_memory_of_several_runs_is_a_line_each() -> None:
    figure = memory_figure({"predicted": PROFILE, "measured": MEASURED})
    (axes,) = figure.axes
    assert texts(figure) == ["predicted, peak 6 GiB", "measured, peak 5 GiB"]
    assert axes.lines[0].get_ydata().tolist() == [3.0, 6.0, 4.0]


def test_a_profile_without_classes_is_a_line() -> None:
    assert texts(memory_figure({"measured": MEASURED})) == ["measured, peak 5 GiB"]


def test_time_against_memory_shows_predicted_and_replayed() -> None:
    predicted = [
        TimeMemoryPoint(time_s=1.0, memory_bytes=4 * GIB),
        TimeMemoryPoint(time_s=2.0, memory_bytes=2 * GIB, label="0%"),
    ]
    replayed = [TimeMemoryPoint(time_s=2.1, memory_bytes=2 * GIB)]
    figure = time_memory_figure(predicted, replayed, plain=TimeMemoryPoint(time_s=0.9, memory_bytes=5 * GIB))
    (axes,) = figure.axes
    assert texts(figure) == ["predicted", "replayed", "plain schedule"]
    assert axes.lines[0].get_xdata().tolist() == [2.0, 4.0]
    assert [text.get_text() for text in axes.texts] == ["0%"]


def test_figures_of_nothing_are_empty() -> None:
    for figure in (timeline_figure({}), memory_figure({}), time_memory_figure([])):
        assert len(figure.axes) == 1


@pytest.mark.parametrize("suffix", [".png", ".pdf", ".svg"])
def test_equal_figures_give_equal_files(tmp_path: Path, suffix: str) -> None:
    for name in ("first", "second"):
        save_figure(timeline_figure({"predicted": TIMELINE}), tmp_path / f"{name}{suffix}")
    first = (tmp_path / f"first{suffix}").read_bytes()
    assert first == (tmp_path / f"second{suffix}").read_bytes()
    assert first.startswith({".png": b"\x89PNG", ".pdf": b"%PDF", ".svg": b"<?xml"}[suffix])


@pytest.mark.parametrize("name", ["figure.gif", "figure"])
def test_another_suffix_is_refused(tmp_path: Path, name: str) -> None:
    with pytest.raises(InputError, match=r"figures are \.png, \.pdf, \.svg, but got .*; change the suffix"):
        save_figure(timeline_figure({}), tmp_path / name)


def test_figures_load_no_pyplot() -> None:
    code = "import sys, simulator.figures; sys.exit('matplotlib.pyplot' in sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parents[2])
