"""Predictions against peaks of memory that a source prints rank by rank, beside a table of its runs."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.table import Table

from hardware_models.csv_table import Cells, format_of, rows_of
from hardware_models.errors import InfeasibleError, InputError
from hardware_models.units import GIB
from simulator.parallel.mesh import mesh_of
from simulator.parallel.simulation import ParallelSimulation
from validation.discrepancy import Discrepancy, half_width, kind_of, read_discrepancy
from validation.error_summary import ErrorSummary, summary_of
from validation.express import express
from validation.published_row import NEEDED_COLUMNS, PublishedRow, read_published
from validation.reports import table_of
from validation.table_check import Compared, Report, predicted_run
from validation.table_report import share, signed

RANK_COLUMNS = frozenset({"case", "rank", "max_allocated_mib", "max_reserved_mib"})
"""Columns by which such a table is known: the run (a ``table_id`` of a table of runs in the same folder), the global rank, and torch's two peaks."""
_MIB = 2**20


@dataclass(frozen=True, slots=True, kw_only=True)
class RankCheck:
    """One rank of a run that was predicted."""

    row_id: str
    """Of the run and its rank."""
    allocated: Compared
    reserved: Compared

    def to_json(self) -> dict[str, Any]:
        """Its entry under ``rows``."""
        return {
            "row_id": self.row_id, "peak_memory_bytes": self.allocated.to_json(), "peak_reserved_bytes": self.reserved.to_json(),
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class RankMemoryCheck:
    """What `check_rank_memory` found."""

    path: Path
    num_rows: int
    ranks: tuple[RankCheck, ...]
    not_expressible: tuple[tuple[str, str], ...]
    """Run with rank, and reason."""

    @property
    def allocated(self) -> ErrorSummary | None:
        """Errors of ``torch.cuda.max_memory_allocated``."""
        return summary_of([rank.allocated.error for rank in self.ranks if rank.allocated.error is not None])

    @property
    def reserved(self) -> ErrorSummary | None:
        """Errors of ``torch.cuda.max_memory_reserved``."""
        return summary_of([rank.reserved.error for rank in self.ranks if rank.reserved.error is not None])

    def to_json(self) -> dict[str, Any]:
        """The keys of ``schedlab validate --table --json`` that memory has."""
        allocated, reserved = self.allocated, self.reserved
        return {
            "table": self.path.stem, "rows": [rank.to_json() for rank in self.ranks], "num_rows": self.num_rows, "num_predicted": len(self.ranks),
            "memory_mape": allocated and allocated.mape, "memory_max_ape": allocated and allocated.max_ape, "memory_bias": allocated and allocated.bias,
            "reserved_mape": reserved and reserved.mape, "reserved_max_ape": reserved and reserved.max_ape, "reserved_bias": reserved and reserved.bias,
            "interval_coverage": sum(rank.allocated.holds for rank in self.ranks) / len(self.ranks) if self.ranks else None,
            "not_expressible": [{"row_id": name, "reason": reason} for name, reason in self.not_expressible],
        }  # fmt: skip

    def table(self) -> Table:
        """Errors of all ranks, then each of them."""
        lines: list[tuple[str, ...]] = []
        for words, errors in (("allocated", self.allocated), ("reserved", self.reserved)):
            if errors is not None:
                lines.append((f"{words}: mean error", share(errors.mape), "", "", ""))
                lines.append((f"{words}: worst, bias", share(errors.max_ape), signed(errors.bias), "", ""))
        for rank in self.ranks:
            one, other = rank.allocated, rank.reserved
            lines.append(
                (
                    f"  {rank.row_id}", signed(one.error), f"{(one.measured or 0.0) / GIB:.2f}, {one.predicted / GIB:.2f}", signed(other.error),
                    f"{(other.measured or 0.0) / GIB:.2f}, {other.predicted / GIB:.2f}",
                )
            )  # fmt: skip
        lines += [(f"not expressed: {name}: {reason}", "", "", "", "") for name, reason in self.not_expressible]
        columns = ("rank", "allocated: error", "GiB: measured, predicted", "reserved: error", "GiB: measured, predicted")
        return table_of(f"{self.path.name}: {self.num_rows} rows, {len(self.ranks)} predicted", columns, lines)


def check_rank_memory(path: Path, *, report: Report | None = None, discrepancy: Discrepancy | None = None) -> RankMemoryCheck:
    """Predicts the peaks of every rank of a table, each run simulated once.

    **Model**: a global rank lies on the pipeline rank that the plan's order of axes gives it; ranks of one pipeline rank are predicted alike.

    Args:
        path: a CSV file with the columns `RANK_COLUMNS`; tables of runs lie in the same folder.
        report: called with what is done and the fraction that is.
        discrepancy: spreads; None: the committed ones.

    Raises:
        InputError: no such file, or it is no such table.
    """
    cells, spreads = list(rows_of(path)), discrepancy or read_discrepancy()
    runs = list(_runs_beside(path))
    simulated: dict[str, ParallelSimulation | str] = {}
    ranks: list[RankCheck] = []
    refused: list[tuple[str, str]] = []
    for place, row in enumerate(cells):
        case = row.text("case")
        name = f"{case} rank {row.text('rank')}"
        if report is not None:
            report(name, place / len(cells))
        if case not in simulated:
            simulated[case] = _run_of(row, case, runs)
        run = simulated[case]
        if isinstance(run, str):
            refused.append((name, run))
            continue
        kind = kind_of(run.plan, run.cluster.devices_per_node)
        ranks.append(_check_of(row, name, run, half_width(spreads.memory_spread(path.stem, kind), 0.0)))
    return RankMemoryCheck(path=path, num_rows=len(cells), ranks=tuple(ranks), not_expressible=tuple(refused))


def _runs_beside(path: Path) -> Iterator[tuple[PublishedRow, Sequence[PublishedRow]]]:
    """Rows of the tables of runs in a file's folder, each with its table."""
    for other in sorted(path.parent.glob("*.csv")):
        if other != path and format_of(other, [(NEEDED_COLUMNS, True)]):
            table = read_published(other)
            yield from ((row, table) for row in table)


def _run_of(row: Cells, case: str, runs: Sequence[tuple[PublishedRow, Sequence[PublishedRow]]]) -> ParallelSimulation | str:
    """The simulated run of a case, or why there is none."""
    found = [(run, table) for run, table in runs if run.text("table_id") == case]
    try:
        if len(found) != 1:
            rule = f"exactly one row of the tables of runs in {row.path.parent} has it as table_id, but {len(found)} have"
            raise row.error("case", case, rule)
        (run, table) = found[0]
        return predicted_run(express(run, table), "reserved")[0]
    except (InputError, InfeasibleError) as reason:
        return str(reason)


def _check_of(row: Cells, name: str, run: ParallelSimulation, half: float) -> RankCheck:
    rank, mesh = _rank(row, run.plan.num_gpus), mesh_of(run.plan, run.cluster)
    stage = rank // mesh.stride("pp") % mesh.degree("pp")
    live, reserved = run.peak_memory_bytes[stage], run.peak_reserved_bytes[stage]
    return RankCheck(
        row_id=name, allocated=_compared(row, "max_allocated_mib", live, half), reserved=_compared(row, "max_reserved_mib", reserved, half)
    )  # fmt: skip


def _compared(row: Cells, column: str, predicted: float, half: float) -> Compared:
    measured = row.number(column) * _MIB
    return Compared(measured=measured, predicted=predicted, low=predicted, high=predicted).within(half)


def _rank(row: Cells, num_gpus: int) -> int:
    """A global rank.

    Raises:
        InputError: no such rank.
    """
    text = row.text("rank")
    if not text.isdecimal() or int(text) >= num_gpus:
        raise row.error("rank", text, f"a whole number with 0 <= rank < {num_gpus}, the run's GPUs")
    return int(text)
