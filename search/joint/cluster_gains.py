"""Joint gains over a cluster: the best plan with one technique beside splitting the model, with two, and with all together, predicted.

``python -m search.joint.cluster_gains --out search/results/cluster_gains.csv`` writes a row a setting and set of techniques, each after a search of ``--time-limit`` seconds; ``--setting NAME`` makes those
of one setting anew.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from itertools import combinations
from pathlib import Path
from typing import Literal, get_args

import click
from rich.console import Console

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, UnknownNameError
from hardware_models.network.cluster_file import load_cluster
from search.joint.joint_search import JointResult, joint_search
from search.joint.make_request import joint_request
from search.joint_gains import TOGETHER, read_rows, write_rows
from search.trainers import TRAINERS, Trainer
from simulator.model_source import model_source

Technique = Literal["recompute", "offload", "sharding", "orders"]
TECHNIQUES: tuple[Technique, ...] = get_args(Technique)
"""What is set beside degrees, cut, placement and micro-batch: recompute; activations, weights and optimizer states on the host; ZeRO's stages; pipeline orders other than 1F1B."""
TIME_LIMIT_S = 40.0
"""Of each search."""
COLUMNS = (
    "setting", "model", "hardware", "gpus", "global_batch", "seq_len", "techniques", "time_limit_s", "fits", "step_time_s", "lower_bound_s", "peak_memory_bytes", "tp", "cp", "pp",
    "dp", "ep", "virtual_stages", "schedule", "micro_batch", "zero_stage", "recompute", "activation_offload", "weight_offload", "optimizer_offload",
)  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model on all devices of a cluster."""

    name: str
    model: str
    cluster: str
    gpus: int
    batch: int
    seq_len: int


SETTINGS = (
    Setting(name="GPT-3 175B, 512 A100", model="gpt3-175b", cluster="selene", gpus=512, batch=512, seq_len=2048),
    Setting(name="GPT-3 175B, 64 A100", model="gpt3-175b", cluster="selene", gpus=64, batch=64, seq_len=2048),
    Setting(name="Llama 3 405B, 16,384 H100", model="llama3-405b", cluster="hgx-h100", gpus=16384, batch=2048, seq_len=8192),
)
"""Language models that no device holds, on many devices and on few."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ClusterGain:
    """What a set of techniques comes to."""

    techniques: tuple[Technique, ...]
    found: JointResult | None
    """The fastest plan that was found with these techniques or fewer; None: none that fits."""
    lower_bound_s: float | None
    """Proven for all plans with these techniques; None where nothing was found."""


def trainer_with(techniques: Sequence[Technique]) -> Trainer:
    """All that the simulator runs, limited to some techniques."""
    whole = TRAINERS["any"]
    stages = whole.zero_stages if "sharding" in techniques else (0,)
    return replace(
        whole, recomputes=whole.recomputes if "recompute" in techniques else ("none",), offloads=whole.offloads if "offload" in techniques else (),
        zero_stages=stages, zero_stages_pipelined=stages, schedules=whole.schedules if "orders" in techniques else ("1f1b",),
    )  # fmt: skip


def gains(setting: Setting, *, time_limit_s: float = TIME_LIMIT_S) -> Iterator[ClusterGain]:
    """The fastest plan with each set of techniques: one by one, two at a time, all.

    A plan of fewer techniques is one of more too, so that no set is worse than a part of it.
    """
    known: dict[tuple[Technique, ...], ClusterGain] = {}
    for count in (1, 2, len(TECHNIQUES)):
        for techniques in combinations(TECHNIQUES, count):
            own = _searched(setting, techniques, time_limit_s)
            parts = [one.found for chosen, one in known.items() if set(chosen) <= set(techniques)]
            found = min(
                (one for one in (own, *parts) if one is not None), key=lambda one: one.simulation.step_time_s, default=None
            )
            bound_s = None if found is None else min(found.simulation.step_time_s, own.lower_bound_s if own else 0.0)
            known[techniques] = ClusterGain(techniques=techniques, found=found, lower_bound_s=bound_s)
            yield known[techniques]


def _searched(setting: Setting, techniques: Sequence[Technique], time_limit_s: float) -> JointResult | None:
    """The answer of the joint search; None where nothing fits, or nothing that does is found in time."""
    cluster = load_cluster(setting.cluster).with_gpus(setting.gpus)
    device = load_hardware(cluster.device)
    source = model_source(setting.model, device=device, batch=setting.batch, seq_len=setting.seq_len)
    request = joint_request(source, cluster, device, trainer_with(techniques), global_batch=setting.batch)
    try:
        return joint_search(request, source, device, time_limit_s=time_limit_s)
    except InfeasibleError:
        return None


def rows_of(setting: Setting, *, time_limit_s: float) -> Iterator[dict[str, str]]:
    """Rows of a setting in the file's columns."""
    for gain in gains(setting, time_limit_s=time_limit_s):
        row = {
            "setting": setting.name, "model": setting.model, "hardware": setting.cluster, "gpus": str(setting.gpus), "global_batch": str(setting.batch),
            "seq_len": str(setting.seq_len), "techniques": TOGETHER.join(gain.techniques), "time_limit_s": f"{time_limit_s:g}",
            "fits": "yes" if gain.found else "no",
        }  # fmt: skip
        yield row | ({} if gain.found is None else _plan_columns(gain.found, gain.lower_bound_s or 0.0))


def _plan_columns(found: JointResult, lower_bound_s: float) -> dict[str, str]:
    plan = found.plan
    split, memory = plan.parallel, plan.memory
    degrees = {name: str(getattr(split, name)) for name in ("tp", "cp", "pp", "dp", "ep", "virtual_stages")}
    offloads = {name: f"{getattr(memory, name):.4g}" for name in ("activation_offload", "weight_offload", "optimizer_offload")}
    return {
        "step_time_s": f"{found.simulation.step_time_s:.6g}", "lower_bound_s": f"{lower_bound_s:.6g}", "peak_memory_bytes": str(max(found.simulation.peak_memory_bytes)),
        **degrees, "schedule": plan.pipeline.schedule, "micro_batch": str(plan.batch.micro_batch), "zero_stage": str(memory.zero_stage), "recompute": memory.recompute, **offloads,
    }  # fmt: skip


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The CSV file; rows of other settings in it stay.")
@click.option("--setting", "names", multiple=True, help="Only this setting; may be repeated.")
@click.option("--time-limit", type=click.FloatRange(min=0.0, min_open=True), default=TIME_LIMIT_S, show_default=True, help="Seconds of each search.")  # fmt: skip
def main(out: Path, names: tuple[str, ...], time_limit: float) -> None:
    """Makes the rows and tells each one."""
    known = tuple(setting.name for setting in SETTINGS)
    for name in names:
        if name not in known:
            raise UnknownNameError(source="--setting", key="", value=name, known=known)
    stderr = Console(stderr=True)
    for setting in SETTINGS:
        if names and setting.name not in names:
            continue
        made: list[dict[str, str]] = []
        for row in rows_of(setting, time_limit_s=time_limit):
            made.append(row)
            told = f"{row['step_time_s']} s, not below {row['lower_bound_s']} s" if row["fits"] == "yes" else "nothing fits"
            stderr.print(f"{setting.name}: {row['techniques']}: {told}", highlight=False)
        kept = [row for row in read_rows(out) if row["setting"] != setting.name]
        write_rows([*kept, *made], out, columns=COLUMNS, settings=known)


if __name__ == "__main__":
    main()
