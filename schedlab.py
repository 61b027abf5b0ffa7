"""schedlab: the best joint schedule of a network on the hardware at hand, predicted and proved. Command line and public names."""

from __future__ import annotations

import time
from functools import partial
from pathlib import Path
from typing import Any

import click

from hardware_models.calibration import calibrate as run_calibration
from hardware_models.catalogue import list_hardware, load_hardware, this_profile_path
from hardware_models.files import writable_files
from hardware_models.network.cluster_file import find_cluster, list_clusters, load_cluster
from hardware_models.profile import DeviceProfile
from search.plan_search import search as run_search
from search.plan_sequence import sequence_of
from search.plan_simulator import PlanSimulator
from simulator.chrome_trace import write_chrome_trace
from simulator.model_source import ModelSource, model_source
from simulator.models import MODELS
from simulator.pipeline.catalogue import OrderRequest
from simulator.pipeline.play_order import WEIGHT_SHARE
from simulator.pipeline.report import pipeline_grid, pipeline_report, play_request, times_in_ms
from simulator.plan import Plan, check_gpus
from simulator.plan_file import read_plan
from simulator.presets import PRESETS
from simulator.simulate import ENGINES, Simulation, step_setting
from simulator.simulate import simulate as run_simulation
from simulator.timeline import MemoryProfile, Timeline
from validation.command_line import (
    EXIT_INFEASIBLE,
    EXIT_INPUT,
    TIMES,
    device_profile,
    hardware_option,
    model_options,
    reported,
    stderr,
    with_progress,
)
from validation.figure_files import write_figures
from validation.reports import (
    parallel_table,
    pipeline_table,
    replay_table,
    simulation_table,
    table_of,
    workload_summary,
    workload_table,
)
from validation.search_command import search
from validation.study_commands import export, what_if
from validation.validate_files import validate_files

__all__ = [
    "EXIT_INFEASIBLE",
    "EXIT_INPUT",
    "Plan",
    "Simulation",
    "load_hardware",
    "main",
    "model_source",
    "read_plan",
    "run_search",
    "run_simulation",
]


@click.group(context_settings={"help_option_names": ["-h", "--help"], "max_content_width": 120})
@click.version_option(package_name="schedlab")
def main() -> None:
    """Finds the best schedule for training a network on the devices that you have, and shows that the prediction is right."""


@main.command()
@reported
def models() -> dict[str, Any]:
    """Lists the models known by name."""
    found = {name: {"kind": "traced", "summary": entry.summary} for name, entry in MODELS.items()}
    for name, config in PRESETS.items():
        kind = "traced on a CPU, generated for GPUs" if name in found else "generated"
        found[name] = {"kind": kind, "summary": found.get(name, {}).get("summary", config.source)}
    rows = [(name, str(value["kind"]), str(value["summary"])) for name, value in sorted(found.items())]
    return {"models": found, "_table": table_of("models", ("name", "kind", "source"), rows)}


@main.command()
@reported
def hardware() -> dict[str, Any]:
    """Lists the devices and clusters known by name, and what their values rest on."""
    rows = [(entry.name, entry.kind, entry.provenance) for entry in list_hardware()]
    for name in list_clusters():
        cluster = load_cluster(name)
        rows.append(
            (
                name,
                "cluster",
                f"{cluster.num_gpus} x {cluster.device}, {cluster.devices_per_node} a node; {cluster.evidence}: {cluster.source}",
            )
        )
    found = {name: {"kind": kind, "provenance": provenance} for name, kind, provenance in rows}
    return {"hardware": found, "_table": table_of("hardware", ("name", "kind", "rests on"), rows)}


