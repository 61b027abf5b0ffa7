"""Real processes: gradients and memory as predicted under every kind of plan; failures end all of them with one message."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from pathlib import Path

import pytest
from click.testing import CliRunner

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, InputError, RunFailedError
from schedlab import main
from simulator.model_source import model_source
from simulator.parallel.orders import order_of
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from validation.distributed.check import check_devices, check_order, check_processes
from validation.distributed.mesh import groups_of, place_of
from validation.distributed.replay import ProcessesReplay, replay_processes

MODEL = "tests.small_models:residual_mlp"
FAILING = "tests.validation.distributed.failing_models"
TIED = "tests.validation.distributed.split_models:gpt"
ROUNDING = 1e-5


def plan_of(
    schedule: str = "1f1b", chunks: int = 1, *, pp: int = 2, dp: int = 1, memory: Memory | None = None, runtime: Runtime | None = None
) -> Plan:  # fmt: skip
    return Plan(
        parallel=Parallel(pp=pp, dp=dp, virtual_stages=chunks), batch=Batch(global_batch=4 * dp, micro_batch=1),
        pipeline=Pipeline(schedule=schedule), memory=memory or Memory(), runtime=runtime or Runtime(),
    )  # fmt: skip


def run(plan: Plan, model: str = MODEL, *, timeout_s: float = 120.0) -> ProcessesReplay:
    source = model_source(model, batch=plan.batch.global_batch if model == MODEL else None)
    return replay_processes(source, plan, load_hardware("h100-sxm"), steps=1, timeout_s=timeout_s)


def children_of(process: int | str) -> set[int]:
    """Processes that a process started and that are still there (Linux)."""
    tasks = Path(f"/proc/{process}/task").glob("*/children")
    return {int(word) for path in tasks for word in path.read_text().split()}


def children() -> set[int]:
    return children_of("self")


@pytest.mark.slow
@pytest.mark.parametrize(
    ("model", "message"), [("dies", r"rank 1 was ended by signal 9 \(SIGKILL\)"), ("hangs", r"^rank 0: |no progress for 15 s")]
)
def test_a_rank_that_fails_ends_all(model: str, message: str) -> None:
    before = children()
    with pytest.raises(RunFailedError, match=message):
        run(plan_of(), f"{FAILING}:{model}", timeout_s=15.0)
    assert children() == before


@pytest.mark.slow
def test_processes_end_with_the_one_that_started_them(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("[parallel]\npp = 2\n[batch]\nmicro_batch = 1\n")
    arguments = ["--model", f"{FAILING}:hangs", "--plan", str(path), "--hardware", "h100-sxm", "--steps", "1"]
    parent = subprocess.Popen(
        [sys.executable, "-m", "schedlab", "replay", *arguments], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL
    )
    started: set[int] = set()
    deadline = time.monotonic() + 120.0
    while len(started) < 2 and time.monotonic() < deadline:
        time.sleep(0.2)
        started = children_of(parent.pid)
    assert len(started) == 2
    parent.kill()
    parent.wait()
    deadline = time.monotonic() + 90.0
    while any(Path(f"/proc/{process}").exists() for process in started) and time.monotonic() < deadline:
        time.sleep(0.2)
    assert not any(Path(f"/proc/{process}").exists() for process in started)


@pytest.mark.slow
def test_the_command_line_says_why_and_ends_with_1(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("[parallel]\npp = 2\n[batch]\nmicro_batch = 1\n")
    result = CliRunner().invoke(
        main, ["replay", "--model", f"{FAILING}:raises", "--plan", str(path), "--hardware", "h100-sxm", "--steps", "1"]
    )
    assert result.exit_code == 1
    assert "run failed: rank 1: " in result.stderr
    assert "ArithmeticError: this rank cannot count" in result.stderr
    assert "Traceback" not in result.stderr


@pytest.mark.slow
def test_processes_that_torchrun_starts_join(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    path.write_text("[parallel]\npp = 2\n[batch]\nmicro_batch = 1\n")
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2", "-m", "schedlab", "replay"]
    arguments = ["--model", f"{FAILING}:works", "--plan", str(path), "--hardware", "h100-sxm", "--steps", "1", "--json"]
    done = subprocess.run(
        command + arguments,
        capture_output=True,
        text=True,
        check=False,
        timeout=240,
        env=os.environ | {"GLOO_SOCKET_IFNAME": "lo"},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert json.loads(done.stdout)["gradients_match"]["max_rel"] < ROUNDING


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of("chimera"), "chimera keeps each stage on two ranks"),
        (plan_of("pipedream-2bw"), "two versions of the weights"),
        (Plan(parallel=Parallel(pp=2, cp=2)), r"parallel.cp = 2: not replayed over several processes yet; leave it at 1"),
        (Plan(parallel=Parallel(pp=2), precision=Precision(compute="fp8")), "precision.compute = 'fp8'"),
        (
            Plan(parallel=Parallel(dp=2), memory=Memory(recompute="optimal", zero_stage=2)),
            "a rank runs the module as it is, whose layers all keep alike",
        ),
        (Plan(parallel=Parallel(pp=2), memory=Memory(activation_offload=0.5)), "memory.activation_offload = 0.5"),
    ],
)
def test_what_cannot_run_is_refused_by_name(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_processes(plan)


def test_a_pass_for_weights_alone_is_refused_where_parameters_are_split() -> None:
    for zero_stage in (1, 2):
        plan = plan_of("zb-h1", dp=2, memory=Memory(zero_stage=zero_stage))  # type: ignore[arg-type]
        order = order_of(plan)
        if zero_stage == 1:
            check_order(plan, order)
            continue
        with pytest.raises(
            InputError, match=r"pipeline.schedule = .zb-h1.: passes for weights' gradients find no weights under ZeRO 2 and 3"
        ):
            check_order(plan, order)


def test_a_process_needs_a_gpu_of_its_own() -> None:
    check_devices(plan_of(), on="cpu", num_devices=0, processes_here=2)
    with pytest.raises(InputError, match="a GPU of its own, but got 2 > 1"):
        check_devices(plan_of(), on="cuda", num_devices=1, processes_here=2)


def test_more_than_the_machine_has_is_infeasible_before_anything_starts() -> None:
    before = children()
    source = model_source(MODEL, batch=4)
    small = load_hardware("h100-sxm").changed(memory_bytes=1000, context_bytes=0)
    with pytest.raises(InfeasibleError, match=r"a rank needs .* of "):
        replay_processes(source, plan_of(), small)
    assert children() == before


def test_ranks_lie_in_the_plans_order() -> None:
    plan = plan_of(pp=2, dp=2)
    assert groups_of("pp", plan) == [[0, 2], [1, 3]]
    assert groups_of("dp", plan) == [[0, 1], [2, 3]]
    assert place_of(3, plan).pp == 1
    turned = Plan(parallel=Parallel(pp=2, dp=2, order="pp-dp-tp-cp-ep"))
    assert groups_of("pp", turned) == [[0, 1], [2, 3]]
