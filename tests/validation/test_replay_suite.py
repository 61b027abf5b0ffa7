"""The replay suite: what is made for a device, run in a bare way, and reported with errors, order and causes."""

from __future__ import annotations

import json
import re
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.profile import DeviceProfile
from simulator.plan import Batch, Memory, Plan
from simulator.simulate import Simulation
from tests.small_models import build
from validation.bundle import BundleCase
from validation.hand_made import layers_checkpointed, layers_of
from validation.replay import replay_bundle
from validation.replay_causes import cause_of
from validation.suite_cases import SUITES, SuiteModel, _beside, _cases, suite_cases
from validation.suite_figures import write_figures
from validation.suite_report import suite_rows, suite_table, summary_of, write_results


@pytest.fixture(scope="module")
def device() -> DeviceProfile:
    """Some device that copies."""
    return load_hardware("h100-sxm").changed(kind="cpu")


@pytest.fixture(scope="module")
def cases(device: DeviceProfile) -> list[BundleCase]:
    """The suite's cases of a small model."""
    model = SuiteModel(name="mlp", model="tests.small_models:residual_mlp", batch=4)
    told: list[str] = []
    found = list(_cases(model, "fp32", device, told.append))
    assert told[0] == "mlp: tracing"
    return found


@pytest.mark.slow
def test_the_suite_has_each_technique_alone_and_together(cases: list[BundleCase]) -> None:
    names = [case.name for case in cases]
    assert {
        "mlp: plain",
        "mlp: none",
        "mlp: full",
        "mlp: activations on host",
        "mlp: weights on host",
        "mlp: optimizer on host",
    } <= set(names)
    assert [case.kind for case in cases if case.kind != "plan"] == [
        "plain",
        "checkpoint",
        "save_on_cpu",
        "checkpoint+save_on_cpu",
    ]
    searched = [case for case in cases if "searched" in case.name]
    assert searched
    assert all(
        case.predicted["peak_memory_bytes"][0] <= case.plan.memory.budget_bytes
        for case in searched
        if case.plan.memory.budget_bytes
    )


def test_every_suite_holds_all_families() -> None:
    for suite in SUITES.values():
        assert {"gpt", "llama", "vit", "fno", "resnet", "unet"} <= {
            model.name.rstrip("0123456789d").split("-")[0] for model in suite
        }


def test_an_unknown_model_of_the_suite_is_named(device: DeviceProfile) -> None:
    with pytest.raises(InputError, match="--model: name = 'bert': models of this suite are gpt, llama, vit"):
        suite_cases(device, models=("bert",))


@pytest.mark.slow
def test_a_run_suite_is_reported_with_plans_and_figures(cases: list[BundleCase], device: DeviceProfile, tmp_path: Path) -> None:
    wanted = ("mlp: plain", "mlp: full", "mlp: all on host", "mlp: checkpoint+save_on_cpu")
    chosen = [case for case in cases if case.name in wanted]
    assert replay_bundle(chosen, tmp_path / "results.zip", device="cpu", rounds=2) == 0
    rows, environment = suite_rows(chosen, tmp_path / "results.zip", device)
    summary = write_results(rows, environment, device, tmp_path / "out")
    assert (summary["num"], summary["num_predicted"], summary["num_bitwise"], summary["num_compared"]) == (4, 3, 2, 2)
    assert summary["allocated"]["max"] < 0.01
    assert all(row.slowness == 1.0 and row.paired_error == row.time_error for row in rows)  # a profile without a yardstick
    half = rows[0].measured["yardstick_s"]["median"] / 2
    (slow, *_), _ = suite_rows(chosen, tmp_path / "results.zip", replace(device, yardstick_s=half))
    assert slow.slowness == pytest.approx(2.0)
    assert 1 + slow.paired_error == pytest.approx(2 * (1 + slow.time_error))
    assert all(row.cause is not None for row in rows if row.case.kind == "plan")
    table = suite_table(rows)
    assert table.count("\n") == 6
    assert "| mlp: all on host |" in table
    assert "bitwise" in table
    assert {path.name for path in (tmp_path / "out").iterdir()} == {
        "environment.json", "instructions.json", "measured.json", "memory.md", "order.md", "plans", "predicted.json", "summary.json", "table.md",
    }  # fmt: skip
    assert len(list((tmp_path / "out" / "plans").iterdir())) == 4
    assert json.loads((tmp_path / "out" / "summary.json").read_text())["rows"][0]["name"] == "mlp: plain"
    memory = (tmp_path / "out" / "memory.md").read_text().splitlines()
    assert [line.split(" | ")[:2] for line in memory[2:]] == [
        ["| " + name, "0"] for name in ("mlp: plain", "mlp: full", "mlp: all on host")
    ]
    instructions = json.loads((tmp_path / "out" / "instructions.json").read_text())["mlp: full"]
    assert all(seconds["predicted_s"] > 0 and seconds["measured_s"] > 0 for seconds in instructions.values())
    write_figures(rows, tmp_path / "out")
    assert (tmp_path / "out" / "scatter.png").stat().st_size > 0
    assert (tmp_path / "out" / "timeline-mlp.png").stat().st_size > 0


