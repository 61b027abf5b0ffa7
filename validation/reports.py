"""Reports: what the command line shows of a result, as tables."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from rich.table import Table

from hardware_models.units import GIB, MS_PER_S, format_bytes
from search.found_plan import shares_summary
from search.plan_search import SearchResult
from simulator.parallel.simulate_traced import TracedSimulation
from simulator.parallel.simulation import ParallelSimulation
from simulator.pipeline.order_text import order_texts
from simulator.pipeline.play_order import PlayedOrder
from simulator.simulate import Simulation
from simulator.workload import Block, Workload
from validation.kernel_check import KernelCheck

if TYPE_CHECKING:  # replay needs torch; a table of its result does not
    from validation.replay_comparison import Replay

GIGA = 1e9


def table_of(title: str, columns: Sequence[str], rows: Sequence[tuple[str, ...]]) -> Table:
    """A table with its first column to the left and numbers to the right."""
    table = Table(title=title, title_justify="left")
    for number, column in enumerate(columns):
        table.add_column(column, justify="right" if number else "left", overflow="fold")
    for row in rows:
        table.add_row(*row)
    return table


def workload_summary(workload: Workload) -> dict[str, Any]:
    """What ``schedlab trace --json`` prints: per block FLOPs, parameters and every saved tensor under each option."""
    first = _first_places(workload)
    return {
        "model": workload.model, "micro_batch": workload.micro_batch, "tokens": workload.tokens,
        "parameters": workload.parameter_elements, "model_flops": workload.model_flops, "forward_flops": workload.forward_flops,
        "mixes_samples": workload.mixes_samples, "notes": list(workload.notes),
        "blocks": [
            {
                "name": f"block{index}", "same_as": f"block{first[id(block)]}", "forward_flops": block.discard.flops,
                "parameters": block.parameter_elements, "input_bytes": block.input_bytes, "output_bytes": block.output_bytes,
                "options": [
                    {
                        "name": option.name, "saved_bytes": sum(tensor.size_bytes for tensor in option.saved),
                        "backward_flops": option.backward.flops,
                        "num_kernels": len(option.forward.kernels) + len(option.backward.kernels),
                        "saved": [{"op": t.op, "shape": list(t.shape), "dtype": t.dtype, "bytes": t.size_bytes} for t in option.saved],
                    }
                    for option in block.options
                ],
            }
            for index, block in enumerate(workload.blocks)
        ],
    }  # fmt: skip


def _first_places(workload: Workload) -> dict[int, int]:
    """Identity of each distinct block -> its first place in the chain."""
    places: dict[int, int] = {}
    for index, block in enumerate(workload.blocks):
        places.setdefault(id(block), index)
    return places


def workload_table(workload: Workload) -> Table:
    """Distinct blocks with what each recompute option keeps between forward and backward."""
    title = (
        f"{workload.model}: {len(workload.blocks)} blocks, {workload.parameter_elements:,} parameters, "
        f"{workload.model_flops / GIGA:.1f} GFLOP forward and backward of a micro-batch of {workload.micro_batch}"
    )
    columns = ("block", "times", "GFLOP forward", "kernels", "parameters", "saved: all", "selective", "input only")
    blocks: Sequence[Block] = workload.blocks
    rows = []
    for first in _first_places(workload).values():
        block = blocks[first]
        saved = [format_bytes(sum(tensor.size_bytes for tensor in option.saved)) for option in block.options]
        rows.append((
            str(first), str(sum(other is block for other in blocks)), f"{block.discard.flops / GIGA:.2f}", str(len(block.discard.kernels)),
            f"{block.parameter_elements:,}", saved[0], saved[1] if len(saved) > 1 else "", format_bytes(block.input_bytes),
        ))  # fmt: skip
    return table_of(title, columns, rows)


def simulation_table(simulation: Simulation) -> Table:
    """What ``schedlab simulate`` prints."""
    low, high = simulation.step_time_interval_s
    values = simulation.to_json()
    rows = [
        ("step time", f"{simulation.step_time_s * MS_PER_S:.2f} ms (80%: {low * MS_PER_S:.2f} to {high * MS_PER_S:.2f})"),
        ("tokens/s", f"{values['tokens_per_s_per_gpu']:.1f}"),
        ("mfu, hfu", f"{values['mfu']:.1%}, {values['hfu']:.1%}"),
        ("peak memory", format_bytes(simulation.peak_memory_bytes[0]) + ("" if simulation.fits else " (does not fit)")),
        *(
            (f"  {key.replace('_', ' ')}", format_bytes(size))
            for key, size in simulation.profiles[0].peak_breakdown_bytes.items()
            if size
        ),
        *((f"time: {key}", f"{seconds * MS_PER_S:.2f} ms") for key, seconds in simulation.time_breakdown_s.items() if seconds),
        ("rests on", ", ".join(simulation.price.evidence)),
    ]
    return table_of(f"{simulation.workload.model} on {simulation.device.name}", ("", "predicted"), rows)


def parallel_table(simulation: ParallelSimulation | TracedSimulation, model: str, cluster: str) -> Table:
    """What ``schedlab simulate`` prints of a step on a cluster."""
    values: dict[str, Any] = simulation.to_json()
    low, high = values["step_time_interval_s"]
    peaks = [format_bytes(size) for size in simulation.peak_memory_bytes]
    degrees = " ".join(f"{axis}={getattr(simulation.plan.parallel, axis)}" for axis in ("tp", "cp", "pp", "dp", "ep"))
    rows = [
        ("step time", f"{simulation.step_time_s * MS_PER_S:.1f} ms (80%: {low * MS_PER_S:.1f} to {high * MS_PER_S:.1f})"),
        ("tokens/s per GPU", f"{values['tokens_per_s_per_gpu']:.1f}"), ("mfu, hfu", f"{values['mfu']:.1%}, {values['hfu']:.1%}"),
        ("peak memory by pipeline rank", ", ".join(peaks) + ("" if values["fits"] else " (does not fit)")),
        *((f"  {key.replace('_', ' ')}", format_bytes(size)) for key, size in values["peak_memory_breakdown"].items() if size),
        *([("peak host memory of a node", format_bytes(values["peak_host_bytes"]))] if values["peak_host_bytes"] else []),
        *((f"time: {key}", f"{seconds * MS_PER_S:.1f} ms") for key, seconds in values["time_breakdown_s"].items() if seconds),
        ("rests on", ", ".join(simulation.price.evidence)),
    ]  # fmt: skip
    return table_of(f"{model}, {degrees} on {cluster}", ("", "predicted"), rows)


def search_table(result: SearchResult) -> Table:
    """What ``schedlab search`` prints: the best plan beside the experts'."""
    best, size, memory = result.simulation, result.plan.batch.micro_batch, result.plan.memory
    shares = best.setting.host
    row = {
        "micro_batch": size, "precision": result.plan.precision.compute, "recompute": memory.recompute, "step_time_s": best.step_time_s,
        "peak_memory_bytes": best.peak_memory_bytes[0], "fits": best.fits,
    }  # fmt: skip
    if shares is not None:
        row |= shares_summary(shares)
    rows = [_search_row("best", row)]
    rows += [_search_row(name, one) for name, one in sorted(result.baselines.items(), key=lambda item: item[1]["step_time_s"])]
    proof = "certified optimal within the model" if result.certified else f"gap to the bound {result.gap:.2%}"
    title = (
        f"{result.request.model.name} on {result.request.device.name}, budget {format_bytes(result.request.budget_bytes)}: {proof}; "
        f"{result.study.num_simulated} of {result.space_size} points simulated"
    )
    return table_of(title, ("plan", "micro-batch", "precision", "recompute", "on the host", "step s", "peak", "fits"), rows)


