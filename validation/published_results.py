"""Where predictions stand against tables of published runs: every table of some folders, errors by table, spreads, a figure.

    python -m validation.published_results --tables DIR [--tables DIR ...] --out validation/results

Writes ``published.csv`` (a line a table), ``coverage.csv`` (what intervals hold over all rows, by kind of run and of evidence), ``discrepancy.toml`` (spreads of `validation.discrepancy`, leaving each table out in turn) and
``published.png``.
"""

from __future__ import annotations

import argparse
import csv
from collections.abc import Sequence
from operator import attrgetter
from pathlib import Path
from typing import Any

import tomli_w

from hardware_models.csv_table import format_of
from hardware_models.files import whole_file
from simulator.figures import save_figure
from validation.discrepancy import Discrepancy, spreads_of
from validation.published_row import NEEDED_COLUMNS
from validation.table_check import TableCheck, check_table
from validation.table_figures import scatter_figure

COLUMNS = (
    "table", "num_rows", "num_predicted", "num_timed", "mape", "median_ape", "max_ape", "bias", "memory_mape", "memory_bias", "oom_rows", "oom_balanced_accuracy", "interval_coverage",
    "spearman", "spearman_all", "regret_mean",
)  # fmt: skip
"""Of ``published.csv``; ratios are fractions."""
_DIGITS = 4


def tables_in(folders: Sequence[Path]) -> list[Path]:
    """Tables of training runs in some folders, by folder and name; other files are passed over."""
    return [
        path
        for folder in folders
        for path in sorted(folder.glob("*.csv"))
        if format_of(path, [(NEEDED_COLUMNS, "training runs")])
    ]


def summary_line(check: TableCheck) -> dict[str, Any]:
    """A table's line of ``published.csv``."""
    result = check.to_json()
    values = result | {
        "num_timed": len(check.timed),
        "oom_rows": result["oom"]["num"],
        "oom_balanced_accuracy": result["oom"]["balanced_accuracy"] if result["oom"]["num"] else None,
    }
    return {name: round(values[name], _DIGITS) if isinstance(values[name], float) else values[name] for name in COLUMNS}


def discrepancy_of(checks: Sequence[TableCheck]) -> dict[str, Any]:
    """The content of ``discrepancy.toml``."""
    residuals = [check.residuals() for check in checks]
    times, peaks = [one for found, _ in residuals for one in found], [one for _, found in residuals for one in found]
    return {kind: _rounded(spreads_of(found)) for kind, found in (("time", times), ("memory", peaks)) if found}


def coverage_lines(checks: Sequence[TableCheck]) -> list[dict[str, Any]]:
    """Lines of ``coverage.csv``: timed rows and the share of them that 80% intervals hold, over all tables and by kind of run and of evidence."""
    rows = [row for check in checks for row in check.timed]
    groups = [("all", "", rows)]
    for name, key in (("kind", attrgetter("kind")), ("evidence", attrgetter("evidence"))):
        groups += [(name, value, [row for row in rows if key(row) == value]) for value in sorted({key(row) for row in rows})]
    return [
        {"of": of, "value": value, "rows": len(own), "held": round(sum(row.step_time.holds for row in own) / len(own), _DIGITS)}
        for of, value, own in groups
        if own
    ]


def _rounded(spreads: dict[str, dict[str, float]]) -> dict[str, dict[str, float]]:
    return {table: {kind: round(value, _DIGITS) for kind, value in of_table.items()} for table, of_table in spreads.items()}


def write_results(checks: Sequence[TableCheck], out: Path) -> None:
    """Writes the four files; intervals in the lines are those of the spreads that are written."""
    spreads = discrepancy_of(checks)
    renewed = Discrepancy(time=spreads.get("time", {}), memory=spreads.get("memory", {}))
    out.mkdir(parents=True, exist_ok=True)
    with whole_file(out / "discrepancy.toml") as temporary:
        temporary.write_text(tomli_w.dumps(spreads), encoding="utf-8")
    ours = [check.with_spreads(renewed) for check in checks]
    _write_lines(out / "published.csv", [summary_line(check) for check in ours], COLUMNS)
    _write_lines(out / "coverage.csv", coverage_lines(ours), ("of", "value", "rows", "held"))
    save_figure(scatter_figure(checks), out / "published.png")


def _write_lines(path: Path, lines: Sequence[dict[str, Any]], columns: Sequence[str]) -> None:
    with whole_file(path) as temporary, temporary.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, lineterminator="\n")
        writer.writeheader()
        writer.writerows(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """The command."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--tables", type=Path, action="append", required=True, help="folder of CSV tables; may be repeated")
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    options = parser.parse_args(arguments)
    checks = []
    for path in tables_in(options.tables):
        check = check_table(path)
        print(summary_line(check), flush=True)  # noqa: T201 - the command's output
        checks.append(check)
    write_results(checks, options.out)


if __name__ == "__main__":
    main()
