"""Files that show a prediction: trace and figures."""

from __future__ import annotations

from pathlib import Path

from simulator.chrome_trace import write_chrome_trace
from simulator.parallel.simulate_traced import TracedSimulation
from simulator.parallel.simulation import ParallelSimulation
from simulator.simulate import Simulation


def write_figures(
    simulation: Simulation | ParallelSimulation | TracedSimulation, *, trace_path: Path | None, plot_path: Path | None, name: str, budget_bytes: int | None
) -> None:  # fmt: skip
    """The trace and the plots that were asked for."""
    if trace_path:
        write_chrome_trace(trace_path, {"predicted": (simulation.timeline, simulation.profiles)})
    if plot_path:
        from simulator.figures import memory_figure, save_figure, timeline_figure  # noqa: PLC0415 - matplotlib only where a figure is drawn

        save_figure(timeline_figure({"predicted": simulation.timeline}, title=name), plot_path)
        memory_path = plot_path.with_stem(plot_path.stem + "-memory")
        save_figure(memory_figure({"predicted": simulation.profiles[0]}, budget_bytes=budget_bytes, title=name), memory_path)
