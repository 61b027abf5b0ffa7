"""Predictions against a table of published training runs: every row, errors, intervals, order, and what cannot be expressed."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from hardware_models.errors import InfeasibleError, InputError
from simulator.model_source import ModelSource
from simulator.parallel.simulate_source import simulate_source
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from validation.discrepancy import Discrepancy, Residual, half_width, kind_of, probability_above, read_discrepancy
from validation.error_summary import (
    ErrorSummary,
    balanced_accuracy,
    mean_rank_correlation,
    mean_regret,
    rank_correlation,
    summary_of,
)
from validation.express import Expressed, express
from validation.published_row import Measured, MemoryBasis, PublishedRow, measured_of, read_published
from validation.software_of_run import device_of_run

LEAST_RECOMPUTE = ("none", "selective", "full")
"""What is tried, in this order, where a row does not say what is recomputed."""
_LIKELY = 0.5
_FAR_BELOW = 0.7
"""Part of a device up to which live bytes and context are too few for the allocator's slack to matter; beyond all of it, it does not fit whatever the slack."""
Report = Callable[[str, float], None]


@dataclass(frozen=True, slots=True, kw_only=True)
class Compared:
    """One quantity of a row; ``measured`` is None where the row has none."""

    measured: float | None
    predicted: float
    low: float
    high: float

    @property
    def error(self) -> float | None:
        """``predicted / measured - 1``."""
        return self.predicted / self.measured - 1.0 if self.measured else None

    def within(self, half: float) -> Compared:
        """The same with an interval of this half-width, relative to the prediction."""
        return replace(self, low=max(0.0, self.predicted * (1.0 - half)), high=self.predicted * (1.0 + half))

    @property
    def distance(self) -> float | None:
        """``measured / predicted - 1``: where in an interval around the prediction the measurement lies."""
        return self.measured / self.predicted - 1.0 if self.measured and self.predicted else None

    @property
    def holds(self) -> bool:
        """Whether the interval holds the measurement."""
        return self.measured is not None and self.low <= self.measured <= self.high

    def to_json(self) -> dict[str, float | None]:
        """Its keys in ``schedlab validate --table --json``."""
        return {"measured": self.measured, "predicted": self.predicted, "error": self.error, "low": self.low, "high": self.high}


