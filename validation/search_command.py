"""The search command: on one device micro-batch and recompute, over several the joint space."""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import click

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.files import whole_file, writable_folder
from hardware_models.network.cluster import Cluster
from hardware_models.network.cluster_file import cluster_of_device, find_cluster
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes, parse_bytes
from search.cluster_objectives import Request, Search, least_memory, time_against_memory
from search.gap import CERTIFIED_GAP, relative_gap
from search.joint.batch_study import Progress
from search.joint.joint_search import JointResult, joint_search
from search.joint.make_request import ALLOWABLE as ALLOWABLE_TOGETHER
from search.joint.make_request import joint_request
from search.joint.refusals import refusal_line
from search.joint.sampled_study import SAMPLERS, SampledRun
from search.joint.space import JointRequest
from search.plan_search import SearchResult
from search.plan_search import search as run_search
from search.prices import Prices, read_prices
from search.search_request import ALLOWABLE, OBJECTIVES, WITHIN, SearchRequest, usable_techniques
from search.traced.request import ALLOWABLE as ALLOWABLE_TRACED
from search.traced.request import TracedRequest, traced_request
from search.trainers import TRAINERS, trainer_of
from simulator.model_source import ModelSource, model_source
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from simulator.plan_file import write_plan
from simulator.sequence import Operation, format_sequence
from simulator.simulate import Simulation
from validation.command_line import device_profile, hardware_option, model_options, reported, stderr
from validation.figure_files import write_figures
from validation.reports import search_table
from validation.search_explanation import write_explanation
from validation.search_report import PLAN_FILE, joint_report, progress_lines

BEST_BOUND = "best-bound"
"""The search's own order."""
TIME_LIMIT_S = 60.0
"""Of a search unless another is given."""
PERCENT = 100.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Asked:
    """What the flags say."""

    model: str
    seq_len: int | None
    hardware: str
    gpus: int | None
    global_batch: int | None
    budget_bytes: int | None
    objective: str
    allow: tuple[str, ...]
    trainer: str
    time_limit_s: float
    storage: str | None
    workers: int
    sampled: SampledRun | None
    """A sampler to set beside the search."""
    out: Path | None
    within: float
    prices: Prices | None


@click.command()
@model_options
@hardware_option
@click.option("--gpus", type=click.IntRange(min=1), help="Devices (default: one, or all of a cluster).")
@click.option("--global-batch", type=click.IntRange(min=1), help="Samples per step (default on one device: the model's).")
@click.option("--memory-budget", help="Most bytes allocated on a device, such as 40GiB (default: what it has).")
@click.option(
    "--objective",
    type=click.Choice(OBJECTIVES),
    default="time",
    show_default=True,
    help="cost needs --prices; memory is the least within --within of the best time.",
)
@click.option(
    "--within",
    type=click.FloatRange(min=0),
    default=PERCENT * WITHIN,
    show_default=True,
    help="Percent more than the best time that the least memory may take (inf: as long as it takes).",
)
@click.option("--prices", "prices_path", type=click.Path(path_type=Path), help="TOML: currency, and [per_hour] by device.")
@click.option(
    "--allow",
    default="",
    help=f"Comma-separated: {', '.join(ALLOWABLE)}; over several devices {', '.join(ALLOWABLE_TOGETHER)}, of a traced model {', '.join(ALLOWABLE_TRACED)}.",
)
@click.option("--trainer", type=click.Choice(sorted(TRAINERS)), default="any", show_default=True, help="Whose limits hold.")
@click.option(
    "--time-limit",
    type=click.FloatRange(min=0, min_open=True),
    default=TIME_LIMIT_S,
    show_default=True,
    help="Seconds; the remaining gap is printed.",
)
@click.option(
    "--storage", help="Optuna storage URL, or journal:FILE; a search of the same request goes on there, together with others."
)
@click.option("--workers", type=click.IntRange(min=1), default=1, show_default=True, help="Processes that simulate.")
@click.option(
    "--sampler",
    type=click.Choice([BEST_BOUND, *SAMPLERS]),
    default=BEST_BOUND,
    show_default=True,
    help="To compare over several devices: samplers that know no bounds.",
)
@click.option("--simulations", type=click.IntRange(min=1), help="Most plans that such a sampler simulates.")
@click.option("--seed", type=click.IntRange(min=0), default=0, show_default=True, help="Of such a sampler.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder for plan.toml, search.json, trace.json and figures.")
@reported
def search(
    model_name: str, seq_len: int | None, hardware_name: str, gpus: int | None, global_batch: int | None, memory_budget: str | None,
    objective: str, within: float, prices_path: Path | None, allow: str, trainer: str, time_limit: float, storage: str | None, workers: int,
    sampler: str, simulations: int | None, seed: int, out: Path | None,
) -> dict[str, Any]:  # fmt: skip
    """Finds the best plan for a model on exactly the devices given, and how far it is from a proven bound."""
    budget = parse_bytes(memory_budget, source="--memory-budget", key="") if memory_budget is not None else None
    asked = Asked(
        model=model_name, seq_len=seq_len, hardware=hardware_name, gpus=gpus, global_batch=global_batch, budget_bytes=budget, objective=objective,
        allow=tuple(part.strip() for part in allow.split(",") if part.strip()), trainer=trainer, time_limit_s=time_limit, storage=storage, workers=workers, out=out,
        sampled=_sampled(sampler, simulations, seed, workers),
        within=within / PERCENT, prices=None if prices_path is None else read_prices(prices_path),
    )  # fmt: skip
    if math.isnan(time_limit):
        raise InputError(source="--time-limit", key="", value=time_limit, rule="seconds > 0 must hold", remedy="give a number")
    if out is not None:
        writable_folder(out)
    if objective == "cost" and asked.prices is None:
        raise InputError(source="--objective", key="", value=objective, rule="cost needs prices", remedy="give --prices FILE")
    cluster = find_cluster(hardware_name)
    if cluster is None and gpus is not None and gpus > 1:
        cluster = cluster_of_device(hardware_name, num_gpus=gpus)
    return search_alone(asked) if cluster is None else search_together(asked, cluster.with_gpus(gpus or cluster.num_gpus))


