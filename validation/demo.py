"""The main job, end to end on this machine's CPU: calibrate, trace, search, simulate, replay, compare.

``python -m validation.demo --out demo_out``
"""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console

from hardware_models.calibration import calibrate
from hardware_models.catalogue import load_hardware, this_profile_path
from hardware_models.profile import DeviceProfile
from simulator.chrome_trace import write_chrome_trace
from simulator.figures import memory_figure, save_figure, timeline_figure
from simulator.model_source import ModelSource, model_source
from validation.budgets import BudgetStudy, budget_study
from validation.reports import replay_table, workload_table

Say = Callable[[str], None]
BUDGET_FRACTION = 0.5
"""Of the way from the least memory to the plain schedule's: the plain schedule does not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DemoModel:
    """A network of the demonstration."""

    name: str
    batch: int
    seq_len: int | None
    repeats: int


MODELS = (DemoModel(name="gpt2", batch=4, seq_len=256, repeats=3), DemoModel(name="fno2d", batch=4, seq_len=None, repeats=5))


@click.command()
@click.option("--out", type=click.Path(path_type=Path), default=Path("demo_out"), show_default=True)
def main(out: Path) -> None:
    """Calibrates this CPU, finds the best schedules of GPT-2 small and a Fourier neural operator under a budget, and runs them."""
    console = Console(width=118)
    started = time.perf_counter()

    def say(text: str) -> None:
        console.print(f"[dim]{time.perf_counter() - started:6.1f} s[/dim]  {text}", highlight=False)

    out.mkdir(parents=True, exist_ok=True)
    device = _calibrated(say)
    studies = [_study(model, device, console, say) for model in MODELS]
    console.print(replay_table([(study.model, study.replay) for study in studies]))
    for study in studies:
        say(f"wrote {', '.join(str(path) for path in write_results(study, out))}")
    say("done; open a trace.json at https://ui.perfetto.dev")


def _calibrated(say: Say) -> DeviceProfile:
    say("1. calibrating this machine's CPU (schedlab calibrate --quick)")
    folder = this_profile_path("cpu")
    calibrate(folder, quick=True)
    device = load_hardware("this")
    say(f"   {device.name}: {len(device.curves)} curves of kernels, profile in {folder}")
    return device


def _study(model: DemoModel, device: DeviceProfile, console: Console, say: Say) -> BudgetStudy:
    say(f"2. tracing {model.name} on fake tensors")
    source: ModelSource = model_source(model.name, device=device, batch=model.batch, seq_len=model.seq_len)
    console.print(workload_table(source.workload(source.global_batch)))
    say(
        f"3. searching {model.name}, 4. simulating and 5. replaying the best plan {BUDGET_FRACTION:.0%} of the way from least to plain memory"
    )
    return budget_study(
        source, device, fractions=(BUDGET_FRACTION,), repeats=model.repeats, progress=lambda text: say("   " + text)
    )


def write_results(study: BudgetStudy, out: Path) -> tuple[Path, ...]:
    """Timeline plot, memory plot and Chrome trace of a study's first plan, predicted beside measured."""
    result = study.replay.results[0]
    profile = result.memory.profile
    timelines = {"predicted": result.predicted.timeline, "measured": result.timeline}
    profiles = {"plan, predicted": result.predicted.profiles[0], "plain, predicted": study.replay.plain_predicted.profiles[0]}
    if profile is not None:
        profiles["plan, measured"] = profile
    paths = tuple(out / f"{study.model}-{name}" for name in ("timeline.png", "memory.png", "trace.json"))
    save_figure(timeline_figure(timelines, title=f"{study.model}: one training step"), paths[0])
    save_figure(memory_figure(profiles, budget_bytes=study.budgets_bytes[0], title=f"{study.model}: bytes over time"), paths[1])
    runs = {
        "predicted": (result.predicted.timeline, result.predicted.profiles),
        "measured": (result.timeline, (profile,) if profile else ()),
    }
    write_chrome_trace(paths[2], runs)
    return paths


if __name__ == "__main__":
    main()
