"""The script on plain torch: its constants, its refusals, and that it runs."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from hardware_models.errors import InputError
from search.export import export_plan
from simulator.plan import MemoryBlock
from tests.search.export_cases import case_of
from tests.search.test_export import constant


def files(**values: Any) -> dict[str, str]:
    return dict(export_plan(case_of(model="gpt2", layers=4, **values), "pytorch").files)


@pytest.mark.parametrize(
    ("stage", "gathers", "scatters"), [(0, False, False), (1, False, False), (2, False, True), (3, True, True)]
)
def test_zero_stages_are_switches_of_fsdp(stage: int, gathers: bool, scatters: bool) -> None:
    script = files(dp=4, dp_shard=2 if stage else None, memory={"zero_stage": stage})["train_plan.py"]
    assert (constant(script, "GATHER_EACH_PASS"), constant(script, "SCATTER_EACH_MICRO_BATCH")) == (gathers, scatters)
    assert constant(script, "MESH") == {"pp": 1, "dp_replicate": 2 if stage else 4, "dp_shard": 2 if stage else 1}
    assert constant(script, "LAYERS_OF_STAGE") == [4]


def test_a_pipeline_knows_its_stages_and_its_order() -> None:
    made = files(pp=2, virtual_stages=2, schedule="zb-v", global_batch=8)
    assert constant(made["train_plan.py"], "STAGES_OF_RANK") == [[0, 3], [1, 2]]
    assert constant(made["train_plan.py"], "LAYERS_OF_STAGE") == [1, 1, 1, 1]
    assert made["pipeline_order.csv"].startswith("0F0,0F1")


@pytest.mark.parametrize(
    ("values", "told"),
    [
        ({"memory": {"block": (MemoryBlock(recompute="full"),)}}, "wraps all blocks alike"),
        ({"runtime": {"overlap_grad_reduce": False}}, "always overlaps"),
        ({"runtime": {"cuda_graphs": True}}, "captures no graph"),
        ({"tp": 2}, "tp splits layers, which only their own code can; take tp = 1"),
        ({"dp": 2, "ep": 2}, "expert parallel: False"),
    ],
)
def test_what_a_plain_script_cannot_do_is_refused(values: dict[str, Any], told: str) -> None:
    with pytest.raises(InputError, match=told):
        files(**values)


@pytest.mark.slow
@pytest.mark.parametrize(
    "values",
    [
        {"dp": 2, "memory": {"zero_stage": 2, "recompute": "full"}},
        {"pp": 2, "virtual_stages": 2, "schedule": "zb-v", "memory": {"zero_stage": 1}, "precision": {"compute": "fp32"}},
    ],
)
def test_the_script_runs_a_step_on_two_processes(values: dict[str, Any], tmp_path: Path) -> None:
    for name, text in files(global_batch=8, **values).items():
        (tmp_path / name).write_text(text)
    command = [
        sys.executable,
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node",
        "2",
        str(tmp_path / "train_plan.py"),
    ]
    done = subprocess.run(command, capture_output=True, text=True, check=False, timeout=240)
    assert done.returncode == 0, done.stderr[-2000:]
    assert "loss" in done.stdout