def _sampled(sampler: str, simulations: int | None, seed: int, workers: int) -> SampledRun | None:
    """The sampler that is asked for; None: best bound first."""
    if sampler == BEST_BOUND:
        if simulations is not None:
            rule = "the search ends by its proof or its time"
            raise InputError(
                source="--simulations", key="", value=simulations, rule=rule, remedy="give a --time-limit, or a --sampler"
            )
        return None
    if workers > 1:
        rule = f"{sampler} runs in one process"
        raise InputError(
            source="--workers", key="", value=workers, rule=rule, remedy="leave it out, or begin others with another --seed"
        )
    return SampledRun(sampler=sampler, seed=seed, max_simulations=simulations)


def search_alone(asked: Asked) -> dict[str, Any]:
    """The answer on one device."""
    several = {
        "--trainer": asked.trainer if asked.trainer != "any" else None, "--workers": asked.workers if asked.workers > 1 else None,
        "--sampler": asked.sampled.sampler if asked.sampled else None,
    }  # fmt: skip
    for flag, value in several.items():
        if value is not None:
            rule = "a search on one device has one worker, its own sampler, and keeps to no trainer"
            raise InputError(source=flag, key="", value=value, rule=rule, remedy="leave it out, or ask for more --gpus")
    device = device_profile(asked.hardware)
    source = model_source(asked.model, device=device, batch=asked.global_batch, seq_len=asked.seq_len)
    request = SearchRequest(
        model=source, device=device, global_batch=source.global_batch, budget_bytes=asked.budget_bytes or device.memory_bytes - device.context_bytes,
        objective=asked.objective, allow=asked.allow, within=asked.within,  # type: ignore[arg-type]
    )  # fmt: skip
    unusable = usable_techniques(device)[1]
    if unusable and device.kind != "cpu":
        stderr.print(f"nothing goes to the host: {unusable}", highlight=False)
    result = run_search(request, storage=asked.storage, time_limit_s=asked.time_limit_s, on_trial=_tell_trial)
    found = result.to_json()
    if asked.prices is not None:
        tokens = result.simulation.workload.tokens * result.plan.num_microbatches
        found["cost"] = asked.prices.cost(device.name, num_gpus=1, step_time_s=result.simulation.step_time_s, tokens=tokens)
    if asked.out:
        write_lone(result, found, asked.out)
    return found | {"_table": search_table(result)}


def search_together(asked: Asked, cluster: Cluster) -> dict[str, Any]:
    """The answer over several devices."""
    if asked.global_batch is None:
        rule = "over several devices samples per step must be given"
        raise InputError(
            source="--global-batch", key="", value=None, rule=rule, remedy=f"take a multiple of {cluster.num_gpus}"
        )
    device = load_hardware(cluster.device)
    source = model_source(asked.model, device=device, batch=asked.global_batch, seq_len=asked.seq_len)
    find = _found_traced if source.config is None else _found_generated
    result, more = find(asked, source, cluster, device)
    if result.study.refused:
        stderr.print(refusal_line(result.study.refused), highlight=False, soft_wrap=True)
    found = result.to_json() | {"cluster": cluster.name, "num_gpus": cluster.num_gpus} | more
    if asked.prices is not None:
        step_s = result.simulation.step_time_s
        rate: Any = result.simulation.to_json()["tokens_per_s_per_gpu"]
        tokens = rate * cluster.num_gpus * step_s
        found["cost"] = asked.prices.cost(device.name, num_gpus=cluster.num_gpus, step_time_s=step_s, tokens=tokens)
    if asked.out:
        _write(result.plan, found, asked.out, result.simulation, asked.model)
        write_explanation(result, cluster, source, device, asked.out)
    return found | {"_table": joint_report(result, asked.model, asked.out)}


