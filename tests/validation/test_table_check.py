"""Tables of published runs from file to JSON."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from schedlab import main
from tests.published_rows import GPT_22B, write_rows
from validation.discrepancy import Discrepancy
from validation.table_check import TableCheck, check_table
from validation.table_report import published_table

SMALL = GPT_22B | {"n_layers": "4", "step_time_s": "0.1"}
ROWS = (
    SMALL,
    SMALL
    | {
        "row_id": "t:2",
        "seq_parallel": "no",
        "recompute": "full",
        "step_time_s": "0.13",
        "peak_memory_gib": "10",
        "memory_basis": "nvidia-smi",
    },
    SMALL | {"row_id": "t:3", "micro_batch": "512", "global_batch": "512", "step_time_s": "", "status": "oom"},
    SMALL | {"row_id": "t:4", "model": "Mamba-3B"},
    SMALL | {"row_id": "t:5", "recompute": "", "micro_batch": "64", "global_batch": "64", "step_time_s": ""},
)


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return write_rows(tmp_path_factory.mktemp("tables") / "runs.csv", *ROWS)


@pytest.fixture(scope="module")
def check(path: Path) -> TableCheck:
    return check_table(path, discrepancy=Discrepancy(time={"any": {"any": 0.1}}, memory={"any": {"any": 0.05}}))


def test_every_row_is_predicted_or_named(check: TableCheck) -> None:
    result = check.to_json()
    assert (result["num_rows"], result["num_predicted"]) == (5, 4)
    assert [refused["row_id"] for refused in result["not_expressible"]] == ["t:4"]
    assert "state-space" in result["not_expressible"][0]["reason"]
    assert {row["row_id"] for row in result["rows"]} == {"t:1", "t:2", "t:3", "t:5"}


def test_errors_are_predicted_over_measured(check: TableCheck) -> None:
    first = check.to_json()["rows"][0]["step_time_s"]
    assert first["error"] == pytest.approx(first["predicted"] / 0.1 - 1.0)
    assert first["low"] < first["predicted"] < first["high"]
    assert first["high"] - first["predicted"] >= 0.128 * first["predicted"]


def test_mape_is_over_rows_that_ran_and_were_timed(check: TableCheck) -> None:
    result = check.to_json()
    errors = [row["step_time_s"]["error"] for row in result["rows"][:2]]
    assert result["mape"] == pytest.approx(sum(map(abs, errors)) / 2)
    assert result["bias"] == pytest.approx(sum(errors) / 2)
    assert result["memory_mape"] == pytest.approx(abs(result["rows"][1]["peak_memory_bytes"]["error"]))


def test_what_runs_out_of_memory_is_predicted_with_a_probability(check: TableCheck) -> None:
    result = check.to_json()
    by_name = {row["row_id"]: row for row in result["rows"]}
    assert by_name["t:3"]["status_predicted"] == "oom"
    assert by_name["t:3"]["oom_probability"] > 0.99
    assert by_name["t:1"]["oom_probability"] < 0.01
    assert result["oom"] == {"num": 1, "balanced_accuracy": 1.0}


def test_unstated_recompute_is_the_least_that_fits(check: TableCheck) -> None:
    assumed = check.to_json()["rows"][-1]["assumed"]
    assert len(assumed) == 1
    assert assumed[0].startswith("recompute = ")
    assert assumed[0].endswith(": the least that fits")


def test_the_table_shows_errors_and_reasons(check: TableCheck) -> None:
    table = published_table(check)
    cells = [str(cell) for column in table.columns for cell in column.cells]
    assert any("state-space" in cell for cell in cells)
    assert any(cell.strip() == "t:2" for cell in cells)


def test_the_command_prints_one_object(path: Path) -> None:
    result = CliRunner().invoke(main, ["validate", "--table", str(path), "--json"])
    assert result.exit_code == 0
    keys = {
        "rows",
        "num_rows",
        "num_predicted",
        "mape",
        "median_ape",
        "max_ape",
        "bias",
        "memory_mape",
        "oom",
        "interval_coverage",
        "spearman",
        "regret_mean",
        "not_expressible",
    }
    assert keys <= set(json.loads(result.stdout))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "exactly one file is checked"),
        (["--table", "a.csv", "--kernels", "b.csv"], "exactly one file is checked"),
        (["--table", "absent.csv"], "no such file"),
    ],
)
def test_bad_arguments_exit_with_2(arguments: list[str], message: str) -> None:
    result = CliRunner().invoke(main, ["validate", *arguments])
    assert result.exit_code == 2
    assert message in result.stderr
