"""schedlab: the best joint schedule of a network on the hardware at hand, predicted and proved. Command line and public names."""

from __future__ import annotations

import json
import time
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from hardware_models.calibration import calibrate as run_calibration
from hardware_models.catalogue import list_hardware, load_hardware, this_profile_path
from hardware_models.files import whole_file
from hardware_models.network.cluster_file import find_cluster, list_clusters, load_cluster
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes, parse_bytes
from search.plan_search import ALLOWABLE, OBJECTIVES, SearchRequest, SearchResult
from search.plan_search import search as run_search
from search.recompute import sequence_of
from search.stage_recompute import simulate_on_cluster
from simulator.chrome_trace import write_chrome_trace
from simulator.figures import memory_figure, save_figure, timeline_figure
from simulator.model_source import ModelSource, model_source
from simulator.models import MODELS
from simulator.parallel.simulate_traced import TracedSimulation
from simulator.parallel.simulation import ParallelSimulation
from simulator.pipeline.catalogue import OrderRequest
from simulator.pipeline.play_order import WEIGHT_SHARE
from simulator.pipeline.report import pipeline_grid, pipeline_report, play_request, times_in_ms
from simulator.plan import Plan, check_gpus
from simulator.plan_file import read_plan, write_plan
from simulator.presets import PRESETS
from simulator.sequence import format_sequence
from simulator.simulate import ENGINES, Simulation, step_setting
from simulator.simulate import simulate as run_simulation
from simulator.timeline import MemoryProfile, Timeline
from validation.command_line import (
    EXIT_INFEASIBLE,
    EXIT_INPUT,
    THIS,
    TIMES,
    hardware_option,
    model_options,
    reported,
    stderr,
    with_progress,
)
from validation.reports import (
    parallel_table,
    pipeline_table,
    replay_table,
    search_table,
    simulation_table,
    table_of,
    workload_summary,
    workload_table,
)
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


def device_profile(name: str, *, device: str = "cpu") -> DeviceProfile:
    """The profile of a name; this machine is calibrated quickly first if it never was, and that is said."""
    if name == THIS and not this_profile_path(device).exists():
        stderr.print(f"no profile of this machine's {device} yet: calibrating quickly (schedlab calibrate does it thoroughly)")
        with_progress(lambda report: run_calibration(this_profile_path(device), quick=True, device=device, progress=report))
    return load_hardware(name, device=device)


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
    plan = read_plan(plan_path) if plan_path else Plan()
    folder = plan_path.parent if plan_path else None
    cluster = find_cluster(hardware_name)
    if cluster is not None:
        device = load_hardware(cluster.device)
        source = model_source(model_name, device=device, seq_len=seq_len).with_plan_batch(plan)
        parallel = simulate_on_cluster(source, plan, cluster, gpus=gpus, folder=folder, engine=engine)
        write_figures(
            parallel, trace_path=trace_path, plot_path=plot_path, name=model_name, budget_bytes=plan.memory.budget_bytes
        )
        return parallel.to_json() | {"_table": parallel_table(parallel, model_name)}
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


def write_figures(
    simulation: Simulation | ParallelSimulation, *, trace_path: Path | None, plot_path: Path | None, name: str, budget_bytes: int | None
) -> None:  # fmt: skip
    """The trace and the plots that were asked for."""
    if trace_path:
        write_chrome_trace(trace_path, {"predicted": (simulation.timeline, simulation.profiles)})
    if plot_path:
        save_figure(timeline_figure({"predicted": simulation.timeline}, title=name), plot_path)
        memory_path = plot_path.with_stem(plot_path.stem + "-memory")
        save_figure(memory_figure({"predicted": simulation.profiles[0]}, budget_bytes=budget_bytes, title=name), memory_path)