@dataclass(frozen=True, slots=True, kw_only=True)
class RowCheck:
    """A row that was predicted."""

    row_id: str
    group: tuple[str, str, int]
    """Model, GPU and number of GPUs."""
    tokens: int
    """Of a step."""
    status_measured: str
    oom_probability: float
    step_time: Compared
    peak_memory: Compared
    assumed: tuple[str, ...]
    evidence: str
    kernel_error: float
    needed_bytes: float
    """Reserved and context, of the rank that needs most."""
    device_bytes: float
    kind: str
    """Of the run: `validation.discrepancy.kind_of`."""

    @property
    def status_predicted(self) -> str:
        """``oom`` where that is more likely than not."""
        return "oom" if self.oom_probability > _LIKELY else "ok"

    def with_spreads(self, discrepancy: Discrepancy, table: str) -> RowCheck:
        """The same prediction with intervals and probability of other spreads."""
        time_half = half_width(discrepancy.time_spread(table, self.kind), self.kernel_error)
        memory_spread = discrepancy.memory_spread(table, self.kind)
        return replace(
            self, step_time=self.step_time.within(time_half), peak_memory=self.peak_memory.within(half_width(memory_spread, 0.0)),
            oom_probability=probability_above(self.needed_bytes, self.device_bytes, memory_spread),
        )  # fmt: skip

    @property
    def timed(self) -> bool:
        """Whether its step time counts: it ran, and its time is known."""
        return self.status_measured == "ok" and self.step_time.measured is not None

    def to_json(self) -> dict[str, Any]:
        """Its entry under ``rows``."""
        return {
            "row_id": self.row_id, "status_measured": self.status_measured, "status_predicted": self.status_predicted, "oom_probability": self.oom_probability,
            "step_time_s": self.step_time.to_json(), "peak_memory_bytes": self.peak_memory.to_json(), "assumed": list(self.assumed), "evidence": self.evidence,
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TableCheck:
    """What `check_table` found."""

    path: Path
    num_rows: int
    rows: tuple[RowCheck, ...]
    not_expressible: tuple[tuple[str, str], ...]
    """Row and reason."""

    @property
    def timed(self) -> tuple[RowCheck, ...]:
        """Rows whose step time counts."""
        return tuple(row for row in self.rows if row.timed)

    @property
    def time_errors(self) -> ErrorSummary | None:
        """Of step times of rows that ran."""
        return summary_of([row.step_time.error for row in self.timed if row.step_time.error is not None])

    @property
    def memory_errors(self) -> ErrorSummary | None:
        """Of peaks of rows that ran."""
        errors = [row.peak_memory.error for row in self.rows if row.status_measured == "ok"]
        return summary_of([error for error in errors if error is not None])

    def to_json(self) -> dict[str, Any]:
        """The keys of ``schedlab validate --table --json``."""
        timed, errors, memory = self.timed, self.time_errors, self.memory_errors
        keys = [row.group for row in timed]
        predicted = [row.step_time.predicted / row.tokens for row in timed]
        measured = [(row.step_time.measured or 0.0) / row.tokens for row in timed]
        labelled = [row for row in self.rows if row.status_measured in {"ok", "oom"}]
        return {
            "table": self.path.stem, "rows": [row.to_json() for row in self.rows], "num_rows": self.num_rows, "num_predicted": len(self.rows),
            "mape": errors and errors.mape, "median_ape": errors and errors.median_ape, "max_ape": errors and errors.max_ape, "bias": errors and errors.bias,
            "memory_mape": memory and memory.mape, "memory_bias": memory and memory.bias,
            "oom": {
                "num": sum(row.status_measured == "oom" for row in labelled),
                "balanced_accuracy": balanced_accuracy([row.status_measured == "oom" for row in labelled], [row.status_predicted == "oom" for row in labelled]),
            },
            "interval_coverage": sum(row.step_time.holds for row in timed) / len(timed) if timed else None,
            "spearman": mean_rank_correlation(keys, predicted, measured), "spearman_all": rank_correlation([row.step_time.predicted for row in timed], [row.step_time.measured or 0.0 for row in timed]),
            "regret_mean": mean_regret(keys, predicted, measured), "not_expressible": [{"row_id": name, "reason": reason} for name, reason in self.not_expressible],
        }  # fmt: skip

    def with_spreads(self, discrepancy: Discrepancy) -> TableCheck:
        """The same predictions with intervals of other spreads."""
        return replace(self, rows=tuple(row.with_spreads(discrepancy, self.path.stem) for row in self.rows))

    def residuals(self) -> tuple[list[Residual], list[Residual]]:
        """Errors of step times and of peaks, for `validation.discrepancy`."""
        times = [
            Residual(table=self.path.stem, kind=row.kind, error=row.step_time.distance, kernel_error=row.kernel_error)
            for row in self.timed
            if row.step_time.distance is not None
        ]
        peaks = [
            Residual(table=self.path.stem, kind=row.kind, error=row.peak_memory.distance, kernel_error=0.0)
            for row in self.rows if row.status_measured == "ok" and row.peak_memory.distance is not None
        ]  # fmt: skip
        return times, peaks


def check_table(path: Path, *, report: Report | None = None, discrepancy: Discrepancy | None = None) -> TableCheck:
    """Predicts every row of a table from the row's own configuration.

    Args:
        path: a CSV file with the columns of `validation.published_row`.
        report: called with what is done and the fraction of rows that are.
        discrepancy: spreads; None: the committed ones.

    Raises:
        InputError: no such file, or it is no such table.
    """
    rows, spreads = read_published(path), discrepancy or read_discrepancy()
    checked: list[RowCheck] = []
    refused: list[tuple[str, str]] = []
    for place, row in enumerate(rows):
        if report is not None:
            report(row.row_id, place / len(rows))
        try:
            checked.append(check_row(row, rows, spreads, table=path.stem))
        except (InputError, InfeasibleError) as reason:
            refused.append((row.row_id, str(reason)))
    return TableCheck(path=path, num_rows=len(rows), rows=tuple(checked), not_expressible=tuple(refused))


def check_row(row: PublishedRow, siblings: Sequence[PublishedRow], discrepancy: Discrepancy, *, table: str) -> RowCheck:
    """A row's prediction beside its measurement.

    Raises:
        InputError: the row cannot be expressed, or asks for what is not simulated.
        InfeasibleError: its schedule needs more memory than its own limit.
    """
    measured, expressed = measured_of(row), express(row, siblings)
    simulation, assumed = predicted_run(expressed, measured.memory_basis)
    step_s, peak = simulation.step_time_s, peak_on_basis(simulation, measured)
    found = RowCheck(
        row_id=row.row_id, group=(expressed.config.name, expressed.cluster.device, expressed.plan.num_gpus), tokens=simulation.tokens, status_measured=measured.status,
        oom_probability=0.0, step_time=Compared(measured=measured.step_time_s, predicted=step_s, low=step_s, high=step_s),
        peak_memory=Compared(measured=measured.peak_memory_bytes, predicted=peak, low=peak, high=peak), assumed=assumed,
        evidence="+".join(sorted(simulation.price.evidence)), kernel_error=simulation.price.relative_standard_error,
        needed_bytes=max(simulation.peak_reserved_bytes) + simulation.device.context_bytes, device_bytes=simulation.device.memory_bytes,
        kind=kind_of(expressed.plan, expressed.cluster.devices_per_node),
    )  # fmt: skip
    return found.with_spreads(discrepancy, table)


def predicted_run(expressed: Expressed, basis: MemoryBasis = "allocated") -> tuple[ParallelSimulation, tuple[str, ...]]:
    """The simulated step, and what was assumed for it: where a row does not say what is recomputed, the least that fits (all of it where nothing fits)."""
    if expressed.recompute_stated:
        return _simulated(expressed, expressed.plan, basis), expressed.assumed
    tried = [replace(expressed.plan, memory=replace(expressed.plan.memory, recompute=name)) for name in LEAST_RECOMPUTE]
    for plan in tried:
        simulation = _simulated(expressed, plan, basis)
        if simulation.fits:
            break
    return simulation, (*expressed.assumed, f"recompute = {plan.memory.recompute}: the least that fits")


def _simulated(expressed: Expressed, plan: Plan, basis: MemoryBasis) -> ParallelSimulation:
    """The step; with the allocator replayed where reserved bytes are compared or decide whether it fits: a replay takes far longer than the step."""
    source = ModelSource(name=expressed.config.name, config=expressed.config, seq_len=expressed.seq_len)
    facts = expressed.facts
    device = device_of_run(expressed.cluster.device, expressed.flash_generation, facts.product_library, port=facts.flash_port)
    if basis == "allocated":
        live = simulate_source(source, plan, expressed.cluster, reserved=False, device=device)
        needed = max(live.peak_memory_bytes) + live.device.context_bytes
        if not _FAR_BELOW * live.device.memory_bytes < needed <= live.device.memory_bytes:
            return live
    return simulate_source(source, plan, expressed.cluster, device=device)


def peak_on_basis(simulation: ParallelSimulation, measured: Measured) -> float:
    """The largest peak over pipeline ranks, counted as the source counts: allocated, reserved, or reserved and the context (nvidia-smi)."""
    if measured.memory_basis == "allocated":
        return float(max(simulation.peak_memory_bytes))
    reserved = float(max(simulation.peak_reserved_bytes))
    return reserved + simulation.device.context_bytes if measured.memory_basis == "nvidia-smi" else reserved
