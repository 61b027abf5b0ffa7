"""Results over folders of tables, and the tables that the project holds."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from tests.published_rows import GPT_22B, write_rows
from validation.discrepancy import read_discrepancy
from validation.express import express
from validation.published_results import COLUMNS, discrepancy_of, main, summary_line, tables_in
from validation.published_row import measured_of, read_published
from validation.table_check import check_table

HELD = Path(__file__).parents[2] / "validation" / "published"
SMALL = GPT_22B | {"n_layers": "2", "step_time_s": "0.05", "peak_memory_gib": "3"}


def test_results_are_a_line_a_table_and_the_spreads_without_it(tmp_path: Path) -> None:
    write_rows(tmp_path / "a.csv", SMALL, SMALL | {"row_id": "t:2", "recompute": "none"})
    write_rows(tmp_path / "b.csv", SMALL | {"step_time_s": "0.06"})
    write_rows(tmp_path / "other.csv", {"m": "1"})
    main(["--tables", str(tmp_path), "--out", str(tmp_path / "out")])
    with (tmp_path / "out" / "published.csv").open(encoding="utf-8") as stream:
        lines = list(csv.DictReader(stream))
    assert [line["table"] for line in lines] == ["a", "b"]
    assert tuple(lines[0]) == COLUMNS
    with (tmp_path / "out" / "coverage.csv").open(encoding="utf-8") as stream:
        shares = [(line["of"], line["value"], line["rows"]) for line in csv.DictReader(stream)]
    assert shares[:2] == [("all", "", "3"), ("kind", "node", "3")]
    assert {of for of, _, _ in shares} == {"all", "kind", "evidence"}
    spreads = read_discrepancy(tmp_path / "out" / "discrepancy.toml")
    assert set(spreads.time) == {"any", "a", "b"}
    assert (tmp_path / "out" / "published.png").stat().st_size > 1000


def test_lines_are_rounded_and_spreads_are_of_tables(tmp_path: Path) -> None:
    check = check_table(write_rows(tmp_path / "a.csv", SMALL))
    line = summary_line(check)
    assert line["num_rows"] == line["num_timed"] == 1
    assert line["mape"] == pytest.approx(check.to_json()["mape"], abs=1e-4)
    assert set(discrepancy_of([check])) == {"time", "memory"}


def test_the_tables_that_the_project_holds_are_whole_and_cited() -> None:
    tables = tables_in([HELD])
    assert len(tables) == 5
    names = []
    for path in tables:
        rows = read_published(path)
        for row in rows:
            names.append(row.row_id)
            assert len(row.text("source")) > 20
            assert express(row, rows).plan.num_gpus == row.required("n_gpus")
            measured_of(row)
    assert len(names) == len(set(names)) > 80