@main.command()
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the profile (default: the user's cache, as 'this').")
@click.option("--quick", is_flag=True, help="Under a minute instead of eight.")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@reported
def calibrate(out: Path | None, *, quick: bool, device: str) -> dict[str, Any]:
    """Measures this machine's kernels, fits curves and writes a hardware profile."""
    folder = out or this_profile_path(device)
    started = time.perf_counter()
    profile = with_progress(lambda report: run_calibration(folder, quick=quick, device=device, progress=report))
    rows = [
        (curve.kernel_class, curve.group, curve.dtype, f"{curve.relative_standard_error:.1%}", curve.evidence)
        for curve in profile.curves
    ]
    result = {
        "folder": str(folder), "name": profile.name, "elapsed_s": time.perf_counter() - started,
        "dispatch_s": profile.dispatch_s, "memory_bandwidth_bytes_per_s": profile.memory_bandwidth_bytes_per_s,
        "curves": [{"kernel_class": r[0], "group": r[1], "dtype": r[2], "evidence": r[4]} for r in rows],
    }  # fmt: skip
    return result | {
        "_table": table_of(f"{profile.name}: {folder}", ("kernels", "group", "dtype", "residual", "evidence"), rows)
    }


@main.command()
@click.argument("model_name", metavar="MODEL")
@click.option("--batch", type=click.IntRange(min=1), help="Samples in the micro-batch (default: the model's).")
@click.option("--seq-len", type=click.IntRange(min=1), help="Tokens per sample (default: the model's).")
@reported
def trace(model_name: str, batch: int | None, seq_len: int | None) -> dict[str, Any]:
    """Shows a model's workload: blocks, FLOPs, parameters, saved bytes under each recompute option."""
    source = model_source(model_name, batch=batch, seq_len=seq_len)
    workload = source.workload(source.global_batch)
    return workload_summary(workload) | {"_table": workload_table(workload)}


@main.command()
@model_options
@hardware_option
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Plan TOML (default: the plain module).")
@click.option("--gpus", type=click.IntRange(min=1), help="Devices that the plan must use (default: what its degrees give).")
@click.option("--engine", type=click.Choice(sorted(ENGINES)), default="compiled", show_default=True)
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="Write a Chrome trace (opens in Perfetto).")
@click.option(
    "--plot", "plot_path", type=click.Path(path_type=Path), help="Write the timeline; the memory plot goes beside it."
)
@reported
def simulate(
    model_name: str, seq_len: int | None, hardware_name: str, plan_path: Path | None, gpus: int | None, engine: str,
    trace_path: Path | None, plot_path: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Predicts the step time and the memory of a plan."""
    writable_files(trace_path, plot_path)
    plan = read_plan(plan_path) if plan_path else Plan()
    folder = plan_path.parent if plan_path else None
    cluster = find_cluster(hardware_name)
    if cluster is not None:
        device = load_hardware(cluster.device)
        source = model_source(model_name, device=device, seq_len=seq_len).with_plan_batch(plan)
        parallel = PlanSimulator(source).simulate(plan, cluster, device, gpus=gpus, folder=folder, engine=engine)
        write_figures(
            parallel, trace_path=trace_path, plot_path=plot_path, name=model_name, budget_bytes=plan.memory.budget_bytes
        )
        return parallel.to_json() | {"_table": parallel_table(parallel, model_name, cluster.name)}
    device = device_profile(hardware_name)
    source = model_source(model_name, device=device, seq_len=seq_len).with_plan_batch(plan)
    simulation = simulate_plan(source, plan, device, gpus=gpus or 1, folder=folder, engine=engine)
    write_figures(
        simulation, trace_path=trace_path, plot_path=plot_path, name=model_name, budget_bytes=plan.memory.budget_bytes
    )
    return simulation.to_json() | {"_table": simulation_table(simulation)}


def simulate_plan(
    source: ModelSource,
    plan: Plan,
    device: DeviceProfile,
    *,
    gpus: int = 1,
    folder: Path | None = None,
    engine: str = "compiled",
) -> Simulation:
    """A plan's prediction."""
    plan = source.resolve(plan)
    check_gpus(plan, gpus)
    workload = source.workload(plan.batch.micro_batch or source.global_batch)
    operations = sequence_of(plan, workload, device, folder=folder)
    return run_simulation(workload, operations, device, step_setting(plan, len(workload.blocks)), engine=engine)


@main.command()
@model_options
@hardware_option
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Plan TOML (default: the plain module).")
@click.option("--batch", type=click.IntRange(min=1), help="Samples per step (default: the plan's, else the model's).")
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--steps", type=click.IntRange(min=1), default=10, show_default=True, help="Timed steps.")
@click.option("--trace", "trace_path", type=click.Path(path_type=Path), help="Write a Chrome trace, predicted beside measured.")
@click.option(
    "--bundle", type=click.Path(path_type=Path), help="Write plan and program to run elsewhere, and run nothing here."
)
@reported
def replay(
    model_name: str, seq_len: int | None, hardware_name: str, plan_path: Path | None, batch: int | None, device: str, steps: int,
    trace_path: Path | None, bundle: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Runs a plan for real, and sets what was predicted beside what is measured; or writes it to run on a machine that has only torch."""
    from validation.replay_comparison import bundle_replay, replay_case  # noqa: PLC0415
    from validation.replay_comparison import replay as run_replay  # noqa: PLC0415 - torch only where something runs

    writable_files(trace_path, bundle)
    profile = device_profile(hardware_name, device=device)
    plan = read_plan(plan_path) if plan_path else Plan()
    source = model_source(model_name, batch=batch, seq_len=seq_len).with_plan_batch(plan)
    folder, tell = plan_path.parent if plan_path else None, partial(stderr.print, highlight=False)
    if plan.num_gpus > 1:
        from validation.distributed.replay import replay_processes  # noqa: PLC0415

        several = replay_processes(source, plan, profile, steps=steps, on=device, folder=folder, bundle=bundle, progress=tell)
        write_replay_trace(trace_path, several.predicted.timeline, several.predicted.profiles, several.timeline, ())
        return several.to_json() | {"_table": several.table()}
    case = replay_case(plan, source, profile, folder=folder)
    if bundle:
        return bundle_replay(case, source, profile, bundle)
    outcome = run_replay(source, (case,), profile, repeats=steps, on=device, progress=tell)
    (result,) = outcome.results
    measured = (result.memory.profile,) if result.memory.profile else ()
    write_replay_trace(trace_path, result.predicted.timeline, result.predicted.profiles, result.timeline, measured)
    return result.to_json() | {"plain": outcome.plain_json(), "_table": replay_table([(model_name, outcome)])}


def write_replay_trace(
    path: Path | None, predicted: Timeline, predicted_profiles: tuple[MemoryProfile, ...], measured: Timeline,
    measured_profiles: tuple[MemoryProfile, ...],
) -> None:  # fmt: skip
    """Predicted beside measured, if a trace was asked for."""
    if path:
        write_chrome_trace(path, {"predicted": (predicted, predicted_profiles), "measured": (measured, measured_profiles)})


@main.command()
@click.option("--schedule", required=True, help="A pipeline schedule (1f1b, zb-h1, ...) or file:ORDER.csv.")
@click.option("--stages", "num_ranks", type=click.IntRange(min=1), required=True, help="Pipeline ranks.")
@click.option("--microbatches", "num_microbatches", type=click.IntRange(min=1), required=True)
@click.option(
    "--virtual-stages",
    "--chunks",
    "virtual_stages",
    type=click.IntRange(min=1),
    help="Chunks of a rank (default: the schedule's own).",
)
@click.option(
    "--f",
    "forward_ms",
    type=TIMES,
    default="1",
    show_default=True,
    help="Forward, ms of a rank and micro-batch; commas for one per rank.",
)
@click.option("--b", "gradient_ms", type=TIMES, default="1", show_default=True, help="Input gradient.")
@click.option("--w", "weight_ms", type=TIMES, default="1", show_default=True, help="Weight gradient.")
@click.option("--comm", "comm_ms", type=float, default=0.0, show_default=True, help="Between different ranks, ms.")
@click.option(
    "--mw",
    "weight_share",
    type=float,
    default=WEIGHT_SHARE,
    show_default=True,
    help="Part of M_B that the weight gradient releases.",
)
@click.option("--memory-limit", type=float, help="Most activations of a rank, in M_B.")
@click.option("--chimera-mode", type=click.Choice(["direct", "doubling", "halving"]), default="direct", show_default=True)
@click.option("--grid", "show_grid", is_flag=True, help="Draw the order in time instead of listing it.")
@reported
def pipeline(
    forward_ms: tuple[float, ...], gradient_ms: tuple[float, ...], weight_ms: tuple[float, ...], comm_ms: float, *, show_grid: bool, **request: Any
) -> dict[str, Any]:  # fmt: skip
    """Plays a pipeline order alone: makespan, bubble and activations from times per rank."""
    played = play_request(OrderRequest(times=times_in_ms(forward_ms, gradient_ms, weight_ms, comm_ms), **request))
    return pipeline_report(played) | {"_table": pipeline_grid(played) if show_grid else pipeline_table(played)}


@main.command()
@click.option("--table", type=click.Path(path_type=Path), help="CSV of published training runs.")
@click.option("--kernels", type=click.Path(path_type=Path), help="CSV of kernel, copy or collective timings.")
@click.option(
    "--hardware-dir", type=click.Path(path_type=Path), help="Folder of device folders that are taken before the catalogue's."
)
@reported
def validate(**files: Path | None) -> dict[str, Any]:
    """Compares a file of published runs or timings, row by row, with what is predicted."""
    return with_progress(lambda report: validate_files(**files, report=report))


main.add_command(what_if)
main.add_command(export)
main.add_command(search)

if __name__ == "__main__":
    main()
