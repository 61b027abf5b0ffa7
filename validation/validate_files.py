"""What ``schedlab validate`` does with a file: prices of kernels, whole runs, or their peaks of memory rank by rank."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from hardware_models.csv_table import required_format
from hardware_models.errors import InputError
from validation.kernel_check import check_kernels
from validation.published_row import NEEDED_COLUMNS
from validation.rank_memory import RANK_COLUMNS, check_rank_memory
from validation.reports import kernel_check_table
from validation.table_check import Report, check_table
from validation.table_report import published_table


def validate_files(*, table: Path | None, kernels: Path | None, hardware_dir: Path | None, report: Report) -> dict[str, Any]:
    """The JSON of a check of one file, with its table for people under ``_table``.

    Args:
        table: of published runs, or of their peaks of memory rank by rank.
        kernels: of timings of kernels, copies or collectives.
        hardware_dir: folder of device folders that are taken before the catalogue's, for kernels.
        report: called with what is done and the fraction that is.

    Raises:
        InputError: not exactly one file, or a folder that is none.
    """
    if (table is None) == (kernels is None):
        given = "both" if table else "neither"
        raise InputError(
            source="validate",
            key="--table, --kernels",
            value=given,
            rule="exactly one file is checked",
            remedy="give --table FILE or --kernels FILE",
        )
    if hardware_dir is not None and not hardware_dir.is_dir():
        raise InputError(
            source="--hardware-dir",
            key="",
            value=str(hardware_dir),
            rule="a folder of device folders",
            remedy="correct the path",
        )
    if kernels is not None:
        prices = check_kernels(kernels, hardware_dir=hardware_dir)
        return prices.to_json() | {"_table": kernel_check_table(prices)}
    assert table is not None
    if hardware_dir is not None:
        rule = "published runs are predicted with the catalogue's devices"
        raise InputError(
            source="--hardware-dir", key="", value=str(hardware_dir), rule=rule, remedy="leave it out, or check --kernels"
        )
    if required_format(table, [(RANK_COLUMNS, True), (NEEDED_COLUMNS, False)]):
        peaks = check_rank_memory(table, report=report)
        return peaks.to_json() | {"_table": peaks.table()}
    runs = check_table(table, report=report)
    return runs.to_json() | {"_table": published_table(runs)}