def _found_generated(
    asked: Asked, source: ModelSource, cluster: Cluster, device: DeviceProfile
) -> tuple[JointResult, dict[str, Any]]:
    """The answer for a model that is generated from its configuration."""
    request = joint_request(
        source, cluster, device, trainer_of(asked.trainer), global_batch=source.global_batch, allow=asked.allow, budget_bytes=asked.budget_bytes
    )  # fmt: skip

    def run(one: JointRequest, limit_s: float) -> JointResult:
        return joint_search(
            one, source, device, storage=asked.storage, workers=asked.workers, time_limit_s=limit_s, sampled=asked.sampled, on_progress=_told()
        )  # fmt: skip

    return _by_objective(asked, request, run)


def _found_traced(
    asked: Asked, source: ModelSource, cluster: Cluster, device: DeviceProfile
) -> tuple[JointResult, dict[str, Any]]:
    """The answer for a model that is traced."""
    from search.traced.traced_search import plans_of, traced_search  # noqa: PLC0415 - torch only where a module is traced

    if asked.sampled is not None:
        rule = "samplers are compared on models that are generated"
        raise InputError(source="--sampler", key="", value=asked.sampled.sampler, rule=rule, remedy="leave it out")
    request = traced_request(
        source, cluster, device, trainer_of(asked.trainer), global_batch=source.global_batch, allow=asked.allow, budget_bytes=asked.budget_bytes
    )  # fmt: skip
    plans = plans_of(request)

    def run(one: TracedRequest, limit_s: float) -> JointResult:
        return traced_search(
            one, storage=asked.storage, workers=asked.workers, time_limit_s=limit_s, on_progress=_told(), plans=plans
        )

    return _by_objective(asked, request, run)


def _told() -> Callable[[Progress], None]:
    """What one search tells as it goes on."""
    return progress_lines(partial(stderr.print, highlight=False, soft_wrap=True))


def _by_objective(asked: Asked, request: Request, run: Search[Request]) -> tuple[JointResult, dict[str, Any]]:
    """The answer for an objective, and the keys of JSON that it changes."""
    if asked.objective == "memory":
        least = least_memory(request, run, within=asked.within, time_limit_s=asked.time_limit_s)
        gap = relative_gap(least.peak_bytes, least.lower_bound_bytes)
        keys = {
            "lower_bound_bytes": least.lower_bound_bytes,
            "gap": gap,
            "certified": gap <= CERTIFIED_GAP,
            "pareto": least.front_json(),
        }
        return least.best, {"objective": "memory"} | keys
    if asked.objective == "pareto":
        front = time_against_memory(request, run, time_limit_s=asked.time_limit_s)
        return front.best, {"objective": "pareto", "pareto": front.front_json()}
    return run(request, asked.time_limit_s), {"objective": asked.objective}


def _write(
    plan: Plan, found: dict[str, Any], out: Path, simulation: Simulation | ParallelSimulation | StagesOnCluster, name: str
) -> None:
    """The plan, the answer and the figures; of a traced model also the sequences that ``optimal`` stands for, which replay runs."""
    if isinstance(simulation, StagesOnCluster) and plan.memory.recompute == "optimal":
        plan = with_sequence(plan, simulation.sequence, out)
    write_plan(plan, out / PLAN_FILE)
    with whole_file(out / "search.json") as temporary:
        temporary.write_text(json.dumps(found, indent=1), encoding="utf-8")
    write_figures(
        simulation,
        trace_path=out / "trace.json",
        plot_path=out / "timeline.png",
        name=name,
        budget_bytes=plan.memory.budget_bytes,
    )


def with_sequence(plan: Plan, operations: Sequence[Operation], out: Path) -> Plan:
    """The plan that reads its sequence from a file of the folder, which is written."""
    sequence = out / "plan.seq"
    with whole_file(sequence) as temporary:
        temporary.write_text(format_sequence(operations), encoding="utf-8")
    return replace(plan, memory=replace(plan.memory, recompute=f"file:{sequence.name}"))


def _tell_trial(_study: Any, trial: Any) -> None:
    found = trial.user_attrs
    if "step_time_s" in found:
        stderr.print(
            f"{trial.params['point']}: {found['step_time_s']:.4f} s, {format_bytes(found['peak_memory_bytes'])}, {found['recompute']}",
            highlight=False, soft_wrap=True,
        )  # fmt: skip
    else:
        stderr.print(
            f"{trial.params['point']}: does not fit; {found['infeasible']['smallest_change']}", highlight=False, soft_wrap=True
        )


def write_lone(result: SearchResult, found: dict[str, Any], out: Path) -> None:
    """The plan with its sequence, the answer and the figures."""
    plan = with_sequence(result.plan, result.operations, out)
    _write(plan, found, out, result.simulation, result.request.model.name)