@pytest.mark.slow
def test_an_archive_of_another_bundle_is_refused(cases: list[BundleCase], device: DeviceProfile, tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file; run the bundle"):
        suite_rows(cases, tmp_path / "none.zip", device)
    replay_bundle(cases[:1], tmp_path / "results.zip", device="cpu", rounds=1, time_limit_s=-1.0)
    rows, _ = suite_rows(cases, tmp_path / "results.zip", device)
    assert rows[0].failed == "not begun: out of time"
    assert "failed: not begun" in suite_table(rows)
    assert summary_of(rows)["num_failed"] == 1
    with pytest.raises(InputError, match="the archive's case 0 is 'mlp: plain', the bundle's 'other'"):
        suite_rows([replace(cases[0], name="other")], tmp_path / "results.zip", device)


def simulation(*rows: tuple[str, str, float, float], step_s: float, kind: str = "cpu") -> Simulation:
    """As much of a prediction as causes look at."""
    spans = tuple(
        SimpleNamespace(stream=SimpleNamespace(name=stream), name=name, start_s=start, end_s=end)
        for stream, name, start, end in rows
    )
    found: Any = SimpleNamespace(timeline=SimpleNamespace(spans=spans), step_time_s=step_s, device=SimpleNamespace(kind=kind))
    return found  # type: ignore[no-any-return]


def measured(*rows: tuple[str, str, float, float], step_s: float, host_s: float = 0.0) -> dict[str, Any]:
    return {"spans": [list(row) for row in rows], "step_time_s": {"median": step_s}, "host_time_s": {"median": host_s}}


def test_causes_by_hand() -> None:
    predicted = simulation(("COMPUTE", "F0", 0.0, 1.0), ("COMPUTE", "B0", 1.0, 3.0), step_s=3.0)
    cause = cause_of(predicted, measured(("COMPUTE", "F0", 0.0, 1.1), ("COMPUTE", "B0", 1.2, 4.0), step_s=4.0))
    assert cause is not None
    assert (cause.name, cause.instruction, cause.seconds) == ("kernel price", "B0", pytest.approx(-0.9))
    assert cause.parts_s["between instructions"] == pytest.approx(-0.1)
    assert cause.text == "kernel price -900.0 ms (B0)"
    late = simulation(("COMPUTE", "F0", 0.0, 1.0), ("H2D", "T0:load", 1.0, 2.0), ("COMPUTE", "B0", 2.0, 4.0), step_s=4.0)
    waiting = cause_of(late, measured(("COMPUTE", "F0", 0.0, 1.0), ("COMPUTE", "B0", 1.0, 3.0), step_s=3.0))
    assert waiting is not None
    assert (waiting.name, waiting.seconds, waiting.instruction) == ("overlap", pytest.approx(1.0), "")
    on_gpu = simulation(("COMPUTE", "F0", 0.0, 1.0), step_s=1.0, kind="cuda")
    dispatched = cause_of(on_gpu, measured(("COMPUTE", "F0", 0.0, 2.0), step_s=2.0, host_s=1.95))
    assert dispatched is not None
    assert dispatched.name == "dispatch"
    assert cause_of(on_gpu, {"step_time_s": {"median": 1.0}}) is None


def test_layers_are_checkpointed_and_given_back() -> None:
    module, inputs = build("transformer")
    layers = layers_of(module)
    assert [type(layer).__name__ for layer in layers] == ["AttentionLayer"] * 3
    plain = module(**inputs)
    with layers_checkpointed(module):
        assert all("forward" in layer.__dict__ for layer in layers)
        kept = module(**inputs)
        kept.backward()
    assert not any("forward" in layer.__dict__ for layer in layers)
    assert kept.shape == plain.shape
    assert all(parameter.grad is not None for parameter in module.parameters())


@pytest.mark.slow
def test_the_plans_of_a_suite_keep_their_batch(cases: list[BundleCase]) -> None:
    halves = next(case for case in cases if case.name.endswith("half the batch"))
    assert halves.plan == Plan(batch=Batch(global_batch=4, micro_batch=2), memory=Memory(recompute="full"))


@pytest.mark.slow
def test_budgets_that_nothing_fits_give_way_to_the_least_that_something_does(
    device: DeviceProfile, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("validation.suite_cases.BUDGETS", (0.9, 0.02, 0.01))
    told: list[str] = []
    model = SuiteModel(name="mlp", model="tests.small_models:residual_mlp", batch=4)
    names = [case.name for case in _cases(model, "fp32", device, told.append) if "searched" in case.name]
    assert names[0] == "mlp: searched, 90%"
    assert re.fullmatch(r"mlp: searched, \d+% \(the least that fits; 2% and 1% do not\)", names[1])
    assert len(names) == 2
    assert sum("the least budget that fits is" in line for line in told) == 2


def test_formats_and_compiled_blocks_stand_beside() -> None:
    device = load_hardware("h100-sxm")
    found = {
        case.name: case
        for name in ("bf16 alone", "fp8")
        for case in _beside(
            SuiteModel(name="mlp", model="tests.small_models:residual_mlp", batch=4), name, device, lambda _: None
        )
    }
    assert list(found) == ["mlp, bf16 alone: none", "mlp, bf16 alone: full", "mlp, fp8: none", "mlp, fp8: full"]
    narrow, wide = (
        found[f"mlp, {name}: none"].predicted["peak_memory_breakdown"]["parameters"] for name in ("bf16 alone", "fp8")
    )
    assert narrow == wide / 2
    assert found["mlp, fp8: full"].plan.memory.recompute == "full"
