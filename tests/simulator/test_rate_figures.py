"""The figure of the engines' rates: points of every engine, a line for each."""

from __future__ import annotations

from pathlib import Path

import pytest

from simulator.figures import save_figure
from simulator.rate_figures import RatePoint, rate_figure, rate_points


def test_a_line_goes_through_the_longest_program_of_each_engine(tmp_path: Path) -> None:
    points = {
        name: (RatePoint(num_instructions=10, duration_s=3.0), RatePoint(num_instructions=100, duration_s=20.0))
        for name in "abcd"
    }
    figure = rate_figure(points)
    line, dots = figure.axes[0].lines[:2]
    assert list(line.get_ydata()) == [2.0, 20.0]
    assert list(dots.get_ydata()) == [3.0, 20.0]
    assert dots.get_label() == "a: 5.0e+00 a second"
    save_figure(figure, tmp_path / "rates.png")
    assert (tmp_path / "rates.png").stat().st_size > 0


@pytest.mark.slow
def test_each_engine_is_measured_and_four_times_the_program_costs_about_four_times_as_much() -> None:
    points = rate_points((32, 128), rounds=15)
    assert len(points) == 4
    for short, long in points.values():
        growth = long.num_instructions / short.num_instructions
        assert long.duration_s / short.duration_s < 2 * growth
