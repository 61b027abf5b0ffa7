"""A profile from raw timings of a GPU whose laws are known."""

from __future__ import annotations

import json
import tomllib
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from hardware_models.calibration import fit_profile, main, read_raw, variant_ratios
from hardware_models.calibration_device import catalogue_entry, load_ratios
from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from hardware_models.microbench_plan import halton
from hardware_models.pricing import price

FLOPS_PER_S = {"bfloat16": 6e14, "float32": 4.5e13}
BYTES_PER_S = 3.5e12
PRODUCT_LAUNCH_S, STREAM_LAUNCH_S = 5e-6, 2.5e-6


def product_s(flops: float, moved: float, dtype: str) -> float:
    return PRODUCT_LAUNCH_S + flops / FLOPS_PER_S[dtype] + moved / BYTES_PER_S


def product(m: int, n: int, k: int, dtype: str) -> dict[str, Any]:
    width = 2 if dtype == "bfloat16" else 4
    read, written, flops = width * (m * k + k * n), width * m * n, 2 * m * n * k
    return {
        "kernel_class": "gemm", "op": "mm", "shape": [m, n, k], "dtype": dtype, "flops": flops, "read_bytes": read, "written_bytes": written,
        "samples_s": [product_s(flops, read + written, dtype)] * 3,
    }  # fmt: skip


def stream(kernel_class: str, op: str, elements: int) -> dict[str, Any]:
    return {
        "kernel_class": kernel_class, "op": op, "shape": [elements], "dtype": "bfloat16", "flops": 0, "read_bytes": 4 * elements,
        "written_bytes": 2 * elements, "samples_s": [STREAM_LAUNCH_S + 6 * elements / BYTES_PER_S] * 3,
    }  # fmt: skip


def loaded(kernel_class: str, burst_s: float, sustained_s: float) -> dict[str, Any]:
    return {
        "kernel_class": kernel_class, "op": "x", "shape": [1], "dtype": "bfloat16", "isolated_s": 1e-3, "burst_s": burst_s,
        "sustained_s": sustained_s, "first_s": burst_s, "duration_s": 1.0, "state": {"num": 9, "clocks.sm": 1500.0, "reasons": ["sw_power_cap"]},
    }  # fmt: skip


def raw_of(device_name: str) -> dict[str, Any]:
    shapes = [tuple(round(2.0**log) for log in logs) for logs in halton(80, (5, 7, 7), (14, 14, 14))]
    results = [product(*shape, dtype) for shape in shapes for dtype in FLOPS_PER_S]  # type: ignore[arg-type]
    results += [
        stream(*kind, 2**exponent) for kind in (("pointwise", "add"), ("copy", "_to_copy")) for exponent in range(12, 30)
    ]
    results += [product(*shape, "bfloat16") | {"variant": "nn"} for shape in shapes[:4]]  # type: ignore[arg-type]
    for row in results[-4:]:
        row["samples_s"] = [1.25 * value for value in row["samples_s"]]
    environment = {
        "device": "cuda", "device_name": device_name, "date": "2026-11-23", "torch": "2.13.0+cu130", "num_threads": 16, "num_multiprocessors": 132,
        "memory_bytes": 150 * 10**9, "cache_bytes": 50 * 2**20, "capability": "9.0", "context_bytes": 700 * 2**20, "clock_mhz": None,
    }  # fmt: skip
    copies = [
        {
            "bytes": size, "h2d_s": 7e-6 + size / 55e9, "d2h_s": 7e-6 + size / 50e9, "duplex_s": (7e-6 + size / 55e9) / 0.75 + size / 50e9 - size / 55e9,
            "pageable_h2d_s": 1.0, "pageable_d2h_s": 1.0, "under": [{"compute_slowdown": 1.02, "copy_slowdown": 1.0}, {"compute_slowdown": 1.10, "copy_slowdown": 1.5}] if size == 2**28 else [],
        }
        for size in (2**12, 2**16, 2**20, 2**24, 2**28)
    ]  # fmt: skip
    host = {
        "dispatch": {"forward_s": 5e-6, "backward_s": 8e-6, "operator_s": 3e-6}, "operators": {"mul": {"bare_s": 3e-6}},
        "launch": {"stream_kernel_s": 2.2e-6, "graph_kernel_s": 1.1e-6, "graph_replay_s": 2e-4, "num_kernels": 200, "isolated_s": 4e-6, "context_bytes": 5},
        "copies": copies, "compiled": {"short_s": 2e-5, "long_s": 5.2e-5, "num_kernels": 9.0},
        "sustained_kernels": [loaded("gemm", 1e-3, 1.3e-3), loaded("gemm", 1e-3, 1.1e-3), loaded("copy", 9e-4, 9e-4), {"kernel_class": "fft", "failed": "x"}],
        "allocator": {
            "default": {"context_bytes": 500 * 2**20, "context": [{"after": "product", "workspace_bytes": 33 * 2**20}], "sections": [], "trace": {"events": [[1]]}},
            "expandable_segments": {"failed": "no"},
        },
    }  # fmt: skip
    return {
        "format": 2, "complete": True, "quick": False, "noise": 0.01, "environment": environment, "host": host, "failed": {}, "warnings": [],
        "results": results,
    }  # fmt: skip


