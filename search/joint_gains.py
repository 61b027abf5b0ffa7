"""Joint gains: the best plan with one memory-saving technique, with two, and with all together, predicted.

``python -m search.joint_gains --out search/results/joint_gains.csv`` writes one row a setting and set of techniques; ``--setting NAME`` makes those of one setting anew.
"""

from __future__ import annotations

import csv
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import combinations
from pathlib import Path

import click
from rich.console import Console

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, UnknownNameError
from hardware_models.files import whole_file
from hardware_models.units import GB
from search.device.host_cells import TECHNIQUES, Technique
from search.found_plan import Found, rank, shares_summary
from search.plan_space import PlanSearch
from search.search_request import SearchRequest
from simulator.model_source import model_source
from simulator.plan import Batch, Plan, Precision
from simulator.plan_sections import ComputePrecision

COLUMNS = (
    "setting", "model", "hardware", "precision", "global_batch", "seq_len", "budget_bytes", "techniques", "fits", "step_time_s", "overhead",
    "peak_memory_bytes", "host_bytes", "micro_batch", "recompute", "activation_offload", "weight_offload", "optimizer_offload", "lower_bound_s",
)  # fmt: skip
TOGETHER = " + "


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model that does not fit a device as it is."""

    name: str
    model: str
    hardware: str
    batch: int
    memory_gb: float | None = None
    """Most bytes allocated, in 1e9; None: what the device has beside its context."""
    seq_len: int | None = None
    precision: ComputePrecision = "bf16"

    def space(self) -> PlanSearch:
        """The search over all techniques."""
        device = load_hardware(self.hardware)
        plan = Plan(batch=Batch(global_batch=self.batch, seq_len=self.seq_len), precision=Precision(compute=self.precision))
        source = model_source(self.model, batch=self.batch, seq_len=self.seq_len).with_plan_batch(plan)
        budget = device.memory_bytes - device.context_bytes if self.memory_gb is None else round(self.memory_gb * GB)
        request = SearchRequest(
            model=source, device=device, global_batch=self.batch, budget_bytes=budget, techniques=TECHNIQUES
        )
        return PlanSearch(request)


SETTINGS = (
    Setting(name="GPT-2 XL, 16 GB", model="gpt-xl", hardware="rtx-4090", batch=4, seq_len=1024, memory_gb=16.0),
    Setting(name="GPT-2 XL, V100 16 GB", model="gpt-xl", hardware="v100-sxm2-16gb", batch=4, seq_len=1024, precision="fp32"),
    Setting(name="GPT-2 XL, RTX 4090", model="gpt-xl", hardware="rtx-4090", batch=8, seq_len=1024),
    Setting(name="Llama 3 8B, RTX 4090", model="llama-8b", hardware="rtx-4090", batch=2, seq_len=2048),
    Setting(name="Llama 3 8B, H100 80 GB", model="llama-8b", hardware="h100-sxm", batch=4, seq_len=2048),
    Setting(name="FNO-3D 256^3, RTX 4090", model="fno3d-256", hardware="rtx-4090", batch=1, precision="fp32"),
    Setting(name="FNO-3D 256^3, V100 16 GB", model="fno3d-256", hardware="v100-sxm2-16gb", batch=1, precision="fp32"),
    Setting(name="Llama 3.2 1B, L4", model="llama-1b", hardware="l4", batch=2, seq_len=2048),
)
"""Eight settings: language models and a neural operator on 16 to 80 GB."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Gain:
    """What a set of techniques comes to."""

    techniques: tuple[Technique, ...]
    found: Found | None
    """None: nothing fits."""
    lower_bound_s: float


def gains(space: PlanSearch) -> Iterator[Gain]:
    """The fastest plan with each set of techniques: one by one, two at a time, all.

    A plan of fewer techniques is one of more too, so that no set is worse than a part of it.
    """
    known: dict[tuple[Technique, ...], Gain] = {}
    for count in (1, 2, len(TECHNIQUES)):
        for techniques in combinations(TECHNIQUES, count):
            parts = [one.found for chosen, one in known.items() if set(chosen) <= set(techniques) and one.found is not None]
            known[techniques] = _gain(space.with_techniques(techniques), min(parts, key=rank, default=None))
            yield known[techniques]


def _gain(space: PlanSearch, incumbent: Found | None) -> Gain:
    budget = space.request.budget_bytes
    bound_s = min(space.bound_s(point, budget) for point in space.space())
    try:
        found: Found | None = space.refined(space.best_within(budget, incumbent=incumbent), budget)
    except InfeasibleError:
        found = None
    return Gain(techniques=space.request.used_techniques, found=found, lower_bound_s=bound_s)


def rows_of(setting: Setting) -> Iterator[dict[str, str]]:
    """Rows of a setting in the file's columns."""
    space = setting.space()
    unlimited_s = space.unlimited_s()
    for gain in gains(space):
        row = {
            "setting": setting.name, "model": setting.model, "hardware": setting.hardware, "precision": setting.precision,
            "global_batch": str(setting.batch), "seq_len": str(setting.seq_len or ""), "budget_bytes": str(space.request.budget_bytes),
            "techniques": TOGETHER.join(gain.techniques), "fits": "yes" if gain.found else "no",
        }  # fmt: skip
        yield row | ({} if gain.found is None else _plan_columns(gain, gain.found, unlimited_s))


def _plan_columns(gain: Gain, found: Found, unlimited_s: float) -> dict[str, str]:
    one = found.candidate
    shares = {} if one.shares is None else shares_summary(one.shares)
    return {
        "step_time_s": f"{one.step_time_s:.6g}", "overhead": f"{one.step_time_s / unlimited_s - 1:.4f}", "peak_memory_bytes": str(one.peak_bytes),
        "host_bytes": str(one.host_bytes), "micro_batch": str(found.micro_batch), "recompute": found.recompute,
        "lower_bound_s": f"{min(gain.lower_bound_s, one.step_time_s):.6g}", **{key: f"{value:.4g}" for key, value in shares.items()},
    }  # fmt: skip


def read_rows(path: Path) -> list[dict[str, str]]:
    """Rows of a file; none where there is no file."""
    if not path.is_file():
        return []
    with path.open(encoding="utf-8", newline="") as file:
        return list(csv.DictReader(file))


def write_rows(rows: Sequence[dict[str, str]], path: Path, *, columns: Sequence[str], settings: Sequence[str]) -> None:
    """Writes the file, in the order of the settings' names."""
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="", lineterminator="\n")
        writer.writeheader()
        writer.writerows(sorted(rows, key=lambda row: settings.index(row["setting"])))


@click.command(help=__doc__)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The CSV file; rows of other settings in it stay.")
@click.option("--setting", "names", multiple=True, help="Only this setting; may be repeated.")
def main(out: Path, names: tuple[str, ...]) -> None:
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
        for row in rows_of(setting):
            made.append(row)
            told = f"{row['step_time_s']} s, overhead {float(row['overhead']):.1%}" if row["fits"] == "yes" else "does not fit"
            stderr.print(f"{setting.name}: {row['techniques']}: {told}", highlight=False)
        kept = [row for row in read_rows(out) if row["setting"] != setting.name]
        write_rows([*kept, *made], out, columns=COLUMNS, settings=known)


if __name__ == "__main__":
    main()
