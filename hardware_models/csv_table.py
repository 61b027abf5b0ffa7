"""Tables of published timings: which format a file has by its columns, and cells that name file, line and column when they are wrong."""

from __future__ import annotations

import csv
from collections.abc import Iterator, Mapping, Sequence
from collections.abc import Set as AbstractSet
from dataclasses import dataclass
from math import isfinite
from pathlib import Path
from typing import TypeVar

from hardware_models.errors import InputError
from hardware_models.text_files import text_of

Format = TypeVar("Format")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cells:
    """One row with its place."""

    path: Path
    line: int
    """Of the file, the header being 1."""
    values: Mapping[str, str]

    def text(self, column: str) -> str:
        """A cell that must not be empty."""
        value = (self.values.get(column) or "").strip()
        if not value:
            raise self.error(column, value, "a value is required")
        return value

    def has(self, column: str) -> bool:
        """Whether a cell is there and not empty."""
        return bool((self.values.get(column) or "").strip())

    def number(self, column: str) -> float:
        """A positive, finite number."""
        text = self.text(column)
        try:
            value = float(text)
        except ValueError as problem:
            raise self.error(column, text, "a number") from problem
        if not (isfinite(value) and value > 0):
            raise self.error(column, text, "a positive, finite number")
        return value

    def error(self, column: str, value: object, rule: str) -> InputError:
        """What is wrong with a cell."""
        return InputError(
            source=str(self.path),
            key=f"line {self.line}, {column}",
            value=value,
            rule=rule,
            remedy="correct the row or remove it",
        )


def format_of(path: Path, formats: Sequence[tuple[AbstractSet[str], Format]]) -> Format | None:
    """What belongs to the first set of columns that a file has all of; None where it has none.

    Raises:
        InputError: no such file, or no text.
    """
    columns = _columns(path)
    return next((found for needed, found in formats if needed <= columns), None)


def required_format(path: Path, formats: Sequence[tuple[AbstractSet[str], Format]]) -> Format:
    """`format_of`, where the file must have one.

    Raises:
        InputError: no such file, no text, or columns of no known format; lists these.
    """
    found = format_of(path, formats)
    if found is None:
        known = "; ".join(", ".join(sorted(needed)) for needed, _ in formats)
        raise InputError(
            source=str(path),
            key="header",
            value=sorted(_columns(path)),
            rule=f"the columns hold one of: {known}",
            remedy="name the columns so",
        )
    return found


def rows_of(path: Path) -> Iterator[Cells]:
    """The rows of a file.

    Raises:
        InputError: no such file, no text, or quotes that are not closed.
    """
    reader = csv.DictReader(_text(path).splitlines())
    try:
        for values in reader:
            yield Cells(path=path, line=reader.line_num, values=values)
    except csv.Error as problem:
        raise _broken(path, reader.line_num, problem) from problem


def _columns(path: Path) -> AbstractSet[str]:
    reader = csv.reader(_text(path).splitlines())
    try:
        return set(next(reader, []))
    except csv.Error as problem:
        raise _broken(path, reader.line_num, problem) from problem


def _broken(path: Path, line: int, problem: csv.Error) -> InputError:
    return InputError(
        source=str(path), key=f"line {line}", value=None, rule=f"a CSV file: {problem}", remedy="close the quotes"
    )


def _text(path: Path) -> str:
    return text_of(path, remedy="name a table in CSV")
