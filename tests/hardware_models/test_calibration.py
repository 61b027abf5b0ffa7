"""Measuring and fitting end to end on a tiny grid."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from hardware_models.calibration import calibrate, fit_profile
from hardware_models.errors import InputError
from hardware_models.microbench_cases import Case
from hardware_models.pricing import price


@pytest.fixture(scope="module")
def raw_path(tmp_path_factory: pytest.TempPathFactory) -> Path:
    from hardware_models.microbench import measure
    from hardware_models.microbench_cases import heavy_cases
    from hardware_models.microbench_light import light_cases

    path = tmp_path_factory.mktemp("raw") / "raw.json"
    cases = [case for case in heavy_cases("float32", full=False) if case.kernel_class == "gemm" and case.flops < 10**7]
    cases += [
        case for case in light_cases("float32", full=False) if case.op in {"add", "cat", "adamw"} and case.shape[0] < 2**18
    ]
    told: list[float] = []
    measure(
        path, quick=True, cases=cases, time_limit_s=6.0, num_rounds=3, pool_bytes=2**25, progress=lambda _what, fraction: told.append(fraction)
    )  # fmt: skip
    assert told == sorted(told)
    assert all(0 <= fraction <= 1 for fraction in told)
    return path


def test_raw_file_holds_samples_and_environment(raw_path: Path) -> None:
    raw = json.loads(raw_path.read_text())
    assert raw["complete"]
    assert raw["environment"]["torch"]
    assert raw["host"]["dispatch"]["forward_s"] > 0
    assert [len(samples) for samples in raw["yardstick_s"]] == [3] * len(raw["results"][::25])
    assert 0.0 < raw["host"]["checkpoint_policy"]["operator_s"] < 1e-2
    row = next(row for row in raw["results"] if row["op"] == "add")
    assert (row["read_bytes"], row["written_bytes"]) == (8 * row["shape"][0], 4 * row["shape"][0])
    assert all(sample > 0 for row in raw["results"] for sample in row["samples_s"])


def test_fitted_profile_prices_what_was_measured(raw_path: Path, tmp_path: Path) -> None:
    raw = json.loads(raw_path.read_text())
    profile = fit_profile(raw, tmp_path)
    assert profile.kind == "cpu"
    marks = sorted(sample for samples in raw["yardstick_s"] for sample in samples)
    assert marks[0] <= profile.yardstick_s <= marks[-1]
    assert profile.checkpoint_policy_s == raw["host"]["checkpoint_policy"]["operator_s"]
    assert {curve.group for curve in profile.curves} >= {"mm", "addmm", "add", "cat", "adamw"}
    assert (tmp_path / "provenance.toml").exists()
    from hardware_models.kernel import Kernel

    row = max((row for row in raw["results"] if row["op"] == "mm"), key=lambda row: row["flops"])
    kernel = Kernel(
        kernel_class="gemm", op="mm", shape=tuple(row["shape"]), dtype="float32", flops=row["flops"], read_bytes=row["read_bytes"],
        written_bytes=row["written_bytes"],
    )  # fmt: skip
    predicted = price([kernel], profile)[0]
    assert min(row["samples_s"]) / 3 < predicted < 3 * max(row["samples_s"])


def test_measuring_goes_on_where_it_stopped(raw_path: Path) -> None:
    from hardware_models.microbench import load_previous
    from hardware_models.microbench_light import light_cases

    cases = [case for case in light_cases("float32", full=False) if case.op == "cat" and case.shape[0] < 2**18]
    assert all(one.samples_s for one in load_previous(raw_path, cases))
    assert not any(one.samples_s for one in load_previous(raw_path, cases, device="cuda"))


def test_a_resumed_run_has_a_yardstick(raw_path: Path, tmp_path: Path) -> None:
    from hardware_models.microbench import previous_yardstick, time_missing_yardstick

    raw = json.loads(raw_path.read_text())
    places = len(raw["yardstick_s"])
    assert previous_yardstick(raw_path, places) == raw["yardstick_s"]
    assert previous_yardstick(raw_path, places + 1) == [[]] * (places + 1)
    kept = previous_yardstick(raw_path, places)
    time_missing_yardstick(kept, 2)
    assert kept == raw["yardstick_s"]
    older = tmp_path / "raw.json"
    older.write_text(json.dumps({key: value for key, value in raw.items() if key != "yardstick_s"}))
    found = previous_yardstick(older, places)
    time_missing_yardstick(found, 2)
    assert [len(samples) for samples in found] == [2] + [0] * (places - 1)
    assert fit_profile(raw | {"yardstick_s": found}, tmp_path / "profile").yardstick_s > 0


def test_too_little_is_refused(raw_path: Path, tmp_path: Path) -> None:
    raw = json.loads(raw_path.read_text())
    raw["results"] = [row for row in raw["results"] if row["kernel_class"] != "gemm"]
    with pytest.raises(InputError, match="no product was timed often enough"):
        fit_profile(raw, tmp_path)


def test_a_machine_without_a_gpu_says_so(tmp_path: Path) -> None:
    import torch

    if torch.cuda.is_available():
        pytest.skip("there is one")
    with pytest.raises(
        InputError, match=r"--device: device = 'cuda': torch .* finds no GPU; install a build of torch for CUDA"
    ):
        calibrate(tmp_path, device="cuda")
    assert not (tmp_path / "device.toml").exists()


def test_microbench_runs_from_a_bare_folder(tmp_path: Path) -> None:
    """The package copied alone, no library beside torch and numpy: it starts, and says what it lacks."""
    root = Path(__file__).parents[2]
    shutil.copytree(
        root / "hardware_models", tmp_path / "hardware_models", ignore=shutil.ignore_patterns("__pycache__", "data")
    )
    code = (
        "import runpy, sys\n"
        "for name in ('pydantic', 'tomli_w', 'platformdirs', 'rich', 'click', 'simpy', 'optuna', 'matplotlib', 'numba', 'scipy'):\n"
        "    sys.modules[name] = None\n"
        "runpy.run_module('hardware_models.microbench', run_name='__main__', alter_sys=True)\n"
    )
    command = [sys.executable, "-c", code, "--out", str(tmp_path), "--device", "cuda"]
    environment = {name: value for name, value in os.environ.items() if name != "PYTHONPATH"} | {"CUDA_VISIBLE_DEVICES": ""}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 2, done.stderr
    assert "finds no GPU" in done.stderr


def test_the_commands_measure_and_fit(
    raw_path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """On the grid of the tests; `tests/notebooks` measures the whole of a quick one."""
    from hardware_models import calibration, microbench
    from hardware_models.microbench_light import light_cases

    asked: list[tuple[str, bool]] = []

    def few(dtype: str, *, full: bool) -> list[Case]:
        asked.append((dtype, full))
        return [case for case in light_cases(dtype, full=False) if case.op == "add" and case.shape[0] < 2**16]

    monkeypatch.setattr(microbench, "heavy_cases", lambda _dtype, **_: [])
    monkeypatch.setattr(microbench, "light_cases", few)
    monkeypatch.setattr(microbench, "_TIME_LIMIT_S", {True: 0.5})
    monkeypatch.setattr(microbench, "_ROUNDS", {True: 3})
    monkeypatch.setattr(microbench, "cpu_copy_timings", lambda **_: json.loads(raw_path.read_text())["host"]["copies"])
    assert microbench.main(["--out", str(tmp_path), "--device", "cpu", "--quick"]) == 0
    raw = json.loads((tmp_path / "raw.json").read_text())
    assert asked == [("float32", False)]
    assert (raw["complete"], raw["quick"]) == (True, True)
    assert f"{len(raw['results'])} kernels, noise" in capsys.readouterr().err
    assert calibration.main(["--raw", str(raw_path), "--out", str(tmp_path / "profile")]) == 0
    assert (tmp_path / "profile" / "device.toml").exists()
    assert calibration.main(["--raw", str(tmp_path / "gone.json"), "--out", str(tmp_path / "other")]) == 2
