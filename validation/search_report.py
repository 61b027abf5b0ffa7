"""What ``schedlab search`` prints over several devices: the best plan, how far it is proven, where its time goes, why it wins, and what to do next."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

from rich.console import Group, RenderableType
from rich.table import Table

from hardware_models.units import format_bytes
from search.joint.batch_study import Progress
from search.joint.explain import Contribution
from search.joint.joint_search import Baseline, JointResult
from simulator.parallel.simulate_traced import StagesOnCluster
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from validation.reports import table_of

QUIET_S = 5.0
"""Most seconds of a search without a line of progress."""
LEAST_SHARE = 0.005
"""Parts of the step below this are not listed."""
PLAN_FILE = "plan.toml"


def joint_report(result: JointResult, model: str, out: Path | None) -> RenderableType:
    """The whole answer.

    Args:
        result: of the search.
        model: as the user named it.
        out: folder that the plan was written to; None: nowhere.
    """
    best = result.simulation
    parts: list[RenderableType] = [_headline(result, model), _plans_table(result)]
    if result.expert is not None and not result.differences:
        parts.append(f"The best plan is that of {result.expert.name}.")
    elif result.expert is not None and out is None:  # with a folder, the whole way there is printed
        parts.append(_decisions_table(result, result.expert))
    parts += [f"The step: {_shares(best)}.", _proof_line(result), _next_line(result, model, out)]
    return Group(*parts)


def _headline(result: JointResult, model: str) -> str:
    best = result.simulation
    device, plan = best.device, result.plan
    room = plan.memory.budget_bytes or device.memory_bytes
    kind = "budget" if plan.memory.budget_bytes else "device"
    values, tokens = best.to_json(), plan.batch.seq_len is not None
    return (
        f"{model} on {best.cluster.num_gpus} {device.name} of {best.cluster.name}, {plan.batch.global_batch} samples{f' of {plan.batch.seq_len} tokens' if tokens else ''} a step: "
        f"{best.step_time_s:.4g} s a step, {values['tokens_per_s_per_gpu']:,.0f} {'tokens' if tokens else 'samples'}/s on each GPU, MFU {values['mfu']:.1%}; "
        f"{format_bytes(max(best.peak_memory_bytes))} of the {kind}'s {format_bytes(room)} allocated at the peak"
    )


def _plans_table(result: JointResult) -> Table:
    best_s = result.simulation.step_time_s
    own = ("best", *_plan_row(result.plan), f"{best_s:.4g}", "", format_bytes(max(result.simulation.peak_memory_bytes)), "yes")
    rows = [
        own,
        *(_baseline_row(one, best_s) for one in sorted(result.baselines, key=lambda one: (not one.fits, one.step_time_s))),
    ]
    columns = (
        "plan",
        "tp cp pp dp ep",
        "pipeline",
        "micro-batch",
        "ZeRO",
        "saves memory by",
        "step (s)",
        "slower by",
        "peak",
        "fits",
    )
    return table_of("The best plan, and what experts would set", columns, rows)


def _baseline_row(one: Baseline, best_s: float) -> tuple[str, ...]:
    slower = f"{one.step_time_s / best_s - 1.0:+.1%}"
    return (
        one.name,
        *_plan_row(one.plan),
        f"{one.step_time_s:.4g}",
        slower,
        format_bytes(one.peak_memory_bytes),
        "yes" if one.fits else "no",
    )


def _plan_row(plan: Plan) -> tuple[str, ...]:
    split, memory = plan.parallel, plan.memory
    degrees = " ".join(str(getattr(split, axis)) for axis in ("tp", "cp", "pp", "dp", "ep"))
    order = "" if split.pp == 1 else plan.pipeline.schedule + (f" x{split.virtual_stages}" if split.virtual_stages > 1 else "")
    away = {
        "activations": memory.activation_offload,
        "weights": memory.weight_offload,
        "gradients": memory.grad_offload,
        "optimizer": memory.optimizer_offload,
    }
    saves = [] if memory.recompute == "none" else [f"recompute {memory.recompute}"]
    saves += [
        f"{name} to {memory.offload_target}" + (f" {amount:.0%}" if amount != 1.0 else "")
        for name, amount in away.items()
        if isinstance(amount, float) and amount
    ]
    return degrees, order, str(plan.batch.micro_batch), str(memory.zero_stage), ", ".join(saves)


def _decisions_table(result: JointResult, expert: Baseline) -> Table:
    """What each decision brings against the best expert's plan, the largest part first."""
    best_s = result.simulation.step_time_s
    rows = [_decision_row(one, best_s) for one in sorted(result.differences, key=lambda one: -(one.brings(best_s) or 0.0))]
    title = f"Why it is faster than {expert.name} ({expert.step_time_s:.4g} s): the best plan with one decision taken back at a time"
    return table_of(title, ("decision", "here", "there", "step with theirs (s)", "it brings"), rows)


