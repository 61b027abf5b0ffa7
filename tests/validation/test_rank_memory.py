"""Peaks of memory rank by rank, beside a table of runs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner

from hardware_models.errors import InputError
from schedlab import main
from tests.published_rows import GPT_22B, write_rows
from validation.discrepancy import Discrepancy
from validation.rank_memory import RankMemoryCheck, check_rank_memory

RUN = GPT_22B | {
    "table_id": "four stages", "framework": "Megatron-LM 0.14", "n_layers": "4", "tp": "2", "pp": "4", "recompute": "none", "pipeline_schedule": "1f1b", "step_time_s": "",
    "global_batch": "32",
}  # fmt: skip
MIB = 2**20


def ranks(case: str, *numbers: str) -> list[dict[str, str]]:
    return [{"case": case, "rank": rank, "max_allocated_mib": "1000", "max_reserved_mib": "1100"} for rank in numbers]


@pytest.fixture(scope="module")
def path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tables")
    write_rows(folder / "runs.csv", RUN)
    return write_rows(folder / "ranks.csv", *ranks("four stages", "0", "1", "2", "7"), *ranks("elsewhere", "0"))


@pytest.fixture(scope="module")
def check(path: Path) -> RankMemoryCheck:
    return check_rank_memory(path, discrepancy=Discrepancy(time={}, memory={"any": {"any": 0.05}}))


def test_neighbours_along_tensor_parallelism_share_a_stage(check: RankMemoryCheck) -> None:
    """Ranks 0 and 1 are the first stage's, 2 the second's, which holds fewer micro-batches; 7 is the last one's."""
    first, beside, second, last = [rank.allocated.predicted for rank in check.ranks]
    assert first == beside
    assert second < first
    assert last != second


def test_errors_are_of_each_rank_and_of_both_counters(check: RankMemoryCheck) -> None:
    result = check.to_json()
    errors = [row["peak_memory_bytes"]["predicted"] / (1000 * MIB) - 1.0 for row in result["rows"]]
    assert result["memory_mape"] == pytest.approx(sum(map(abs, errors)) / 4)
    assert result["memory_bias"] == pytest.approx(sum(errors) / 4)
    assert [row["peak_reserved_bytes"]["measured"] for row in result["rows"]] == [1100 * MIB] * 4
    assert all(row["peak_reserved_bytes"]["predicted"] >= row["peak_memory_bytes"]["predicted"] for row in result["rows"])


def test_a_run_that_no_table_beside_holds_is_named(check: RankMemoryCheck) -> None:
    result = check.to_json()
    assert (result["num_rows"], result["num_predicted"]) == (5, 4)
    (refused,) = result["not_expressible"]
    assert refused["row_id"] == "elsewhere rank 0"
    assert "exactly one row of the tables of runs" in refused["reason"]


def test_a_rank_that_the_run_does_not_have_is_refused(tmp_path: Path) -> None:
    write_rows(tmp_path / "runs.csv", RUN)
    with pytest.raises(InputError, match=r"0 <= rank < 8"):
        check_rank_memory(write_rows(tmp_path / "ranks.csv", *ranks("four stages", "8")))


def test_the_command_takes_such_a_table(path: Path) -> None:
    result = CliRunner().invoke(main, ["validate", "--table", str(path), "--json"])
    assert result.exit_code == 0
    assert json.loads(result.stdout)["num_predicted"] == 4
