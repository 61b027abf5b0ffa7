"""Rows for tests of published tables."""

from __future__ import annotations

import csv
from pathlib import Path

from hardware_models.csv_table import Cells
from validation.published_row import PublishedRow

GPT_22B = {
    "row_id": "t:1", "framework": "Megatron-LM 2022", "model": "GPT-22B", "n_layers": "48", "hidden": "6144", "n_heads": "64", "n_kv_heads": "64", "ffn": "24576", "seq_len": "2048",
    "vocab": "51200", "gpu": "A100-SXM", "gpu_mem_gb": "80", "n_gpus": "8", "gpus_per_node": "8", "interconnect": "Selene DGX A100: NVLink/NVSwitch + 8x200 Gb/s HDR IB per node",
    "tp": "8", "pp": "1", "virtual_pp": "1", "dp": "1", "cp": "1", "ep": "1", "seq_parallel": "yes", "zero_or_fsdp": "none", "zero_stage": "0", "micro_batch": "4", "global_batch": "4",
    "recompute": "selective", "offload": "none", "precision": "fp16", "pipeline_schedule": "none", "flash_attention": "no", "step_time_s": "1.10", "status": "ok",
}  # fmt: skip
"""Korthikanti et al. 2022 (arXiv 2205.05198), table 5: 22B with sequence parallelism and selective recompute."""


def row_of(**changes: str) -> PublishedRow:
    values = GPT_22B | changes
    return PublishedRow(cells=Cells(path=Path("t.csv"), line=2, values=values), row_id=values["row_id"])


def write_rows(path: Path, *rows: dict[str, str]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", encoding="utf-8", newline="") as stream:
        writer = csv.DictWriter(stream, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path