def test_laws_are_recovered(tmp_path: Path) -> None:
    profile = fit_profile(raw_of("NVIDIA Unheard-of"), tmp_path)
    assert profile.peak("bfloat16") == pytest.approx(6e14, rel=0.1)
    assert profile.peak("float32") == pytest.approx(4.5e13, rel=0.1)
    assert profile.memory_bandwidth_bytes_per_s == pytest.approx(BYTES_PER_S, rel=0.03)
    assert (profile.launch_s, profile.dispatch_s) == (2.2e-6, pytest.approx(6.5e-6))
    assert profile.context_bytes == 500 * 2**20
    assert profile.workspace_bytes == 33 * 2**20
    assert profile.l2_bytes == 50 * 2**20
    copy = profile.copy_engine
    assert copy is not None
    assert copy.to_device_bytes_per_s == pytest.approx(55e9, rel=1e-3)
    assert copy.to_host_bytes_per_s == pytest.approx(50e9, rel=1e-3)
    assert copy.latency_s == pytest.approx(7e-6, rel=1e-2)
    assert copy.duplex_efficiency == pytest.approx(0.75, rel=1e-3)
    assert (copy.compute_slowdown, copy.copy_slowdown) == (pytest.approx(1.06), pytest.approx(1.25))
    dispatch = profile.host_dispatch
    assert dispatch is not None
    assert (dispatch.eager_s, dispatch.autograd_backward_s, dispatch.cuda_graph_s) == (5e-6, 8e-6, pytest.approx(1e-6))
    assert (dispatch.compiled_s, dispatch.compiled_call_s) == (pytest.approx(4e-6), pytest.approx(1.6e-5))
    assert profile.sustained is not None
    assert (profile.sustained.low, profile.sustained.high) == (pytest.approx(1 / 1.3), pytest.approx(1 / 1.1))
    assert set(profile.evidence.values()) == {"measured"}


@pytest.mark.parametrize("dtype", ["bfloat16", "float32"])
def test_products_between_the_measured_ones_are_priced(tmp_path: Path, dtype: str) -> None:
    profile = fit_profile(raw_of("NVIDIA Unheard-of"), tmp_path)
    errors = []
    for m, n, k in ((300, 3000, 1500), (4096, 1024, 1024), (64, 8192, 2048), (10_000, 700, 700), (2000, 2000, 2000)):
        row = product(m, n, k, dtype)
        kernel = Kernel(
            kernel_class="gemm", op="mm", shape=(m, n, k), dtype=dtype, flops=row["flops"], read_bytes=row["read_bytes"],
            written_bytes=row["written_bytes"],
        )  # fmt: skip
        errors.append(price([kernel], profile)[0] / row["samples_s"][0] - 1)
    assert np.abs(errors).max() < 0.02


