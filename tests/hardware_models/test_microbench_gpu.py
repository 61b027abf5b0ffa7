"""The order of a GPU's measurements, run on a machine whose tensors are on the CPU: sections, resuming, failures, warnings."""

from __future__ import annotations

import json
import re
import time
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest
import torch

from hardware_models import microbench, microbench_gpu, microbench_modes, microbench_samples
from hardware_models.calibration import fit_profile, read_raw
from hardware_models.errors import InputError
from hardware_models.microbench_cases import Call, Case, Pool
from hardware_models.microbench_environment import environment
from hardware_models.microbench_gpu import Machine, Pools, measure_gpu, warnings_of
from hardware_models.microbench_gpu_heavy import GridSize, _attention
from hardware_models.microbench_gpu_light import gpu_cases
from hardware_models.microbench_modes import chain_timings, compiled_dispatch, dispatch_by_operator
from hardware_models.microbench_samples import Measured, precision_of, sample
from hardware_models.microbench_timing import Stopwatch

QUIET: dict[str, Any] = {"noise": 0.01, "environment": {}, "host": {}, "failed": {}}


class FakeMonitor:
    """A driver that reports a power cap."""

    def between(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """As `GpuMonitor.between`."""
        return {"num": 3, "clocks.sm": 1500.0, "reasons": ["sw_power_cap"], "window_s": end_s - begin_s}


def machine(counts: dict[str, int], *, recover: Callable[[], None] = lambda: None) -> Machine:
    def counted(name: str, answer: Any) -> Callable[[Callable[[float], None], float], Any]:
        def run(_tell: Callable[[float], None], _end_s: float) -> Any:
            counts[name] = counts.get(name, 0) + 1
            return answer

        return run

    launch = {"stream_kernel_s": 2e-6, "graph_kernel_s": 1e-6, "graph_replay_s": 4e-4, "num_kernels": 200, "isolated_s": 3e-6}
    return Machine(
        device="cpu", main="float32", others=(), stopwatch=Stopwatch("cpu"), environment=lambda: environment("cpu"), free_bytes=lambda: 2**29,
        recover=recover, monitor=lambda: nullcontext(FakeMonitor()), sections={"launch": counted("launch", launch), "copies": counted("copies", [])},
    )  # fmt: skip


def small_grid(size: GridSize) -> list[Case]:
    kept = {"mm", "add", "native_layer_norm", "_to_copy"}
    fine = GridSize(full=True, main=size.main, others=size.others)
    return [one for one in gpu_cases(fine) if one.op in kept and one.work_bytes < 2**22 and one.flops < 10**8]


@pytest.fixture(autouse=True)
def _fast(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbench_gpu, "PROBE_SHAPE", (128, 128, 128))
    monkeypatch.setattr(microbench_gpu, "_STORE_EVERY_S", 0.0)
    monkeypatch.setattr(microbench_gpu, "_COPY_PROBE_BYTES", 2**22)
    monkeypatch.setattr(microbench_modes, "_SAMPLES", 3)
    monkeypatch.setattr(microbench_modes, "_CALLS", 24)
    monkeypatch.setattr(microbench_gpu, "_LOAD_S", {True: 0.01, False: 0.01})
    monkeypatch.setattr(microbench_gpu, "host_memory", lambda: {"copy_bytes_per_s": 1e10})


def run(path: Path, counts: dict[str, int], **values: Any) -> dict[str, Any]:
    arguments: dict[str, Any] = {
        "quick": True,
        "progress": lambda _what, _fraction: None,
        "time_limit_s": 5.0,
        "grid": small_grid,
    }
    return measure_gpu(path, machine(counts), **(arguments | values))


def test_all_sections_end_in_one_file_that_can_be_fitted(tmp_path: Path) -> None:
    counts: dict[str, int] = {}
    told: list[float] = []
    begin = time.perf_counter()
    raw = run(tmp_path / "raw.json", counts, progress=lambda _what, fraction: told.append(fraction))
    assert time.perf_counter() - begin < 12.0
    assert told == sorted(told)
    assert told[-1] <= 1.0
    assert json.loads((tmp_path / "raw.json").read_text()) == raw
    assert {"dispatch", "operators", "host_memory", "launch", "copies", "sustained_kernels"} <= set(raw["host"])
    assert counts == {"launch": 1, "copies": 1}
    assert raw["complete"]
    assert len(raw["results"]) > 30
    assert not raw["failed"]
    profile = fit_profile(read_raw(tmp_path / "raw.json"), tmp_path)
    assert {curve.group for curve in profile.curves} == {"mm", "add", "native_layer_norm", "_to_copy"}
    assert profile.launch_s == 2e-6


@pytest.mark.slow
def test_a_killed_run_goes_on_where_it_stopped(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path, counts = tmp_path / "raw.json", {}
    taken = [0]

    def killed(measured: Measured, pool: Pool, stopwatch: Stopwatch) -> None:
        taken[0] += 1
        if taken[0] > 60:
            raise KeyboardInterrupt
        sample(measured, pool, stopwatch)

    monkeypatch.setattr(microbench_gpu, "sample", killed)
    with pytest.raises(KeyboardInterrupt):
        run(path, counts)
    before = json.loads(path.read_text())
    assert not before["complete"]
    assert len(before["results"]) >= 18
    fit_profile(before, tmp_path / "partial")
    monkeypatch.setattr(microbench_gpu, "sample", sample)
    after = run(path, counts)
    assert counts == {"launch": 1, "copies": 1}
    assert after["limits"] == before["limits"]
    key = lambda row: (row["op"], row.get("variant"), *row["shape"])  # noqa: E731 - two lines below
    kept = {key(row): row["samples_s"] for row in after["results"]}
    assert all(kept[key(row)][: len(row["samples_s"])] == row["samples_s"] for row in before["results"])
    assert after["complete"]


def test_a_finished_file_is_begun_anew(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    counts: dict[str, int] = {}
    for _ in range(2):
        run(tmp_path / "raw.json", counts, time_limit_s=0.5)
    assert counts == {"launch": 2, "copies": 2}
    assert "starting anew" in capsys.readouterr().err


def lacking(op: str) -> Case:
    def build(_pool: Pool) -> Call:
        message = "no kernel image is available\nmore"
        raise RuntimeError(message)

    return Case(kernel_class="fft", op=op, shape=(8,), dtype="float32", flops=0, build=build)


@pytest.mark.slow
def test_an_operator_that_is_missing_is_named_and_the_rest_measured(tmp_path: Path) -> None:
    raw = run(tmp_path / "raw.json", {}, grid=lambda size: [lacking("gone"), *small_grid(size)])
    assert raw["failed"] == {"fft/gone/float32/8": "no kernel image is available"}
    assert any("1 measurements failed" in message and "fft/gone" in message for message in raw["warnings"])
    assert len(raw["results"]) > 30


@pytest.mark.slow
def test_a_lost_context_is_told_and_the_next_run_leaves_the_kernel_out(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    counts: dict[str, int] = {}

    def grid(size: GridSize) -> list[Case]:
        return [lacking("fatal"), *small_grid(size)]

    def lost() -> None:
        message = "CUDA error: an illegal memory access was encountered"
        raise RuntimeError(message)

    with pytest.raises(RuntimeError, match="run the same command again to go on without that kernel"):
        measure_gpu(path, machine(counts, recover=lost), quick=True, progress=lambda _w, _f: None, time_limit_s=2.0, grid=grid)
    raw = run(path, counts, grid=grid)
    assert raw["complete"]
    assert counts == {"launch": 1, "copies": 1}


def test_a_section_that_fails_leaves_the_others(tmp_path: Path) -> None:
    def broken(_tell: object, _end_s: float) -> None:
        message = "no driver"
        raise OSError(message)

    base = machine({})
    with_broken = Machine(**{name: getattr(base, name) for name in Machine.__slots__} | {"sections": {"copies": broken}})
    raw = measure_gpu(
        tmp_path / "raw.json", with_broken, quick=True, progress=lambda _w, _f: None, time_limit_s=1.0, grid=small_grid
    )
    assert raw["failed"]["section/copies"] == "no driver"
    assert raw["complete"]


def test_writing_is_whole_or_not_at_all(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "raw.json"
    microbench_samples.write_raw(path, {"first": 1})

    class Full:
        @staticmethod
        def dumps(*_: object, **__: object) -> str:
            message = "disk full"
            raise OSError(message)

    monkeypatch.setattr(microbench_samples, "json", Full)
    with pytest.raises(InputError, match=r"raw\.json: cannot be written: disk full"):
        microbench_samples.write_raw(path, {"second": 2})
    assert json.loads(path.read_text()) == {"first": 1}
    assert [one.name for one in tmp_path.iterdir()] == ["raw.json"]


def test_a_quiet_machine_gets_no_warning() -> None:
    missing_back_end = {"attention/attention/bfloat16/1x2x1x8x8x64x0/efficient": "No viable backend"}
    assert warnings_of(QUIET | {"failed": missing_back_end}) == []
    power = {"sustained_kernels": [{"state": {"reasons": ["sw_power_cap"]}}]}
    assert warnings_of(QUIET | {"host": power}) == []


@pytest.mark.parametrize(
    ("changes", "text"),
    [
        ({"noise": 0.4}, "noise 40%"),
        ({"host": {"sustained_kernels": [{"state": {"reasons": ["hw_thermal_slowdown", "sw_power_cap"]}}]}}, r"throttled under load \(hw_thermal_slowdown\)"),
        ({"environment": {"context_bytes": 8 * 2**30}}, "8.0 GiB of the device were in use"),
        ({"failed": {"gemm/mm/bfloat16/8x8x8": "why"}}, "1 measurements failed and are missing, the first: gemm/mm/bfloat16/8x8x8: why"),
    ],
)  # fmt: skip
def test_doubtful_timings_are_named(changes: dict[str, Any], text: str) -> None:
    (message,) = warnings_of(QUIET | changes)
    assert re.search(text, message)


CPU_LACKS = {("normalization", "_fused_rms_norm_backward")}


def test_every_kernel_of_the_grid_can_be_built_and_run() -> None:
    """On the CPU, the smallest of each operator; the back ends of attention are below."""
    pools, stopwatch = Pools("cpu", 2**26, "float32"), Stopwatch("cpu")
    smallest: dict[tuple[str, str, str, str], Case] = {}
    for one in gpu_cases(GridSize(full=False, main="float32", others=("tf32", "float8_e4m3fn"))):
        key = one.kernel_class, one.op, one.dtype, one.variant
        if key not in smallest or one.work_bytes + one.flops < smallest[key].work_bytes + smallest[key].flops:
            smallest[key] = one
    chosen = [one for one in smallest.values() if (one.kernel_class, one.op) not in CPU_LACKS]
    chosen = [one for one in chosen if not (one.kernel_class == "attention" and one.variant)]
    assert len(chosen) > 50
    for one in chosen:
        measured = Measured(case=one)
        with torch.no_grad(), precision_of(one.dtype):
            sample(measured, pools.of(one), stopwatch)
        assert measured.samples_s[0] > 0, one.key
        assert measured.read_bytes > 0 or one.op == "zeros", one.key


@pytest.mark.parametrize("variant", ["", "flash", "math"])
def test_back_ends_of_attention_agree_and_have_gradients(variant: str) -> None:
    pool = Pool(num_elements=2**20, device="cpu", dtype=torch.float32)
    with torch.no_grad():
        forward = _attention(pool, False, variant, 2, 8, 2, 16, 16, 32, True)
        backward = _attention(pool, True, variant, 2, 8, 2, 16, 16, 32, True)
        assert forward.run().shape == (2, 8, 16, 32)
        backward.touch()
        assert [tuple(x.shape) for x in backward.run()] == [(2, 8, 16, 32), (2, 2, 16, 32), (2, 2, 16, 32)]


def test_work_of_a_case_is_about_its_traffic() -> None:
    """Limits rest on ``work_bytes``: it bounds what is really read and written from below by no more than a factor 4, and never is half of it."""
    pools, stopwatch = Pools("cpu", 2**26, "float32"), Stopwatch("cpu")
    for one in small_grid(GridSize(full=False, main="float32", others=()))[::7]:
        measured = Measured(case=one)
        with torch.no_grad():
            sample(measured, pools.of(one), stopwatch)
        moved = measured.read_bytes + measured.written_bytes
        assert moved / 2 <= one.work_bytes <= 4 * moved, one.key


def test_precision_is_put_back() -> None:
    before = torch.get_float32_matmul_precision()
    with precision_of("tf32"):
        assert torch.get_float32_matmul_precision() == "high"
    assert torch.get_float32_matmul_precision() == before

    def failing() -> None:
        with precision_of("tf32"):
            message = "stop"
            raise ValueError(message)

    with pytest.raises(ValueError, match="stop"):
        failing()
    assert torch.get_float32_matmul_precision() == before


def test_dispatch_is_host_time_of_microseconds() -> None:
    found = dispatch_by_operator("cpu")
    assert {"mul", "mm", "native_layer_norm", "mm_and_attention"} <= set(found)
    assert all(0 < value < 1e-2 for one in found.values() for value in one.values())
    assert found["mul"]["bare_s"] < found["mm_and_attention"]["bare_s"]


def test_chains_are_timed_both_ways_and_stop_in_time() -> None:
    compiled: list[str] = []

    def compiler(function: Callable[..., Any], **_: object) -> Callable[..., Any]:
        compiled.append(function.__name__)
        return function

    stopwatch = Stopwatch("cpu")
    rows = chain_timings(
        stopwatch, device="cpu", dtype=torch.float32, end_s=time.perf_counter() + 60, sizes=(2**12,), compiler=compiler
    )
    assert [row["chain"] for row in rows] == ["bias_gelu", "silu_mul", "dropout_add", "add_layer_norm"]
    assert all(row["moved_bytes"] == 3 * 4 * 2**12 and row["eager_s"] > 0 and row["compiled_s"] > 0 for row in rows)
    assert len(compiled) == 4
    assert chain_timings(stopwatch, device="cpu", dtype=torch.float32, end_s=0.0, compiler=compiler) == []
    short = compiled_dispatch("cpu", compiler=compiler)
    assert short["long_s"] > short["short_s"] > 0


def test_a_stopped_run_without_dispatch_cannot_be_fitted(tmp_path: Path) -> None:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps({"environment": {}, "host": {}, "results": []}))
    with pytest.raises(InputError, match=r"host.dispatch: was not measured before the run was stopped"):
        read_raw(path)


@pytest.mark.slow
def test_the_command_measures_a_gpu_in_a_folder(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    counts: dict[str, int] = {}
    asked: list[bool] = []

    def fake(*, quick: bool) -> Machine:
        asked.append(quick)
        return machine(counts)

    monkeypatch.setattr(microbench, "cuda_machine", fake)
    monkeypatch.setattr(microbench, "problem_of", lambda _device: "")
    monkeypatch.setattr(microbench, "gpu_cases", small_grid)
    monkeypatch.setattr(microbench_gpu, "TIME_LIMIT_S", {True: 3.0, False: 3.0})
    assert microbench.main(["--out", str(tmp_path / "measured"), "--device", "cuda", "--quick"]) == 0
    assert asked == [True]
    raw = read_raw(tmp_path / "measured" / "raw.json")
    assert raw["complete"]
    assert raw["quick"]
    told = capsys.readouterr().err
    assert f"{len(raw['results'])} kernels, noise" in told
    assert all(f"warning: {message}" in told for message in raw["warnings"])
