"""The main job, end to end on this machine's CPU: calibrate, trace, search, simulate, replay, compare.

``python -m validation.demo --out demo_out``
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import click
from rich.console import Console
from rich.table import Table

from hardware_models.calibration import calibrate
from hardware_models.catalogue import load_hardware, this_profile_path
from hardware_models.profile import DeviceProfile
from hardware_models.units import GIB, format_bytes
from simulator.chrome_trace import write_chrome_trace
from simulator.figures import memory_figure, save_figure, timeline_figure
from simulator.model_source import ModelSource, model_source
from simulator.workload import Workload
from validation.budgets import BudgetStudy, budget_study

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
    studies = [_study(model, device, out, console, say) for model in MODELS]
    console.print(comparison(studies))
    for study in studies:
        say(f"wrote {', '.join(str(path) for path in write_results(study, out))}")
    say("done; open a trace.json at https://ui.perfetto.dev")


def _calibrated(say: object) -> DeviceProfile:
    tell = say if callable(say) else print
    tell("1. calibrating this machine's CPU (schedlab calibrate --quick)")
    folder = this_profile_path("cpu")
    calibrate(folder, quick=True)
    device = load_hardware("this")
    tell(f"   {device.name}: {len(device.curves)} curves of kernels, profile in {folder}")
    return device


def _study(model: DemoModel, device: DeviceProfile, out: Path, console: Console, say: object) -> BudgetStudy:
    tell = say if callable(say) else print
    tell(f"2. tracing {model.name} on fake tensors")
    source: ModelSource = model_source(model.name, device=device, batch=model.batch, seq_len=model.seq_len)
    console.print(workload_table(source.workload(source.global_batch)))
    tell(f"3. searching {model.name}, 4. simulating and 5. replaying the best plan {BUDGET_FRACTION:.0%} of the way from least to plain memory")
    return budget_study(source, device, fractions=(BUDGET_FRACTION,), repeats=model.repeats, progress=lambda text: tell("   " + text))


def workload_table(workload: Workload) -> Table:
    """Distinct blocks with what each option keeps."""
    title = f"{workload.model}: {len(workload.blocks)} blocks, {workload.parameter_elements:,} parameters, {workload.model_flops / 1e9:.1f} GFLOP a micro-batch of {workload.micro_batch}"
    table = Table(title=title, title_justify="left")
    for column in ("block", "times", "GFLOP forward", "kernels", "saved: all", "saved: selective", "saved: input only"):
        table.add_column(column, justify="right")
    for block in dict.fromkeys(map(id, workload.blocks)):
        first = next(index for index, one in enumerate(workload.blocks) if id(one) == block)
        one = workload.blocks[first]
        saved = [format_bytes(sum(tensor.size_bytes for tensor in option.saved)) for option in one.options]
        table.add_row(
            str(first), str(sum(id(other) == block for other in workload.blocks)), f"{one.discard.flops / 1e9:.2f}",
            str(len(one.discard.kernels)), saved[0], saved[1] if len(saved) > 1 else "", format_bytes(one.input_bytes),
        )  # fmt: skip
    return table


def comparison(studies: list[BudgetStudy]) -> Table:
    """Predicted beside measured beside the plain schedule."""
    table = Table(title="6. predicted and measured, beside the plain module", title_justify="left")
    for column in ("schedule", "step predicted", "measured", "error", "peak predicted", "measured", "error", "budget", "gradients"):
        table.add_column(column, justify="left" if column == "schedule" else "right")
    for study in studies:
        plain, run = study.replay.plain_predicted, study.replay
        table.add_row(
            f"{study.model} plain", f"{plain.step_time_s:.3f} s", f"{run.plain_times.median_s:.3f} s",
            f"{plain.step_time_s / run.plain_times.median_s - 1:+.1%}", f"{plain.peak_memory_bytes[0] / GIB:.4f} GiB",
            f"{run.plain_memory.allocated_bytes / GIB:.4f} GiB", f"{plain.peak_memory_bytes[0] / run.plain_memory.allocated_bytes - 1:+.2%}",
            "", "",
        )  # fmt: skip
        for row in study.rows():
            kept = "kept" if row["kept"] else "exceeded"
            table.add_row(
                f"{study.model} {row['plan']}", f"{row['predicted_s']:.3f} s", f"{row['measured_s']:.3f} s", f"{row['time_error']:+.1%}",
                f"{row['predicted_bytes'] / GIB:.4f} GiB", f"{row['measured_bytes'] / GIB:.4f} GiB", f"{row['memory_error']:+.2%}",
                f"{row['budget_bytes'] / GIB:.3f} GiB {kept}", "bitwise equal" if row["bitwise"] else "differ",
            )  # fmt: skip
    return table


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
    runs = {"predicted": (result.predicted.timeline, result.predicted.profiles), "measured": (result.timeline, (profile,) if profile else ())}
    write_chrome_trace(paths[2], runs)
    return paths


if __name__ == "__main__":
    main()
