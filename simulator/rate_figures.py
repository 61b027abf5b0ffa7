"""How the engines' cost grows with the length of a program, measured here: ``python -m simulator.rate_figures --out DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from math import inf
from pathlib import Path
from time import process_time

from matplotlib.figure import Figure

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster_file import load_cluster
from simulator import engine_compiled, engine_simpy
from simulator.figures import save_figure
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_parallel import simulate_parallel
from simulator.plan import Batch, Memory, Parallel, Plan, Precision, Runtime
from simulator.presets import preset
from simulator.program import Program, no_slowdown, no_transfers

NUM_MICROBATCHES = (32, 64, 128, 256, 512, 1024)
LONGEST_FOR_SIMPY = 128
_ROUNDS = 40
_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7")
"""Of Okabe and Ito, which readers with any colour vision tell apart."""
_WIDTH_IN, _HEIGHT_IN = 6.4, 4.8


@dataclass(frozen=True, slots=True, kw_only=True)
class RatePoint:
    """What running one program cost."""

    num_instructions: int
    duration_s: float
    """CPU time of this process, the least of some runs."""


def rate_points(num_microbatches: Sequence[int], *, rounds: int = _ROUNDS) -> dict[str, tuple[RatePoint, ...]]:
    """Measured points of each engine, by its name, in the order of ``num_microbatches``.

    Programs are steps of GPT-3 175B under 1F1B over 16 ranks; simpy runs those of up to `LONGEST_FOR_SIMPY` micro-batches, in the first round only. A round runs
    every program on every engine, so that what else the machine does meets all alike.
    """
    shared = [_program(number) for number in num_microbatches]
    free = [replace(one, transfers=no_transfers(), slowdown=no_slowdown()) for one in shared]
    short = [one for one, number in zip(shared, num_microbatches, strict=True) if number <= LONGEST_FOR_SIMPY]
    engines: dict[str, tuple[Callable[[Program], object], list[Program], int]] = {
        "simpy, shared links and slow-down": (engine_simpy.record, short, 1),
        "compiled, shared links and slow-down": (engine_compiled.record, shared, rounds),
        "compiled, nothing shared": (engine_compiled.record, free, rounds),
        "compiled, without a clock": (engine_compiled.times, free, rounds),
    }
    least_s = {name: [inf] * len(programs) for name, (_, programs, _) in engines.items()}
    for number in range(rounds):
        for name, (run, programs, own_rounds) in engines.items():
            if number < own_rounds:
                least_s[name] = [
                    min(before_s, _seconds(run, one)) for before_s, one in zip(least_s[name], programs, strict=True)
                ]
    return {
        name: tuple(
            RatePoint(num_instructions=one.num_instructions, duration_s=duration_s)
            for one, duration_s in zip(programs, least_s[name], strict=True)
        )
        for name, (_, programs, _) in engines.items()
    }


def rate_figure(points: Mapping[str, Sequence[RatePoint]]) -> Figure:
    """CPU time over instructions, both logarithmic; lines go through the origin and each engine's longest program, so points on them are linear growth."""
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
    axes = figure.add_subplot()
    for colour, (name, of_engine) in zip(_COLOURS, points.items(), strict=True):
        longest = of_engine[-1]
        rate_per_s = longest.num_instructions / longest.duration_s
        sizes = [point.num_instructions for point in of_engine]
        axes.plot(sizes, [size / rate_per_s for size in sizes], color=colour, linewidth=1)
        axes.plot(
            sizes, [point.duration_s for point in of_engine], "o", color=colour, label=f"{name}: {rate_per_s:.1e} a second"
        )
    axes.set(
        xscale="log",
        yscale="log",
        xlabel="instructions",
        ylabel="CPU time (s)",
        title="GPT-3 175B, tp 8, pp 16, 1F1B: 32 to 1,024 micro-batches",
    )
    figure.legend(loc="outside lower center", fontsize="small")
    return figure


def main(arguments: Sequence[str]) -> None:
    """Measures, draws, and prints the points."""
    parser = argparse.ArgumentParser(
        prog="python -m simulator.rate_figures", description="Draw what running programs costs on this machine."
    )
    parser.add_argument("--out", type=Path, required=True, help="folder that gets engine_rates.png")
    options = parser.parse_args(arguments)
    points = rate_points(NUM_MICROBATCHES)
    options.out.mkdir(parents=True, exist_ok=True)
    save_figure(rate_figure(points), options.out / "engine_rates.png")
    for name, of_engine in points.items():
        for point in of_engine:
            rate_per_s = point.num_instructions / point.duration_s
            print(f"{name}: {point.num_instructions} instructions in {point.duration_s:.2e} s, {rate_per_s:.2e} a second")  # noqa: T201 - its output


def _program(num_microbatches: int) -> Program:
    plan = Plan(
        parallel=Parallel(tp=8, pp=16, sequence_parallel=True), batch=Batch(global_batch=num_microbatches, micro_batch=1, seq_len=2048),
        memory=Memory(recompute="selective"), precision=Precision(compute="bf16"), runtime=Runtime(framework="megatron-core", flash_attention=False),
    )  # fmt: skip
    cluster = load_cluster("selene").with_gpus(plan.num_gpus)
    return simulate_parallel(
        preset("gpt3-175b"), plan, cluster, load_hardware(cluster.device), order_of(plan), seq_len=2048
    ).program


def _seconds(run: Callable[[Program], object], program: Program) -> float:
    begin_s = process_time()
    run(program)
    return process_time() - begin_s


if __name__ == "__main__":
    main(sys.argv[1:])
