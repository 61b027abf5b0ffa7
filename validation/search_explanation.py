"""What a search over several devices leaves beside its plan: why it wins, what limits it now, and what its time hangs on."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from rich.table import Table

from hardware_models.files import whole_file
from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from hardware_models.units import format_bytes
from search.joint.explain import Change
from search.joint.explanation import FACTOR, Explanation, explained
from search.joint.joint_search import JointResult
from search.joint.published_plans import PUBLISHED
from simulator.model_source import ModelSource
from validation.command_line import stderr
from validation.reports import table_of


def write_explanation(result: JointResult, cluster: Cluster, source: ModelSource, device: DeviceProfile, out: Path) -> None:
    """Writes ``explanation.json`` and ``sensitivities.png``, and prints the ways from the fastest expert's and the papers' plans.

    Args:
        result: of the search.
        cluster: with exactly its devices.
        source: of the model.
        device: profile of the cluster's devices.
        out: folder.
    """
    from simulator.figures import save_figure, tornado_figure  # noqa: PLC0415 - matplotlib only where a figure is drawn

    papers = {paper.name for paper in PUBLISHED.get(source.config.name, ())} if source.config else set()
    theirs = {one.name: one.plan for one in result.baselines if one is result.expert or one.name in papers}
    found = explained(result.plan, theirs, cluster, source, device)
    with whole_file(out / "explanation.json") as temporary:
        temporary.write_text(json.dumps(found.to_json(), indent=1), encoding="utf-8")
    bars = [(better.key, 1.0 / better.speedup - 1.0, 1.0 / worse.speedup - 1.0) for better, worse in found.effects]
    save_figure(tornado_figure(bars, title=f"{source.name}: values x{FACTOR:g} and /{FACTOR:g}"), out / "sensitivities.png")
    for name, way in found.ways.items():
        stderr.print(way_table(name, way))
    stderr.print(limits_text(found.limits()), highlight=False)
    stderr.print(effects_table(found))


def way_table(name: str, way: tuple[Change, ...]) -> Table:
    """Each change on the way from an expert's plan to the best one."""
    title = f"from {name} to the best plan" + ("" if way else ": they are one")
    rows = [(", ".join(one.decisions), one.theirs, one.ours, f"{one.after_s:.4f}", f"{one.brings:+.1%}") for one in way]
    begin = [("", "", "", f"{way[0].before_s:.4f}", "")] if way else []
    return table_of(title, ("decision", "theirs", "ours", "step s", "brings"), [*begin, *rows])


def limits_text(limits: dict[str, Any]) -> str:
    """What limits the plan now, in a line."""
    whole = sum(limits["time_breakdown_s"].values())
    parts = ", ".join(f"{name} {seconds / whole:.1%}" for name, seconds in limits["time_breakdown_s"].items() if seconds > 0.0)
    held = f"rank {limits['fullest_rank']} holds {format_bytes(limits['peak_memory_bytes'])}, {limits['memory_share']:.0%} of what it may"
    return f"limited by {limits['bottleneck']}: {parts}; {held}"


def effects_table(found: Explanation) -> Table:
    """What better and worse hardware would do."""
    rows = [
        (
            better.key,
            f"{better.step_time_s:.4f} ({better.value})",
            f"{worse.step_time_s:.4f} ({worse.value})",
            better.bottleneck,
        )
        for better, worse in found.effects
    ]
    return table_of("what its time hangs on", ("value", "step s, better", "step s, worse", "then limited by"), rows)
