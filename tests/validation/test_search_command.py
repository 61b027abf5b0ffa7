"""The search command over several devices: JSON keys, files, messages and exit statuses."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from click.testing import CliRunner, Result

from schedlab import EXIT_INFEASIBLE, EXIT_INPUT, main

KEYS = {"best", "lower_bound_s", "gap", "certified", "space_size", "num_simulated", "elapsed_s", "baselines", "pareto"}
ASKED = ("search", "--model", "gpt2", "--seq-len", "128", "--trainer", "torchtitan")


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def test_search_over_devices_gives_the_keys_of_the_design_and_a_plan_that_simulates(tmp_path: Path) -> None:
    result = run(*ASKED, "--hardware", "a100-sxm-80gb", "--gpus", "2", "--global-batch", "2", "--out", str(tmp_path), "--json")
    assert result.exit_code == 0, result.stderr
    assert "bound" in result.stderr
    found = json.loads(result.stdout)
    assert set(found) >= KEYS
    assert found["certified"] is True
    assert all(count > 0 for count in found["refused"].values())
    assert ("plans were not looked at" in result.stderr) is bool(found["refused"])
    assert found == json.loads((tmp_path / "search.json").read_text())
    again = run("simulate", "--model", "gpt2", "--hardware", found["cluster"], "--plan", str(tmp_path / "plan.toml"), "--json")
    assert json.loads(again.stdout) == found["best"]["simulate"]
    assert (tmp_path / "timeline.png").exists()
    why = json.loads((tmp_path / "explanation.json").read_text())
    assert set(why) == {"ways", "limits", "sensitivities"}
    assert found["explanation"]["baseline"] in why["ways"]
    for way in why["ways"].values():
        assert not way or way[-1]["after_s"] == found["best"]["simulate"]["step_time_s"]
    assert {"device.flops", "link.nvlink.bandwidth"} <= {one["key"] for one in why["sensitivities"]}
    assert (tmp_path / "sensitivities.png").exists()
    assert "what its time hangs on" in result.stderr


@pytest.mark.parametrize(
    ("arguments", "status", "words"),
    [
        (("--hardware", "selene", "--gpus", "8"), EXIT_INPUT, ("--global-batch", "take a multiple of 8")),
        (("--hardware", "selene", "--gpus", "8", "--global-batch", "8", "--objective", "cost"), EXIT_INPUT, ("--objective", "--prices")),
        (("--hardware", "h100-sxm", "--workers", "2"), EXIT_INPUT, ("one device", "--gpus")),
        (("--hardware", "selene", "--gpus", "2", "--global-batch", "2", "--memory-budget", "1KiB"), EXIT_INFEASIBLE, ("1024 bytes", "the least that")),
    ],
)  # fmt: skip
def test_what_cannot_be_is_refused_with_what_would_do(arguments: tuple[str, ...], status: int, words: tuple[str, ...]) -> None:
    refused = run(*ASKED, *arguments)
    assert refused.exit_code == status
    for word in words:
        assert word in refused.stderr
