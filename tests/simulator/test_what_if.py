"""What-if: values change, predictions follow the physics, mistakes are named."""

from __future__ import annotations

import json
import tomllib
from dataclasses import replace
from pathlib import Path

import pytest
from click.testing import CliRunner

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError, UnknownNameError
from hardware_models.network.cluster_file import load_cluster
from schedlab import main
from simulator.plan import Batch, Parallel, Plan, Precision
from simulator.plan_file import write_plan
from simulator.what_if import KNOBS, Change, Prediction, Setting, effect_of, parse_change, sensitivities

PLAN = Plan(
    parallel=Parallel(tp=2, pp=2, dp=2, sequence_parallel=True), batch=Batch(global_batch=8, micro_batch=1, seq_len=512), precision=Precision(compute="bf16")
)  # fmt: skip


@pytest.fixture(scope="module")
def setting() -> Setting:
    cluster = load_cluster("dgx-a100-80gb")
    return Setting(plan=PLAN, cluster=cluster, device=load_hardware(cluster.device))


@pytest.mark.parametrize("key", sorted(KNOBS))
def test_a_factor_scales_what_the_knob_reads(setting: Setting, key: str) -> None:
    before = KNOBS[key].read(setting)
    if before <= 0.0:
        with pytest.raises(InputError, match=f"has no {key}"):
            Change(key=key, value="x2").apply(setting)
        return
    assert KNOBS[key].read(Change(key=key, value="x2").apply(setting)) == pytest.approx(2.0 * before)
    assert KNOBS[key].read(Change(key=key, value="/4").apply(setting)) == pytest.approx(before / 4.0)
    assert KNOBS[key].read(Change(key=key, value=repr(3.0 * before)).apply(setting)) == pytest.approx(3.0 * before)


def test_plan_keys_are_set_as_in_its_file(setting: Setting) -> None:
    assert parse_change("parallel.tp=4").apply(setting).plan.parallel.tp == 4
    assert parse_change("memory.recompute=full").apply(setting).plan.memory.recompute == "full"
    assert parse_change('pipeline.schedule="zb-h1"').apply(setting).plan.pipeline.schedule == "zb-h1"


@pytest.mark.parametrize(
    ("text", "kind", "message"),
    [
        ("link.nvlink.bandwidth", InputError, "KEY=VALUE is asked for"),
        ("link.nvlnk.bandwidth=x2", UnknownNameError, "known are device.flops"),
        ("device.flops=fast", InputError, "a factor"),
        ("device.flops=-3", InputError, "value > 0 must hold"),
        ("device.memory=inf", InputError, "no value changes more than 1,000,000 times either way"),
        ("device.memory=80", InputError, r"8\.\d+e\+10 would become 80; write SI units"),
        ("parallel.tpp=4", InputError, "did you mean parallel.tp"),
        ("parallel.tp=0", InputError, "tp > 0 must hold"),
    ],
)
def test_mistakes_are_named(setting: Setting, text: str, kind: type[InputError], message: str) -> None:
    with pytest.raises(kind, match=message):
        parse_change(text).apply(setting)


def _toy(setting: Setting) -> Prediction:
    """A step of one second of products and half a second of messages on the catalogued values."""
    products_s = 312e12 / KNOBS["device.flops"].read(setting)
    messages_s = 0.5 * 230e9 / KNOBS["link.nvlink.bandwidth"].read(setting)
    return Prediction(step_time_s=products_s + messages_s, bottleneck="compute" if products_s > messages_s else "tp", fits=True)


def test_sensitivities_are_ordered_by_what_they_move(setting: Setting) -> None:
    base = _toy(setting)
    pairs = sensitivities(setting, base, _toy)
    assert [better.key for better, _ in pairs][:2] == ["device.flops", "link.nvlink.bandwidth"]
    better, worse = pairs[0]
    assert better.speedup > 1.0 > worse.speedup
    halved = effect_of((parse_change("link.nvlink.bandwidth=/10"),), setting, base, _toy)
    assert halved.bottleneck == "tp"


def test_the_command_shows_physics(tmp_path: Path) -> None:
    write_plan(PLAN, tmp_path / "plan.toml")
    arguments = ["what-if", "--model", "gpt2", "--hardware", "dgx-a100-80gb", "--plan", str(tmp_path / "plan.toml")]
    arguments += [
        "--set",
        "device.flops=x2",
        "--set",
        "link.nvlink.bandwidth=x2",
        "--plot",
        str(tmp_path / "tornado.svg"),
        "--json",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 0, result.output
    found = json.loads(result.stdout)
    both = found["changed"]["speedup"]
    assert both >= max(effect["speedup"] for effect in found["changes"]) > 1.0
    effects = {(effect["key"], effect["value"]): effect["speedup"] for effect in found["sensitivities"]}
    assert effects["device.flops", "x2"] >= 1.0 >= effects["device.flops", "/2"]
    assert effects["host.dram", "x2"] == 1.0
    assert "device.flops" in (tmp_path / "tornado.svg").read_text(encoding="utf-8")


def test_a_key_that_does_not_exist_exits_with_2(tmp_path: Path) -> None:
    write_plan(replace(PLAN), tmp_path / "plan.toml")
    assert tomllib.loads((tmp_path / "plan.toml").read_text(encoding="utf-8"))["parallel"]["tp"] == 2
    arguments = [
        "what-if",
        "--model",
        "gpt2",
        "--hardware",
        "dgx-a100-80gb",
        "--plan",
        str(tmp_path / "plan.toml"),
        "--set",
        "nic=x2",
    ]
    result = CliRunner().invoke(main, arguments)
    assert result.exit_code == 2
    assert "known are device.flops" in result.stderr