@main.command()
@model_options
@hardware_option
@click.option("--gpus", type=click.IntRange(min=1, max=1), default=1, show_default=True, help="Devices (one, for now).")
@click.option("--global-batch", type=click.IntRange(min=1), help="Samples per step (default: the model's).")
@click.option("--memory-budget", help="Most bytes allocated on the device, such as 40GiB (default: what it has).")
@click.option("--objective", type=click.Choice(OBJECTIVES), default="time", show_default=True)
@click.option("--allow", default="", help=f"Comma-separated: {', '.join(ALLOWABLE)}.")
@click.option("--time-limit", type=click.FloatRange(min=0, min_open=True), help="Seconds; the remaining gap is printed.")
@click.option("--storage", help="Optuna storage URL; an interrupted search of the same request goes on there.")
@click.option(
    "--out", type=click.Path(path_type=Path), help="Folder for plan.toml, plan.seq, search.json, trace.json and figures."
)
@reported
def search(
    model_name: str, seq_len: int | None, hardware_name: str, gpus: int, global_batch: int | None, memory_budget: str | None,
    objective: str, allow: str, time_limit: float | None, storage: str | None, out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Finds the best plan for a model on a device, and how far it is from a proven bound."""
    del gpus  # one, so far
    device = device_profile(hardware_name)
    source = model_source(model_name, device=device, batch=global_batch, seq_len=seq_len)
    budget = (
        parse_bytes(memory_budget, source="--memory-budget", key="")
        if memory_budget
        else device.memory_bytes - device.context_bytes
    )
    request = SearchRequest(
        model=source, device=device, global_batch=source.global_batch, budget_bytes=budget, objective=objective,  # type: ignore[arg-type]
        allow=tuple(part for part in allow.split(",") if part),
    )  # fmt: skip
    result = run_search(request, storage=storage, time_limit_s=time_limit, on_trial=_tell_trial)
    if out:
        write_search(result, out)
    return result.to_json() | {"_table": search_table(result)}


def _tell_trial(_study: Any, trial: Any) -> None:
    found = trial.user_attrs
    if "step_time_s" in found:
        stderr.print(
            f"{trial.params['point']}: {found['step_time_s']:.4f} s, {format_bytes(found['peak_memory_bytes'])}, {found['recompute']}",
            highlight=False,
        )
    else:
        stderr.print(f"{trial.params['point']}: does not fit; {found['infeasible']['smallest_change']}", highlight=False)


def write_search(result: SearchResult, out: Path) -> None:
    """The plan with its sequence, the answer and the figures."""
    sequence = out / "plan.seq"
    with whole_file(sequence) as temporary:
        temporary.write_text(format_sequence(result.operations), encoding="utf-8")
    plan = replace(result.plan, memory=replace(result.plan.memory, recompute=f"file:{sequence.name}"))
    write_plan(plan, out / "plan.toml")
    with whole_file(out / "search.json") as temporary:
        temporary.write_text(json.dumps(result.to_json(), indent=1), encoding="utf-8")
    write_figures(
        result.simulation,
        trace_path=out / "trace.json",
        plot_path=out / "timeline.png",
        name=result.request.model.name,
        budget_bytes=result.simulation.setting.budget_bytes,
    )


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

    profile = device_profile(hardware_name, device=device)
    plan = read_plan(plan_path) if plan_path else Plan()
    source = model_source(model_name, batch=batch, seq_len=seq_len).with_plan_batch(plan)
    folder, tell = plan_path.parent if plan_path else None, partial(stderr.print, highlight=False)
    if plan.num_gpus > 1:
        from validation.distributed.replay import replay_processes  # noqa: PLC0415

        several = replay_processes(source, plan, profile, steps=steps, on=device, folder=folder, bundle=bundle, progress=tell)
        write_replay_trace(trace_path, several.predicted, several.timeline, ())
        return several.to_json() | {"_table": several.table()}
    case = replay_case(plan, source, profile, folder=folder)
    if bundle:
        return bundle_replay(case, source, profile, bundle)
    outcome = run_replay(source, (case,), profile, repeats=steps, on=device, progress=tell)
    (result,) = outcome.results
    write_replay_trace(trace_path, result.predicted, result.timeline, (result.memory.profile,) if result.memory.profile else ())
    return result.to_json() | {"plain": outcome.plain_json(), "_table": replay_table([(model_name, outcome)])}


def write_replay_trace(
    path: Path | None, predicted: Simulation | TracedSimulation, timeline: Timeline, profiles: tuple[MemoryProfile, ...]
) -> None:  # fmt: skip
    """Predicted beside measured, if a trace was asked for."""
    if path:
        write_chrome_trace(path, {"predicted": (predicted.timeline, predicted.profiles), "measured": (timeline, profiles)})


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

if __name__ == "__main__":
    main()
