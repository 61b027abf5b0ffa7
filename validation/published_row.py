"""Rows of tables of published training runs: cells by column, and what was measured."""

from __future__ import annotations

import re
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import Literal

from hardware_models.csv_table import Cells, required_format, rows_of
from hardware_models.units import GB, GIB

NEEDED_COLUMNS = frozenset(
    {"row_id", "framework", "model", "gpu", "n_gpus", "tp", "pp", "dp", "global_batch", "step_time_s", "status"}
)
"""Columns by which a table of training runs is known; those that it lacks beyond them count as blank."""
MemoryBasis = Literal["allocated", "reserved", "nvidia-smi"]
_RESERVED_BESIDE = re.compile(r"max_reserved\s+GiB=\s*[\d.]+", re.IGNORECASE)
"""A second figure that some tables give in the column of the basis."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PublishedRow:
    """One configuration as published; a blank cell is what the source does not say."""

    cells: Cells
    row_id: str

    def text(self, column: str) -> str:
        """The cell, stripped; empty where it is blank or there is no such column."""
        return (self.cells.values.get(column) or "").strip()

    def count(self, column: str) -> int | None:
        """A whole number of at least 1; None where blank.

        Raises:
            InputError: the cell is neither.
        """
        value = self.number(column)
        if value is None:
            return None
        if value != int(value) or value < 1:
            raise self.cells.error(column, self.text(column), "a whole number of at least 1")
        return int(value)

    def number(self, column: str) -> float | None:
        """A finite number; None where blank.

        Raises:
            InputError: the cell is neither.
        """
        text = self.text(column)
        if not text:
            return None
        try:
            value = float(text.replace(",", ""))
        except ValueError as problem:
            raise self.cells.error(column, text, "a number") from problem
        if not isfinite(value):
            raise self.cells.error(column, text, "a finite number")
        return value

    def required(self, column: str) -> int:
        """A whole number that must be there.

        Raises:
            InputError: the cell is blank or no such number.
        """
        value = self.count(column)
        if value is None:
            raise self.cells.error(column, None, "the source does not state it, and nothing in the row gives it")
        return value


@dataclass(frozen=True, slots=True, kw_only=True)
class Measured:
    """What a row reports of its run."""

    status: str
    """``ok``, ``oom`` or another word of the source."""
    step_time_s: float | None
    peak_memory_bytes: float | None
    memory_basis: MemoryBasis


def is_published_table(columns: frozenset[str]) -> bool:
    """Whether a file with these columns is a table of training runs."""
    return columns >= NEEDED_COLUMNS


def read_published(path: Path) -> tuple[PublishedRow, ...]:
    """The rows of a table of published training runs.

    Raises:
        InputError: no such file, no text, or a column of `NEEDED_COLUMNS` is missing.
    """
    required_format(path, [(NEEDED_COLUMNS, "training runs")])
    return tuple(
        PublishedRow(cells=cells, row_id=(cells.values.get("row_id") or "").strip() or f"{path.stem}:{cells.line}")
        for cells in rows_of(path)
    )


def measured_of(row: PublishedRow) -> Measured:
    """The row's own measurements.

    **Model**: a blank step time follows from the row's samples/s or tokens/s per GPU, not from FLOP rates, whose definitions differ from source to source.

    Raises:
        InputError: a cell holds no number.
    """
    memory = row.number("peak_memory_gib")
    basis = _RESERVED_BESIDE.sub("", row.text("memory_basis"))
    unit = GB if re.search(r"\bGB\b", basis) and "GiB" not in basis else GIB
    return Measured(
        status=row.text("status").lower() or "ok", step_time_s=_step_time_s(row), peak_memory_bytes=None if memory is None else memory * unit,
        memory_basis=memory_basis(basis),
    )  # fmt: skip


def memory_basis(text: str) -> MemoryBasis:
    """Which memory the words of a source mean; torch's own counter of allocated bytes unless they say otherwise."""
    plain = text.lower()
    if "nvidia-smi" in plain or "nvml" in plain:
        return "nvidia-smi"
    return "reserved" if "reserved" in plain else "allocated"


def _step_time_s(row: PublishedRow) -> float | None:
    stated = row.number("step_time_s")
    if stated is not None:
        if stated <= 0:
            raise row.cells.error("step_time_s", stated, "a positive number")
        return stated
    batch, samples_per_s = row.number("global_batch"), row.number("samples_per_s")
    if batch and samples_per_s:
        return batch / samples_per_s
    rate, gpus, length = row.number("tokens_per_s_per_gpu"), row.number("n_gpus"), row.number("seq_len")
    if batch and rate and gpus and length:
        return batch * length / (rate * gpus)
    return None
