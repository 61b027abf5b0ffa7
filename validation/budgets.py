"""Budgets: the search's plans at memory budgets between the least and the plain schedule's, each replayed for real.

``python -m validation.budgets --model gpt2 --batch 4 --seq-len 256``
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import click
from rich.console import Console

from hardware_models.catalogue import load_hardware
from hardware_models.files import whole_file
from hardware_models.profile import DeviceProfile
from search.plan_search import PlanSearch, SearchRequest
from simulator.model_source import ModelSource, model_source
from validation.replay_comparison import Replay, ReplayCase, replay
from validation.reports import replay_table

FRACTIONS = (1.0, 0.75, 0.5, 0.25, 0.0)
"""Of the way from the least memory to the plain schedule's."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BudgetStudy:
    """Plans at several budgets, replayed."""

    model: str
    least_bytes: int
    plain_bytes: int
    budgets_bytes: tuple[int, ...]
    replay: Replay

    def rows(self) -> list[dict[str, Any]]:
        """One row a budget: predicted beside measured."""
        return [
            {
                "budget_bytes": budget, "plan": result.case.name, "predicted_s": result.predicted.step_time_s,
                "measured_s": result.times.median_s, "time_error": result.time_error,
                "predicted_bytes": result.predicted.peak_memory_bytes[0], "measured_bytes": result.memory.allocated_bytes,
                "memory_error": result.memory_error, "kept": result.memory.allocated_bytes <= budget,
                "bitwise": result.matches[0].bitwise, "max_rel_unsplit": max((m.max_rel for m in result.matches[1:]), default=0.0),
            }
            for budget, result in zip(self.budgets_bytes, self.replay.results, strict=True)
        ]  # fmt: skip


def budget_cases(
    source: ModelSource, device: DeviceProfile, fractions: Sequence[float] = FRACTIONS
) -> tuple[tuple[ReplayCase, ...], tuple[int, ...], PlanSearch]:
    """The best plan at each budget, the budgets in bytes, and the search that found them."""
    everything = device.memory_bytes
    space = PlanSearch(SearchRequest(model=source, device=device, global_batch=source.global_batch, budget_bytes=everything))
    least, plain = space.least().peak_bytes, space.plain().peak_bytes
    budgets = tuple(least + round(fraction * (plain - least)) for fraction in fractions)
    cases = []
    for fraction, budget in zip(fractions, budgets, strict=True):
        found = space.best_within(budget)
        plan = space.plan_of(found)
        plan = replace(plan, memory=replace(plan.memory, budget_bytes=budget))
        name = f"{fraction:.0%}: micro-batch {found.micro_batch}, {found.candidate.name}"
        cases.append(ReplayCase(name=name, plan=plan, operations=found.candidate.operations))
    return tuple(cases), budgets, space


def budget_study(
    source: ModelSource,
    device: DeviceProfile,
    *,
    fractions: Sequence[float] = FRACTIONS,
    repeats: int = 5,
    on: str = "cpu",
    progress: Callable[[str], None] = lambda _: None,
) -> BudgetStudy:
    """Searches at each budget and replays what was found, all schedules in turn with the plain step."""
    progress(f"searching {source.name} at {len(fractions)} budgets")
    cases, budgets, space = budget_cases(source, device, fractions)
    return BudgetStudy(
        model=source.name, least_bytes=space.least().peak_bytes, plain_bytes=space.plain().peak_bytes, budgets_bytes=budgets,
        replay=replay(source, cases, device, repeats=repeats, on=on, progress=progress),
    )  # fmt: skip


@click.command()
@click.option("--model", "name", required=True)
@click.option("--batch", type=click.IntRange(min=1))
@click.option("--seq-len", type=click.IntRange(min=1))
@click.option("--hardware", default="this", show_default=True)
@click.option("--device", type=click.Choice(["cpu", "cuda"]), default="cpu", show_default=True)
@click.option("--repeats", type=click.IntRange(min=1), default=5, show_default=True)
@click.option("--out", type=click.Path(path_type=Path), help="JSON file of the rows.")
def main(name: str, batch: int | None, seq_len: int | None, hardware: str, device: str, repeats: int, out: Path | None) -> None:
    """Prints predicted beside measured at each budget, and writes the rows."""
    profile = load_hardware(hardware, device=device)
    source = model_source(name, batch=batch, seq_len=seq_len)
    stderr = Console(stderr=True)
    study = budget_study(source, profile, repeats=repeats, on=device, progress=lambda text: stderr.print(text, highlight=False))
    Console(width=150).print(replay_table([(name, study.replay)]))
    if out is not None:
        answer = {
            "model": name,
            "least_bytes": study.least_bytes,
            "plain_bytes": study.plain_bytes,
            "plain": study.replay.plain_json(),
            "rows": study.rows(),
        }
        with whole_file(out) as temporary:
            temporary.write_text(json.dumps(answer, indent=1), encoding="utf-8")


if __name__ == "__main__":
    main()
