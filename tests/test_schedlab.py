"""The command line: JSON keys, exit statuses and the messages for what a user can get wrong."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner, Result

from hardware_models.catalogue import load_hardware, this_profile_path
from hardware_models.profile_file import load_profile
from schedlab import EXIT_INFEASIBLE, EXIT_INPUT, main

GPU = "h100-sxm"
MODEL = "tests.command_line_models:residual_mlp"
SIMULATE_KEYS = {
    "step_time_s", "step_time_interval_s", "tokens_per_s_per_gpu", "model_flops_per_s_per_gpu", "mfu", "hfu", "peak_memory_bytes",
    "peak_reserved_bytes", "peak_host_bytes", "peak_memory_breakdown", "fits", "time_breakdown_s", "bottleneck", "num_events", "evidence",
}  # fmt: skip
TIME_CLASSES = {"compute", "recompute", "bubble", "tp", "cp", "ep", "pp", "dp", "offload", "optimizer", "host"}
COMMANDS = [
    "calibrate",
    "export",
    "hardware",
    "models",
    "pipeline",
    "replay",
    "search",
    "simulate",
    "trace",
    "validate",
    "what-if",
]


def run(*arguments: str) -> Result:
    return CliRunner().invoke(main, arguments)


def as_json(*arguments: str) -> Any:
    result = run(*arguments, "--json")
    assert result.exit_code == 0, result.stderr
    return json.loads(result.stdout)


def plan_file(folder: Path, text: str) -> str:
    path = folder / "plan.toml"
    path.write_text(text)
    return str(path)


def test_the_commands_are_those_that_work() -> None:
    assert sorted(main.commands) == COMMANDS


def test_models_and_hardware_list_what_is_known() -> None:
    assert {"gpt2", "resnet50", "fno2d-plain", "gpt3-175b"} <= set(as_json("models")["models"])
    assert all(entry["provenance"] for entry in as_json("hardware")["hardware"].values())


def test_trace_counts_blocks_and_saved_bytes() -> None:
    found = as_json("trace", MODEL)
    assert found["parameters"] > 0
    assert len(found["blocks"]) > 1
    options = found["blocks"][1]["options"]
    assert options[0]["saved_bytes"] == sum(tensor["bytes"] for tensor in options[0]["saved"])


def test_simulate_gives_the_keys_of_the_design(tmp_path: Path) -> None:
    trace, plot = tmp_path / "trace.json", tmp_path / "plot.png"
    found = as_json("simulate", "--model", MODEL, "--hardware", GPU, "--trace", str(trace), "--plot", str(plot))
    assert set(found) == SIMULATE_KEYS
    assert set(found["time_breakdown_s"]) == TIME_CLASSES
    assert sum(found["time_breakdown_s"].values()) == pytest.approx(found["step_time_s"], rel=1e-9)
    assert sum(found["peak_memory_breakdown"].values()) == found["peak_memory_bytes"][0]
    assert json.loads(trace.read_text())
    assert plot.exists()
    assert plot.with_stem("plot-memory").exists()


def test_a_preset_needs_no_torch_module() -> None:
    found = as_json("simulate", "--model", "llama3-8b", "--hardware", GPU, "--seq-len", "512")
    assert found["fits"] is False
    assert found["hfu"] == pytest.approx(found["mfu"])


def test_search_gives_the_keys_of_the_design_and_a_plan_that_simulates(tmp_path: Path) -> None:
    found = as_json("search", "--model", MODEL, "--hardware", GPU, "--out", str(tmp_path))
    assert {
        "best",
        "lower_bound_s",
        "gap",
        "certified",
        "space_size",
        "num_simulated",
        "elapsed_s",
        "baselines",
        "pareto",
    } <= set(found)
    assert found["certified"] is (found["gap"] <= 1e-9)
    assert 0 <= found["gap"] < 1
    assert set(found["best"]["simulate"]) == SIMULATE_KEYS
    again = as_json("simulate", "--model", MODEL, "--hardware", GPU, "--plan", str(tmp_path / "plan.toml"))
    assert again == found["best"]["simulate"]


def test_search_under_a_budget_and_the_least_budget(tmp_path: Path) -> None:
    asked = "search", "--model", MODEL, "--global-batch", "2", "--hardware", GPU, "--memory-budget"
    refused = run(*asked, "1KiB")
    assert refused.exit_code == EXIT_INFEASIBLE
    assert "a memory budget of 1024 bytes" in refused.stderr
    least = refused.stderr.rsplit("the least budget that fits is ", 1)[1].split(" bytes", 1)[0]
    found = as_json(*asked, least, "--out", str(tmp_path))
    assert found["best"]["simulate"]["peak_memory_bytes"][0] <= int(least)
    assert found["best"]["simulate"]["fits"]


def test_replay_gives_the_keys_of_the_design(tmp_path: Path) -> None:
    plan = plan_file(tmp_path, '[memory]\nrecompute = "full"\n')
    trace = tmp_path / "trace.json"
    found = as_json("replay", "--model", MODEL, "--plan", plan, "--hardware", GPU, "--steps", "2", "--trace", str(trace))
    assert {"predicted", "measured", "time_error", "memory_error", "gradients_match", "plan"} <= set(found)
    assert found["gradients_match"]["reference"] == "same micro-batches"
    assert found["gradients_match"]["bitwise"] is True
    assert set(found["measured"]["step_time_s"]) == {"median", "p10", "p90", "num"}
    assert abs(found["memory_error"]) < 0.01
    assert json.loads(trace.read_text())


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        (("simulate", "--model", "gtp2", "--hardware", GPU), ("--model", "'gtp2'", "known are", "gpt2", "package.module:function")),
        (("simulate", "--model", "gpt2", "--hardware", "h100"), ("--hardware", "'h100'", "known are", GPU)),
        (("simulate", "--model", "gpt2", "--hardware", "selenee"), ("--hardware", "'selenee'", GPU, "hgx-h200", "did you mean 'selene'?")),
        (("trace", "tests.command_line_models:nothing"), ("cannot be imported", "nothing")),
        (("search", "--model", MODEL, "--hardware", GPU, "--memory-budget", "12 parsecs"), ("--memory-budget", "12 parsecs", "40GiB")),
        (("search", "--model", MODEL, "--hardware", GPU, "--allow", "bf16, fp9"), ("--allow = 'fp9'", "split-batch")),
        (("search", "--model", MODEL, "--hardware", GPU, "--memory-budget", "0GB"), ("--memory-budget = '0GB'", "0 < size")),
        (("search", "--model", MODEL, "--hardware", GPU, "--time-limit", "nan"), ("--time-limit", "seconds > 0")),
        (("search", "--model", MODEL, "--hardware", GPU, "--out", "/dev/null/out"), ("/dev/null/out", "cannot be written")),
        (("simulate", "--model", MODEL, "--hardware", GPU, "--trace", "."), ("cannot be written: Is a directory",)),
        (("export", "--plan", "/dev/null", "--to", "pytorch", "--out", "/dev/null/out"), ("/dev/null: batch.global_batch", "give it")),
        (("what-if", "--model", MODEL, "--hardware", "/dev/null/profile"), ("--hardware", "known are")),
        (("trace", "no_such_file.py:star:f"), ("no_such_file.py:star:f",)),
    ],
)  # fmt: skip
def test_unknown_names_are_refused_with_what_would_do(arguments: tuple[str, ...], words: tuple[str, ...]) -> None:
    refused = run(*arguments)
    assert refused.exit_code == EXIT_INPUT
    for word in words:
        assert word in refused.stderr


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ('[memory]\nrecompte = "full"\n', ("plan.toml", "recompte", "recompute")),
        ("[parallel]\ntp = 5\n", ("plan.toml: parallel.tp", "does not divide heads", "32 % 5")),
        ("[batch]\nglobal_batch = 5\nmicro_batch = 2\n", ("global_batch", "5 % (1*2)")),
        ('[memory]\nrecompute = "file:gone.seq"\n', ("memory.recompute", "no such file", "gone.seq")),
        ("[serving]\n", ("serving", "not yet")),
        ("[memory\n", ("plan.toml", "line 1")),
        ("[parallel]\ntp = 8\n", ("parallel.tp", "not simulated yet")),
    ],
)  # fmt: skip
def test_plans_that_break_a_rule_are_refused(tmp_path: Path, text: str, words: tuple[str, ...]) -> None:
    refused = run(
        "simulate", "--model", "llama3-8b", "--hardware", GPU, "--seq-len", "512", "--plan", plan_file(tmp_path, text)
    )
    assert refused.exit_code == EXIT_INPUT, refused.stderr
    for word in words:
        assert word in refused.stderr


def test_a_trace_that_fails_names_operator_and_line() -> None:
    refused = run("trace", "tests.command_line_models:branching")
    assert refused.exit_code == EXIT_INPUT
    for word in ("cannot be traced", "_local_scalar_dense", "command_line_models.py:"):
        assert word in refused.stderr


def test_a_truncated_profile_names_file_and_key(tmp_path: Path) -> None:
    source = Path(load_profile.__code__.co_filename).parent / "data" / GPU
    folder = tmp_path / "broken"
    shutil.copytree(source, folder)
    text = (folder / "device.toml").read_text()
    (folder / "device.toml").write_text(text[: len(text) // 2])
    refused = run("simulate", "--model", "llama3-8b", "--hardware", str(folder))
    assert refused.exit_code == EXIT_INPUT
    assert "device.toml" in refused.stderr


def test_this_machine_has_a_place_for_its_profile(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEDLAB_CACHE", str(tmp_path))
    assert tmp_path in this_profile_path("cpu").parents
    with pytest.raises(ValueError, match="schedlab calibrate"):
        load_hardware("this")


@pytest.mark.slow
def test_a_module_of_ones_own_is_simulated_over_a_cluster(tmp_path: Path) -> None:
    batch = "[batch]\nglobal_batch = 8\nmicro_batch = 1\n"
    steps = {}
    for name, degrees in {"one": "pp = 2", "four": "pp = 2\ndp = 2"}.items():
        plan = plan_file(tmp_path, f"[parallel]\n{degrees}\n{batch}")
        steps[name] = as_json("simulate", "--model", MODEL, "--hardware", "selene", "--plan", plan)
        assert set(steps[name]) == SIMULATE_KEYS
        assert steps[name]["step_time_s"] == pytest.approx(sum(steps[name]["time_breakdown_s"].values()))
        assert len(steps[name]["peak_memory_bytes"]) == 2
    assert steps["four"]["time_breakdown_s"]["dp"] > 0.0 == steps["one"]["time_breakdown_s"]["dp"]
    plan = plan_file(tmp_path, f"[parallel]\ntp = 2\n{batch}")
    refused = run("simulate", "--model", MODEL, "--hardware", "selene", "--plan", plan)
    assert refused.exit_code == EXIT_INPUT
    assert "parallel.tp = 2: a traced model is cut over pp and dp only" in refused.stderr
