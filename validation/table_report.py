"""What the command line and the committed results show of predictions against published runs."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence

from rich.table import Table

from hardware_models.units import GIB
from validation.reports import table_of
from validation.table_check import Compared, RowCheck, TableCheck

_MOST_ROWS = 40
"""Rows of a table up to which all are shown; of longer ones the worst."""
_WORST = 15
NOTHING = "-"
_SHARES = (
    ("mean error of step time", "mape"), ("median", "median_ape"), ("worst", "max_ape"), ("mean error of peak memory", "memory_mape"), ("80% intervals hold", "interval_coverage"),
    ("regret of choosing by prediction", "regret_mean"),
)  # fmt: skip
_SIGNED = (("bias of step time", "bias"), ("bias of peak memory", "memory_bias"))


def published_table(check: TableCheck) -> Table:
    """Errors of a table of published runs: the whole, then its rows (the worst of them where there are many), then what cannot be expressed."""
    result = check.to_json()
    lines: list[tuple[str, ...]] = [(words, share(result[key]), *[""] * 5) for words, key in _SHARES]
    lines += [(words, signed(result[key]), *[""] * 5) for words, key in _SIGNED]
    lines += [
        (words, plain(result[key]), *[""] * 5)
        for words, key in (("rank correlation inside groups", "spearman"), ("rank correlation over all rows", "spearman_all"))
    ]
    if result["oom"]["num"]:
        lines.append(
            (
                f"out of memory ({result['oom']['num']} rows), balanced accuracy",
                share(result["oom"]["balanced_accuracy"]),
                *[""] * 5,
            )
        )
    lines += [_row(row) for row in _shown(check.rows)]
    reasons = Counter(reason for _row_id, reason in check.not_expressible)
    lines += [(f"not expressed: {reason}", f"{num} rows", *[""] * 5) for reason, num in reasons.items()]
    title = f"{check.path.name}: {check.num_rows} rows, {len(check.rows)} predicted, {len(check.timed)} with a step time"
    return table_of(
        title,
        ("row", "error", "step s: measured", "predicted", "peak GiB: measured", "predicted", "status: measured, predicted"),
        lines,
    )


def share(value: float | None) -> str:
    """A fraction in percent."""
    return NOTHING if value is None else f"{value:.1%}"


def signed(value: float | None) -> str:
    """A fraction in percent with its sign."""
    return NOTHING if value is None else f"{value:+.1%}"


def plain(value: float | None) -> str:
    """A coefficient."""
    return NOTHING if value is None else f"{value:.3f}"


def _shown(rows: Sequence[RowCheck]) -> list[RowCheck]:
    if len(rows) <= _MOST_ROWS:
        return list(rows)
    return sorted(rows, key=lambda row: -abs(row.step_time.error or 0.0))[:_WORST]


def _row(row: RowCheck) -> tuple[str, ...]:
    return (
        f"  {row.row_id}", signed(row.step_time.error if row.timed else None), *_both(row.step_time, 1.0, ".4g"), *_both(row.peak_memory, 1.0 / GIB, ".2f"),
        f"{row.status_measured}, {row.status_predicted}",
    )  # fmt: skip


def _both(compared: Compared, scale: float, form: str) -> tuple[str, str]:
    measured = NOTHING if compared.measured is None else format(compared.measured * scale, form)
    return measured, format(compared.predicted * scale, form)
