"""Exports as a whole: numbers go round, trainers' limits and keys that no trainer can be told are refused by name."""

from __future__ import annotations

import ast
import json
import re
from pathlib import Path
from typing import Any

import pytest
from click.testing import CliRunner
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.errors import InputError
from schedlab import EXIT_INPUT, main
from search.export import EXPORTERS, export_plan
from search.export_case import own_partition, resolved_plan
from search.trainers import TRAINERS, trainer_of
from simulator.plan import Plan
from tests.search.export_cases import case_of, without_seq_len

PLAN = """
[parallel]
pp = 2
dp = 2
[batch]
global_batch = 16
[memory]
zero_stage = 1
"""


def constant(script: str, name: str) -> Any:
    """The value of a constant of a Python text."""
    (found,) = [
        node.value
        for node in ast.parse(script).body
        if isinstance(node, ast.Assign) and getattr(node.targets[0], "id", "") == name
    ]
    return ast.literal_eval(found)


def sizes_of(to: str, text: str) -> tuple[int, int, int, int]:
    """GPUs per replica x 1 / (tp), global batch, micro-batch and accumulation, or replicas where a form gives these instead."""
    if to == "megatron":
        flags = dict(re.findall(r"^--(\S+) (\S+)$", text, flags=re.MULTILINE))
        return int(flags["pipeline-model-parallel-size"]), int(flags["global-batch-size"]), int(flags["micro-batch-size"]), 0
    if to == "deepspeed":
        found = json.loads(text)
        return 0, found["train_batch_size"], found["train_micro_batch_size_per_gpu"], found["gradient_accumulation_steps"]
    if to == "torchtitan":
        split, training = constant(text, "PARALLELISM"), constant(text, "TRAINING")
        replicas = split["data_parallel_replicate_degree"] * split["data_parallel_shard_degree"]
        per_turn = training["local_batch_size"] // split.get("pipeline_parallel_microbatch_size", training["local_batch_size"])
        micro = training["local_batch_size"] // per_turn
        return (
            split["pipeline_parallel_degree"],
            training["global_batch_size"],
            micro,
            training["global_batch_size"] // (micro * replicas),
        )
    mesh, micro, turns = (constant(text, name) for name in ("MESH", "MICRO_BATCH", "NUM_MICROBATCHES"))
    return mesh["pp"], micro * turns * mesh["dp_replicate"] * mesh["dp_shard"], micro, turns


@given(
    to=st.sampled_from(sorted(EXPORTERS)),
    pp=st.sampled_from((1, 2, 4)),
    dp=st.integers(1, 4),
    micro=st.integers(1, 3),
    turns=st.integers(1, 6),
)
def test_global_batch_is_micro_batch_times_accumulation_times_replicas(
    to: str, pp: int, dp: int, micro: int, turns: int
) -> None:
    stage = 1 if pp > 1 else 3
    case = case_of(pp=pp, dp=dp, micro_batch=micro, global_batch=micro * turns * dp, memory={"zero_stage": stage})
    found = sizes_of(to, export_plan(case, to).files[0][1])
    wanted = (pp, micro * turns * dp, micro, turns)
    assert all(one in (0, other) for one, other in zip(found, wanted, strict=True))
    assert f"{pp * dp} GPUs = tp 1 x cp 1 x dp {dp} x pp {pp}" in case.summary


def test_there_is_an_export_for_every_trainer_but_any() -> None:
    assert set(EXPORTERS) == set(TRAINERS) - {"any"}


@pytest.mark.parametrize("to", EXPORTERS)
@pytest.mark.parametrize(
    ("case", "key", "told"),
    [
        (case_of(runtime={"optimizer_sync": "post-validation"}, memory={"zero_stage": 3}), "runtime.optimizer_sync", "before the optimizer steps"),
        (case_of(precision={"comm": "fp8"}, memory={"zero_stage": 3}), "precision.comm", "sends gradients as they are"),
        (case_of(memory={"zero_stage": 3, "delayed_update": True}), "memory.delayed_update", "before the next one"),
        (case_of(memory={"recompute": "optimal", "zero_stage": 3}), "memory.recompute", "recomputes: none, "),
    ],
)  # fmt: skip
def test_what_no_trainer_can_be_told_is_refused(to: str, case: Any, key: str, told: str) -> None:
    with pytest.raises(InputError, match=told) as caught:
        export_plan(case, to)
    assert caught.value.key == key
    assert f"{to}: " in caught.value.rule
    assert caught.value.remedy