def test_known_devices_take_the_data_sheets_peaks_and_say_so(tmp_path: Path) -> None:
    profile = fit_profile(raw_of("NVIDIA H200"), tmp_path)
    sheet = load_hardware("h200-sxm")
    assert dict(profile.peak_flops_per_s) == dict(sheet.peak_flops_per_s)
    assert profile.evidence["peak_flops_per_s.bfloat16"] == "datasheet"
    assert profile.evidence["memory_bandwidth_bytes_per_s"] == "datasheet"
    assert profile.evidence["launch_s"] == "measured"
    assert (profile.architecture, profile.tdp_w) == (sheet.architecture, sheet.tdp_w)
    provenance = tomllib.loads((tmp_path / "provenance.toml").read_text())
    assert provenance["measured"]["peak_flops_per_s"]["bfloat16"] == pytest.approx(6e14, rel=0.1)
    efficiency = profile.efficiency("gemm")
    assert efficiency.flops < 6e14 / sheet.peak("bfloat16") * 1.01


def test_another_board_takes_nothing_from_the_catalogue() -> None:
    assert catalogue_entry("NVIDIA Unheard-of", 80 * 10**9) is None
    entry = catalogue_entry("NVIDIA A100-SXM4-80GB", 85 * 10**9)
    assert entry is not None
    assert entry["name"] == "a100-sxm-80gb"
    assert catalogue_entry("NVIDIA A100-SXM4-80GB", 40 * 10**9) is None


def test_provenance_sums_up_load_and_variants_and_holds_no_traces(tmp_path: Path) -> None:
    fit_profile(raw_of("NVIDIA Unheard-of"), tmp_path)
    provenance = tomllib.loads((tmp_path / "provenance.toml").read_text())
    gemm = next(row for row in provenance["load"] if row["kernel_class"] == "gemm")
    assert gemm["sustained_over_burst"] == pytest.approx(1.2)
    assert provenance["variants"] == [
        {
            "kernel_class": "gemm",
            "op": "mm",
            "dtype": "bfloat16",
            "variant": "nn",
            "num": 4,
            "over_default": pytest.approx(1.25),
        }
    ]
    assert "trace" not in provenance["allocator"]["default"]
    assert provenance["allocator"]["expandable_segments"] == {"failed": "no"}
    assert {row["kernel_class"] for row in load_ratios(raw_of("x")["host"]["sustained_kernels"])} == {"gemm", "copy"}


def test_a_variant_without_a_default_is_left_out() -> None:
    assert variant_ratios([product(8, 8, 8, "float32") | {"variant": "tn"}], quiet=True) == []


def test_an_unfinished_run_is_fitted_as_far_as_it_went(tmp_path: Path) -> None:
    raw = raw_of("NVIDIA Unheard-of")
    raw["host"] = {"dispatch": raw["host"]["dispatch"]}
    del raw["noise"]
    raw["complete"] = False
    profile = fit_profile(raw, tmp_path)
    assert profile.copy_engine is None
    assert profile.sustained is None
    assert profile.host_dispatch is None
    assert profile.context_bytes == 700 * 2**20
    assert profile.launch_s == pytest.approx(STREAM_LAUNCH_S + 6 * 2**12 / BYTES_PER_S)


def test_long_grids_are_cut_to_what_a_fit_can_take(tmp_path: Path) -> None:
    raw = raw_of("NVIDIA Unheard-of")
    raw["results"] += [stream("pointwise", "mul", 2**10 + 64 * number) for number in range(450)]
    profile = fit_profile(raw, tmp_path)
    assert {curve.group: len(curve.points) for curve in profile.curves}["mul"] == 400


def test_command_line_fits_a_file_brought_from_elsewhere(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    path = tmp_path / "raw.json"
    path.write_text(json.dumps(raw_of("NVIDIA H200")))
    assert main(["--raw", str(path), "--out", str(tmp_path / "profile")]) == 0
    assert load_hardware(tmp_path / "profile").name == "NVIDIA H200"
    path.write_text(path.read_text()[:100])
    assert main(["--raw", str(path), "--out", str(tmp_path / "profile")]) == 2
    assert "not whole or not JSON" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("text", "rule"), [("[]", "raw timings hold this key"), ("{}", "raw timings hold this key"), ("{", "not whole or not JSON")]
)
def test_files_that_are_no_raw_timings_are_refused(tmp_path: Path, text: str, rule: str) -> None:
    path = tmp_path / "raw.json"
    path.write_text(text)
    with pytest.raises(InputError, match=rule):
        read_raw(path)
    with pytest.raises(InputError, match="no such file"):
        read_raw(tmp_path / "none.json")