def _decision_row(one: Contribution, best_s: float) -> tuple[str, ...]:
    brings = one.brings(best_s)
    if one.step_time_s is None or brings is None:
        return one.decision, one.ours, one.theirs, one.reason, "possible only so"
    return one.decision, one.ours, one.theirs, f"{one.step_time_s:.4g}", f"{brings:+.1%}"


def _shares(best: ParallelSimulation | StagesOnCluster) -> str:
    """Parts of the critical rank's step, largest first."""
    parts = sorted(best.breakdown_s.items(), key=lambda part: -part[1])
    shown = [
        f"{name.replace('_', ' ')} {seconds / best.step_time_s:.1%}"
        for name, seconds in parts
        if seconds >= LEAST_SHARE * best.step_time_s
    ]
    return ", ".join(shown)


def _proof_line(result: JointResult) -> str:
    looked = f"{result.space_size:,} points (degrees, order, micro-batch, ZeRO stage, placement), {result.study.progress.num_simulated:,} plans simulated in {result.elapsed_s:.0f} s"
    if result.certified:
        return f"Certified: no plan of the space is faster within the model. {looked}."
    return (
        f"Not certified: no plan of the space takes less than {result.lower_bound_s:.4g} s, so at most {result.gap:.1%} of the step could still be saved. {looked}; "
        "a longer --time-limit goes on (with --storage from here)."
    )


def _next_line(result: JointResult, model: str, out: Path | None) -> str:
    if out is None:
        return "Next: the same with --out DIR writes the plan, a trace and figures, for schedlab what-if, export and replay."
    plan, cluster = out / PLAN_FILE, result.simulation.cluster.name
    return (
        f"Next: schedlab what-if --model {model} --hardware {cluster} --plan {plan}    what its time hangs on\n"
        f"      schedlab export --model {model} --plan {plan} --to megatron|torchtitan|deepspeed|pytorch"
    )


def progress_lines(tell: Callable[[str], None]) -> Callable[[Progress], None]:
    """What a search calls as it goes on: tells a line at each better plan, and every few seconds."""
    told: list[Progress] = []

    def line(progress: Progress) -> None:
        last = told[-1] if told else None
        if last is None or progress.incumbent < last.incumbent or progress.elapsed_s - last.elapsed_s >= QUIET_S:
            told.append(progress)
            tell(progress_text(progress))

    return line


def progress_text(progress: Progress) -> str:
    """One line: the best plan, the bound, the gap between them."""
    found = progress.incumbent < float("inf")
    best = f"best {progress.incumbent:.4g} s" if found else "no plan that fits yet"
    bound = f"proven bound {progress.lower_bound:.4g} s"
    gap = f"gap {progress.gap:.1%}, " if found else ""
    return f"{progress.elapsed_s:6.1f} s: {best}, {bound}, {gap}{progress.num_simulated:,} plans simulated"
