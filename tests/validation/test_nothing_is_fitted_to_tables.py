"""Published runs are for validation: nothing that predictions rest on may come from them."""

from __future__ import annotations

import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TABLES = (
    "aleph_alpha_llama_a100_layouts", "bigscience_a100_176b_tuning", "fms_fsdp_llama2", "llm_foundry_benchmarks", "megascale_table2", "megatron_bridge_performance", "megatron_paper_tables",
    "simumax_b200_megatron", "simumax_b200_memory_by_rank", "torchtitan_benchmarks", "vtrain_ground_truth", "zero_bubble_tables", "zero_bubble_stage_times",
)  # fmt: skip
NAMED = re.compile("|".join(TABLES) + r"|shared/published|validation/published|validation/results")


@pytest.mark.parametrize("folder", ["hardware_models", "simulator", "search"])
def test_nothing_before_validation_names_a_published_table(folder: str) -> None:
    files = [path for path in (ROOT / folder).rglob("*") if path.suffix in {".py", ".toml", ".csv"}]
    assert len(files) > 5
    assert [str(path.relative_to(ROOT)) for path in files if NAMED.search(path.read_text(encoding="utf-8"))] == []


def test_calibration_files_cite_no_ground_truth_of_whole_runs() -> None:
    sources = re.compile(
        r"ground_truth_(single|multi)|NeurIPS-WANT|b200_release|torchtitan benchmarks/|llm-foundry scripts/train/benchmarking|performance-summary"
    )
    files = [path for path in (ROOT / "hardware_models" / "data").rglob("*") if path.suffix in {".toml", ".csv"}]
    assert files
    assert [str(path.relative_to(ROOT)) for path in files if sources.search(path.read_text(encoding="utf-8"))] == []
