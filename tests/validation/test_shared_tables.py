"""Whole tables of published runs that come beside the project, where they are there: none of their rows is lost."""

from __future__ import annotations

from pathlib import Path

import pytest

from validation.table_check import check_table

TABLES = Path(__file__).parents[3] / "shared" / "published"


@pytest.mark.slow
@pytest.mark.parametrize(
    ("name", "expressed", "most"), [("simumax_b200_megatron", 5, 0.2), ("llm_foundry_benchmarks", 85, 0.12)]
)
def test_a_table_is_predicted_whole(name: str, expressed: int, most: float) -> None:
    path = TABLES / f"{name}.csv"
    if not path.is_file():
        pytest.skip(f"{name}: no folder of published tables beside the project")
    check = check_table(path)
    assert len(check.rows) + len(check.not_expressible) == check.num_rows
    assert len(check.rows) == expressed
    assert check.time_errors is not None
    assert check.time_errors.mape < most