def _search_row(name: str, row: Mapping[str, Any]) -> tuple[str, ...]:
    away = {"activations": "activation_offload", "weights": "weight_offload", "optimizer": "optimizer_offload"}
    return (
        name, str(row["micro_batch"]), str(row["precision"]), str(row["recompute"]),
        ", ".join(f"{word} {row[key]:.0%}" for word, key in away.items() if row.get(key)), f"{row['step_time_s']:.4f}",
        format_bytes(row["peak_memory_bytes"]), "yes" if row["fits"] else "no",
    )  # fmt: skip


def replay_table(replays: Sequence[tuple[str, Replay]]) -> Table:
    """Predicted beside measured, beside the plain module."""
    columns = ("schedule", "step predicted", "measured", "error", "peak predicted", "measured", "error", "budget", "gradients")
    rows = []
    for name, replay in replays:
        plain = replay.plain_predicted
        rows.append((
            f"{name} plain", *_pair(plain.step_time_s, replay.plain_times.median_s, "s"),
            *_pair(plain.peak_memory_bytes[0] / GIB, replay.plain_memory.allocated_bytes / GIB, "GiB"), "", "",
        ))  # fmt: skip
        for result in replay.results:
            budget, measured = result.case.plan.memory.budget_bytes, result.memory.allocated_bytes
            verdict = "" if budget is None else f"{budget / GIB:.4f} GiB {'kept' if measured <= budget else 'exceeded'}"
            match = result.matches[0]
            rows.append((
                f"{name} {result.case.name}", *_pair(result.predicted.step_time_s, result.times.median_s, "s"),
                *_pair(result.predicted.peak_memory_bytes[0] / GIB, measured / GIB, "GiB"), verdict,
                "bitwise" if match.bitwise else f"rel {match.max_rel:.1e}",
            ))  # fmt: skip
    return table_of("predicted and measured, beside the plain module", columns, rows)


def _pair(predicted: float, measured: float, unit: str) -> tuple[str, str, str]:
    return f"{predicted:.4f} {unit}", f"{measured:.4f} {unit}", f"{predicted / measured - 1:+.2%}"


def kernel_check_table(check: KernelCheck) -> Table:
    """Errors of a file of timings by group; rows that cannot be priced are counted by reason."""
    rows = [
        (
            name,
            f"{group.num}",
            f"{group.median_ape:.1%}",
            f"{group.p90_ape:.1%}",
            f"{group.p99_ape:.1%}",
            f"{group.max_ape:.1%}",
            f"{group.bias:+.1%}",
        )
        for name, group in check.groups.items()
    ]
    reasons = Counter(reason for _line, reason in check.not_expressible)
    rows += [(f"not priced: {reason}", f"{num}", "", "", "", "", "") for reason, num in reasons.items()]
    return table_of(
        f"{check.path.name}: {check.num_rows} rows",
        ("operation/device/dtype/stack", "rows", "median", "p90", "p99", "worst", "bias"),
        rows,
    )


def pipeline_table(played: PlayedOrder) -> Table:
    """An order rank by rank, with its makespan and bubble in the title."""
    title = f"{played.order.name}: {played.makespan_s * MS_PER_S:.3f} ms, bubble {played.bubble_ratio:.4f}"
    texts = order_texts(played.order)
    rows = [
        (str(rank), f"{peak:g}", text) for rank, (peak, text) in enumerate(zip(played.peak_activations, texts, strict=True))
    ]
    return table_of(title, ("rank", "peak M_B", "order"), rows)
