"""`search` and `what-if` over several devices for a module of one's own: what they print, write and refuse."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from schedlab import EXIT_INFEASIBLE, EXIT_INPUT, main

MODEL = "tests.command_line_models:residual_mlp"
ASKED = ("search", "--model", MODEL, "--hardware", "a40-pairs", "--gpus", "2", "--global-batch", "4")
BUDGET = "367000B"
"""Three quarters of what the fastest plan needs."""


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def as_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


@pytest.mark.slow
def test_a_searched_plan_is_written_explained_and_simulates_to_what_was_said(tmp_path: Path) -> None:
    found = as_json(*ASKED, "--memory-budget", BUDGET, "--out", str(tmp_path))
    plan, step_s = str(tmp_path / "plan.toml"), found["best"]["simulate"]["step_time_s"]
    assert found["certified"]
    assert found["refused"] == {}
    assert found["lower_bound_s"] == step_s
    assert found["best"]["plan"]["memory"]["recompute"] == "optimal"
    assert all(step_s <= one["step_time_s"] for one in found["baselines"].values() if one["fits"])
    again = as_json("simulate", "--model", MODEL, "--hardware", "a40-pairs", "--gpus", "2", "--plan", plan)
    assert again["step_time_s"] == pytest.approx(step_s, rel=1e-9)
    assert again["fits"]
    explained = json.loads((tmp_path / "explanation.json").read_text(encoding="utf-8"))
    assert set(explained) == {"ways", "limits", "sensitivities"}
    effects = as_json(
        "what-if", "--model", MODEL, "--hardware", "a40-pairs", "--plan", plan, "--set", "device.memory_bandwidth=x2"
    )
    assert effects["step_time_s"] == pytest.approx(step_s, rel=1e-9)
    assert effects["changed"]["speedup"] > 1.0


@pytest.mark.parametrize(("more", "status", "message"), [
    (("--trainer", "megatron"), EXIT_INPUT, "megatron trains transformers that it builds itself"),
    (("--sampler", "tpe"), EXIT_INPUT, "samplers are compared on models that are generated"),
    (("--allow", "fp8"), EXIT_INPUT, "known for a traced model over several devices are split-batch, tf32, bf16"),
    pytest.param(("--memory-budget", "1KiB"), EXIT_INFEASIBLE, "the least that was seen is", marks=pytest.mark.slow),
])  # fmt: skip
def test_what_cannot_be_is_refused(more: tuple[str, ...], status: int, message: str) -> None:
    refused = run(*ASKED, *more)
    assert refused.exit_code == status
    assert message in " ".join(refused.stderr.split())