def test_a_partition_that_is_not_the_models_is_refused() -> None:
    with pytest.raises(InputError, match="sum of partition == layers must hold, but got 30 != 32"):
        export_plan(case_of(pp=2, partition=(15, 15), memory={"zero_stage": 1}), "megatron")


def test_the_cut_is_the_trainers_own_unless_the_plan_gives_one() -> None:
    case = case_of(pp=4, memory={"zero_stage": 1}, layers=30)
    assert own_partition(case, trainer_of("megatron")) == (7, 8, 8, 7)
    assert own_partition(case, trainer_of("torchtitan")) == (7, 8, 8, 7)
    assert own_partition(case_of(pp=4, memory={"zero_stage": 1}, layers=32), trainer_of("torchtitan")) == (8, 9, 8, 7)
    assert own_partition(case_of(pp=2, partition=(30, 2)), trainer_of("torchtitan")) == (30, 2)
    assert own_partition(case_of(), trainer_of("megatron")) is None


def test_a_prediction_for_another_framework_is_said() -> None:
    assert 'simulate it with "megatron-core"' in export_plan(case_of(), "megatron").notes[-1]
    own = case_of(runtime={"framework": "megatron-core"})
    assert not any("simulate it" in note for note in export_plan(own, "megatron").notes)


@pytest.mark.parametrize("to", ["megatron", "torchtitan"])
def test_a_trainer_that_needs_the_sequence_says_so(to: str) -> None:
    with pytest.raises(InputError, match=f"{to} needs the tokens of a sample; give it, or --model"):
        export_plan(without_seq_len(case_of()), to)


@pytest.mark.parametrize("to", ["torchtitan", "deepspeed", "pytorch"])
def test_a_trainer_that_needs_the_stages_says_so(to: str) -> None:
    with pytest.raises(InputError, match="is told which layers each stage holds; give it, or --model"):
        export_plan(case_of(pp=2, layers=None, model=None, memory={"zero_stage": 1}), to)


def test_the_global_batch_must_be_given() -> None:
    with pytest.raises(InputError, match=r"plan: batch\.global_batch: a trainer needs the samples of a step; give it"):
        resolved_plan(Plan(), seq_len=None)


@pytest.mark.parametrize("to", EXPORTERS)
def test_the_command_writes_the_files_or_prints_them(to: str, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(PLAN)
    arguments = ["export", "--plan", str(tmp_path / "plan.toml"), "--to", to, "--model", "gpt2"]
    printed = CliRunner().invoke(main, arguments)
    assert printed.exit_code == 0, printed.stderr
    written = CliRunner().invoke(main, [*arguments, "--out", str(tmp_path / "out"), "--json"])
    found = json.loads(written.stdout)
    assert found["notes"]
    for name, text in found["files"].items():
        assert (tmp_path / "out" / name).read_text() == text
        assert text.strip() in printed.stdout


@pytest.mark.parametrize(
    ("plan", "model", "told"),
    [
        (PLAN.replace("zero_stage = 1", "zero_stage = 3"), "gpt2", "zero stages pipelined: 0, 1 (DeepSpeed 0.19.8"),
        (PLAN.replace("pp = 2", "pp = 5"), "gpt2", "layers % (pp * virtual_stages) == 0 must hold"),
        (PLAN, "resnet50", "--model: name = 'resnet50': unknown name"),
        (PLAN.replace("dp = 2", "dp = 2\ntp = 5"), "gpt2", "12 % 5 = 2"),
    ],
)
def test_the_command_refuses_with_status_2(plan: str, model: str, told: str, tmp_path: Path) -> None:
    (tmp_path / "plan.toml").write_text(plan)
    result = CliRunner().invoke(main, ["export", "--plan", str(tmp_path / "plan.toml"), "--to", "deepspeed", "--model", model])
    assert result.exit_code == EXIT_INPUT
    assert told in result.stderr
