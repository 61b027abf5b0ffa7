"""Cells of published tables, and what was measured."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_models.errors import InputError
from tests.published_rows import GPT_22B, row_of, write_rows
from validation.published_row import measured_of, memory_basis, read_published


def test_whole_numbers_may_be_written_as_fractions() -> None:
    assert row_of(n_microbatches="8.0").count("n_microbatches") == 8


def test_a_blank_cell_is_nothing_and_a_missing_column_too() -> None:
    assert row_of(vocab=" ").count("vocab") is None
    assert row_of().number("no such column") is None


@pytest.mark.parametrize(("text", "rule"), [("eight", "a number"), ("nan", "a finite number")])
def test_what_is_no_number_is_refused_with_its_place(text: str, rule: str) -> None:
    with pytest.raises(InputError, match=rf"t\.csv: line 2, tp = .*: {rule}"):
        row_of(tp=text).number("tp")


@pytest.mark.parametrize("text", ["0", "-8", "1.5"])
def test_counts_are_whole_and_positive(text: str) -> None:
    with pytest.raises(InputError, match="a whole number of at least 1"):
        row_of(tp=text).count("tp")


def test_gigabytes_and_gibibytes_are_told_apart_by_the_words_of_the_basis() -> None:
    printed = measured_of(row_of(peak_memory_gib="59", memory_basis="GB, max over stages as printed"))
    assert printed.peak_memory_bytes == 59e9
    counted = measured_of(
        row_of(peak_memory_gib="2", memory_basis="max over ranks torch.cuda.max_memory_allocated; max_reserved GiB=70.88")
    )
    assert (counted.peak_memory_bytes, counted.memory_basis) == (2 * 2**30, "allocated")


@pytest.mark.parametrize(
    ("words", "basis"),
    [
        ("nvidia-smi max (GB, includes CUDA context)", "nvidia-smi"),
        ("torch CUDA max active/reserved peak (GiB)", "reserved"),
        ("", "allocated"),
    ],
)
def test_memory_bases(words: str, basis: str) -> None:
    assert memory_basis(words) == basis


def test_a_blank_step_time_follows_from_samples_or_tokens_per_second() -> None:
    assert measured_of(row_of(step_time_s="", samples_per_s="8")).step_time_s == 0.5
    assert measured_of(row_of(step_time_s="", tokens_per_s_per_gpu="512")).step_time_s == 4 * 2048 / (512 * 8)
    assert measured_of(row_of(step_time_s="", tflops_per_gpu="150")).step_time_s is None


def test_a_step_takes_time() -> None:
    with pytest.raises(InputError, match="a positive number"):
        measured_of(row_of(step_time_s="0"))


def test_rows_are_read_in_order_and_named_by_line_where_they_have_no_name(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "runs.csv", GPT_22B, GPT_22B | {"row_id": ""})
    assert [row.row_id for row in read_published(path)] == ["t:1", "runs:3"]


def test_another_table_is_refused(tmp_path: Path) -> None:
    path = write_rows(tmp_path / "runs.csv", {"m": "1", "n": "2"})
    with pytest.raises(InputError, match="the columns hold one of: dp, framework"):
        read_published(path)
