"""Bundles: plans make the round trip, and a machine with torch and numpy only runs them."""

from __future__ import annotations

import json
import subprocess
import sys
import zipfile
from dataclasses import replace
from pathlib import Path

import pytest
import torch

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.profile import CopyEngine, DeviceProfile
from simulator.model_source import model_source
from simulator.plan import Batch, Memory, MemoryBlock, Pipeline, Plan, Precision
from simulator.workload_json import workload_from_json, workload_to_json
from tests.small_models import traced
from validation.bundle import BundleCase, read_bundle, write_bundle
from validation.replay_comparison import bundle_case, memory_kept, replay, replay_case

ROOT = Path(__file__).parents[2]

BARE = """
import importlib.metadata, sys
names = {{name for name, files in importlib.metadata.packages_distributions().items()}}
class Guard:
    def find_spec(self, name, path=None, target=None):
        top = name.partition(".")[0]
        caller = sys._getframe(1)
        while caller.f_globals.get("__name__", "").startswith("importlib"):
            caller = caller.f_back
        own = caller.f_globals.get("__name__", "").partition(".")[0] in {{"__main__", "hardware_models", "simulator", "validation", "search"}}
        if top in names - {{"numpy", "torch", "hardware_models", "simulator", "validation"}} and own:
            raise ImportError(f"a bare machine has no {{name}}")
        if top in {{"search", "schedlab"}}:
            raise ImportError(f"measuring needs no {{name}}")
sys.meta_path.insert(0, Guard())
from validation.replay import main
raise SystemExit(main({arguments!r}))
"""


@pytest.fixture(scope="module")
def device() -> DeviceProfile:
    """A CPU that copies."""
    from hardware_models.catalogue import load_hardware

    engine = CopyEngine(
        to_device_bytes_per_s=1e10, to_host_bytes_per_s=1e10, latency_s=1e-5, duplex_efficiency=0.5, compute_slowdown=1.0, evidence="measured"
    )  # fmt: skip
    return load_hardware("h100-sxm").changed(copy_engine=engine)


PLAN = Plan(
    batch=Batch(micro_batch=3), memory=Memory(recompute="full", activation_offload=1.0, weight_offload=0.5, optimizer_offload=0.5),
    precision=Precision(optimizer="sgd"),
)  # fmt: skip


def small_case(device: DeviceProfile, precision: Precision = PLAN.precision) -> BundleCase:
    plan = replace(PLAN, precision=precision)
    source = model_source("tests.small_models:residual_mlp", batch=6).with_plan_batch(plan)
    return bundle_case(replay_case(plan, source, device, name="all at once"), source, device)


def test_a_bundle_is_read_as_it_was_written(device: DeviceProfile, tmp_path: Path) -> None:
    blocks = (MemoryBlock(blocks="0-1", weight_offload=0.25),)
    case = small_case(device)
    other = replace(case, plan=replace(PLAN, memory=replace(PLAN.memory, block=blocks), pipeline=Pipeline(partition=(5,))))
    for name in ("bundle.json", "bundle.json.gz"):
        write_bundle([case, other], tmp_path / name)
        found = read_bundle(tmp_path / name)
        assert [(one.plan, one.operations, one.name) for one in found] == [
            (one.plan, one.operations, one.name) for one in (case, other)
        ]
        assert found[0].predicted["step_time_s"] == case.predicted["step_time_s"]
        assert len(found[0].program["label"]) == len(found[0].program["duration_s"])


def test_what_is_no_bundle_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "bundle.json"
    with pytest.raises(InputError, match="no such file; write it with schedlab replay --bundle FILE"):
        read_bundle(path)
    path.write_text("[1")
    with pytest.raises(InputError, match="not a bundle"):
        read_bundle(path)
    path.write_text('{"format": 99}')
    with pytest.raises(InputError, match="format = 99: this version reads format 1"):
        read_bundle(path)


def test_an_unknown_kind_of_step_is_refused(device: DeviceProfile) -> None:
    with pytest.raises(InputError, match="kind = 'fast': one of plan, plain, checkpoint"):
        replace(small_case(device), kind="fast")


def test_a_model_that_needs_a_package_is_refused(device: DeviceProfile) -> None:
    source = model_source("gpt2", batch=1, seq_len=8)
    plan = source.resolve(Plan())
    from validation.replay_comparison import ReplayCase

    with pytest.raises(InputError, match="this model is built by transformers, which a bare machine does not have"):
        bundle_case(ReplayCase(name="plan", plan=plan, operations=()), source, device)


@pytest.mark.parametrize("name", ["transformer", "convolution-net"])
def test_a_workload_makes_the_round_trip(name: str) -> None:
    workload = traced(name).workload
    assert workload_from_json(json.loads(json.dumps(workload_to_json(workload)))) == workload


@pytest.mark.slow
def test_a_bare_machine_runs_a_bundle_and_goes_on_after_a_failure(device: DeviceProfile, tmp_path: Path) -> None:
    case = small_case(device)
    kinds = [replace(case, name=kind, kind=kind, operations=()) for kind in ("plain", "checkpoint+save_on_cpu")]
    broken = replace(case, name="broken", operations=case.operations[:-1])
    narrow = [
        small_case(device, precision)
        for precision in (Precision(compute="bf16", grads="bf16", master="bf16"), Precision(compute="fp8"))
    ]
    write_bundle([case, broken, *kinds, *narrow], tmp_path / "bundle.json.gz")
    arguments = [str(tmp_path / "bundle.json.gz"), "--out", str(tmp_path / "results.zip"), "--steps", "2"]
    done = subprocess.run(
        [sys.executable, "-c", BARE.format(arguments=arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
        timeout=300,
    )
    assert done.returncode == 1, done.stderr
    assert "5 of 6 cases ran" in done.stderr, done.stderr
    with zipfile.ZipFile(tmp_path / "results.zip") as archive:
        found = [json.loads(archive.read(f"case-{number:03d}.json")) for number in range(6)]
        assert workload_from_json(json.loads(archive.read("workload-000.json"))).blocks
        assert "torch" in json.loads(archive.read("environment.json"))
    assert found[0]["gradients_match"][0]["bitwise"]
    assert found[0]["allocated_bytes"] < found[2]["allocated_bytes"]
    assert found[0]["host_bytes"] > 0
    assert {"COMPUTE", "H2D", "D2H", "HOST"} == {span[0] for span in found[0]["spans"]}
    assert "ends before the backward of block 0" in found[1]["failed"]
    assert [one["step_time_s"]["num"] for one in found[2:]] == [2, 2, 2, 2]
    assert all(one["gradients_match"][0]["bitwise"] for one in found[4:])
    for one, measured in zip(narrow, found[4:], strict=True):
        assert measured["allocated_bytes"] == pytest.approx(one.predicted["peak_memory_bytes"][0], rel=0.01)


def test_a_schedule_that_the_device_cannot_hold_is_not_run(device: DeviceProfile) -> None:
    small = device.changed(memory_bytes=1_000_000)
    source = model_source("tests.small_models:residual_mlp", batch=6).with_plan_batch(PLAN)
    case = replay_case(PLAN, source, small, name="all at once")
    with pytest.raises(InfeasibleError, match=r"all at once needs .* but h100-sxm has .* less: a smaller batch.micro_batch"):
        replay(source, [case], small)


def test_running_out_of_memory_is_told_as_such(device: DeviceProfile) -> None:
    with (
        pytest.raises(InfeasibleError, match="h100-sxm ran out of memory: no room; free the device of other processes"),
        memory_kept(device),
    ):
        raise torch.OutOfMemoryError("no room\nfor anything")
