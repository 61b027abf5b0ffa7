"""What a model's name means, and the workloads that it gives."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError, UnknownNameError
from simulator.model_source import DEFAULT_BATCH, model_source
from simulator.models import MODELS
from simulator.plan import Batch, Parallel, Plan, Precision
from simulator.presets import PRESETS
from tests.small_models import BATCH, WIDTH

OURS = "tests.small_models:residual_mlp"


def test_an_unknown_name_lists_the_known() -> None:
    with pytest.raises(UnknownNameError) as caught:
        model_source("gpt5")
    message = str(caught.value)
    assert message.startswith("--model: name = 'gpt5': unknown name; known are ")
    assert message.endswith("; or give a config.json, package.module:function or FILE.py:function")
    listed = message.partition("known are ")[2].partition("; or")[0].split(", ")
    assert listed == sorted({*PRESETS, *MODELS})


def test_a_function_of_the_users_is_traced_at_any_micro_batch() -> None:
    source = model_source(OURS)
    assert source.config is None
    assert source.global_batch == BATCH
    assert source.workload(2).micro_batch == 2
    assert source.workload(2) is source.workload(2)
    assert source.traced(2).workload is source.workload(2)
    assert source.workload(1) is not source.workload(2)
    assert source.workload(2).parameter_elements == source.workload(1).parameter_elements


def test_the_batch_can_be_another() -> None:
    source = model_source(OURS, batch=12)
    assert source.global_batch == 12
    assert source.workload(12).batch_bytes == 12 * WIDTH * WIDTH * 4


def test_more_samples_than_the_example_holds_are_refused() -> None:
    with pytest.raises(InputError, match=r"micro_batch = 99: the example inputs hold 6 samples"):
        model_source(OURS).workload(99)


def test_presets_are_generated_for_gpus_and_traced_for_a_cpu() -> None:
    gpu = load_hardware("h100-sxm")
    both = sorted({*PRESETS} & {*MODELS})
    assert both, "some names are both"
    assert model_source(both[0], device=gpu).config is not None
    assert model_source(both[0], device=gpu.changed(kind="cpu")).config is None
    assert model_source(both[0]).config is None
    generated = sorted({*PRESETS} - {*MODELS})
    assert model_source(generated[0]).config is not None
    assert model_source(generated[0]).global_batch == DEFAULT_BATCH
    assert model_source("resnet18").global_batch == MODELS["resnet18"].batch


def gpt2_file(folder: Path, **changes: object) -> str:
    config = {
        "model_type": "gpt2", "n_layer": 2, "n_embd": 64, "n_head": 4, "vocab_size": 97, "n_positions": 32, **changes,
    }  # fmt: skip
    (folder / "config.json").write_text(json.dumps(config), encoding="utf-8")
    return str(folder / "config.json")


def test_a_configuration_file_is_generated(tmp_path: Path) -> None:
    source = model_source(gpt2_file(tmp_path), seq_len=16)
    workload = source.workload(2)
    assert workload.micro_batch == 2
    assert workload.tokens == 2 * 16
    assert source.workload(2) is workload
    assert model_source(gpt2_file(tmp_path)).workload(1).tokens == 32, "all positions"


def test_a_file_of_another_kind_is_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="never-heard-of"):
        model_source(gpt2_file(tmp_path, model_type="never-heard-of"))
    with pytest.raises(InputError, match=r"none\.json"):
        model_source(str(tmp_path / "none.json"))


def test_a_plan_gets_the_models_batch(tmp_path: Path) -> None:
    plan = model_source(OURS).resolve(Plan(batch=Batch(micro_batch=2)))
    assert (plan.batch.global_batch, plan.batch.micro_batch, plan.num_microbatches) == (BATCH, 2, 3)
    plan = model_source(gpt2_file(tmp_path), batch=4, seq_len=8).resolve(Plan())
    assert (plan.batch.global_batch, plan.batch.micro_batch, plan.batch.seq_len) == (4, 4, 8)


def test_a_plan_that_the_model_or_one_device_cannot_do_is_refused(tmp_path: Path) -> None:
    source = model_source(gpt2_file(tmp_path))
    with pytest.raises(InputError, match=r"parallel.tp = 3: tp that does not divide heads: 4 % 3 = 1"):
        source.resolve(Plan(parallel=Parallel(tp=3)))
    with pytest.raises(InputError, match=r"parallel.tp = 2: not simulated yet on a single device; leave it at 1"):
        source.resolve(Plan(parallel=Parallel(tp=2)))
    with pytest.raises(InputError, match=r"precision.compute = 'fp4': not simulated yet on a single device; leave it at fp32"):
        model_source(OURS).resolve(Plan(precision=Precision(compute="fp4")))


def test_a_model_at_a_plans_batch(tmp_path: Path) -> None:
    source = model_source(gpt2_file(tmp_path), seq_len=16)
    first = source.workload(1)
    other = source.with_plan_batch(Plan(batch=Batch(global_batch=4, seq_len=8)))
    assert (other.batch, other.seq_len) == (4, 8)
    assert other.workload(1).tokens == 8
    assert source.workload(1) is first, "each keeps its own workloads"
    assert source.with_plan_batch(Plan()) is source
    assert replace(source).name == source.name
