"""Every way a profile can be wrong, and the message that says so."""

from __future__ import annotations

import shutil
import tomllib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import tomli_w

from hardware_models.catalogue import catalogue_names, list_hardware, load_hardware, this_profile_path
from hardware_models.errors import InputError, UnknownNameError
from hardware_models.profile_file import load_profile
from hardware_models.toml_file import write_toml

DATA = Path(__file__).parents[2] / "hardware_models" / "data"


def _changed(folder: Path, change: Callable[[dict[str, Any]], object], file: str = "device.toml") -> Path:
    shutil.copytree(DATA / "h100-sxm", folder, dirs_exist_ok=True)
    path = folder / file
    values = tomllib.loads(path.read_text()) if path.exists() else {}
    change(values)
    path.write_text(tomli_w.dumps(values))
    return folder


def _set(*keys: str, value: object) -> Callable[[dict[str, Any]], object]:
    def change(values: dict[str, Any]) -> None:
        for key in keys[:-1]:
            values = values[key]
        values[keys[-1]] = value

    return change


@pytest.mark.parametrize(
    ("change", "key", "words"),
    [
        (lambda v: v.pop("memory_bytes"), "memory_bytes", "this key is required; add it"),
        (_set("memory_bandwidth_bytes_per_s", "value", value=-1.0), "memory_bandwidth_bytes_per_s.value", "greater than or equal to 1000000000"),
        (_set("memory_bandwidth_bytes_per_s", "value", value=3350.0), "memory_bandwidth_bytes_per_s.value", "not in GB/s"),
        (_set("memory_bandwidth_bytes_per_s", "value", value=float("nan")), "memory_bandwidth_bytes_per_s.value", "finite number"),
        (_set("peak_flops_per_s", "bfloat16", "value", value=989.0), "peak_flops_per_s.bfloat16.value", "not in GB/s or TFLOP/s"),
        (_set("dispatch_s", "value", value=5.0), "dispatch_s.value", "give seconds, not microseconds"),
        (_set("clock", value=1.0), "clock", "unknown key; remove it"),
        (_set("kind", value="tpu"), "kind", "'cpu' or 'cuda'"),
        (_set("launch_s", "evidence", value="guess"), "launch_s.evidence", "'measured', 'published' or 'datasheet'"),
        (lambda v: v["efficiency"].pop(0), "efficiency", "kernel_class = 'default'"),
        (lambda v: v["efficiency"][0].update(flops=1.5), "efficiency.0.flops", "less than or equal to 1"),
        (_set("memory_bytes", "value", value=80), "memory_bytes.value", "give bytes, not GB"),
        (_set("memory_bytes", "value", value=-1), "memory_bytes.value", "greater than or equal to"),
        (_set("peak_flops_per_s", "float16", "value", value=1e27), "peak_flops_per_s.float16.value", "no device is that fast"),
        (_set("l2_bytes", "value", value=50), "l2_bytes.value", "give bytes, not MB"),
        (_set("boost_clock_hz", "value", value=1980.0), "boost_clock_hz.value", "give hertz, not MHz or GHz"),
        (_set("tdp_w", "value", value=float("nan")), "tdp_w.value", "finite number"),
        (_set("tdp_w", "value", value=0.0), "tdp_w.value", "greater than 0"),
        (_set("compute_capability", value="9"), "compute_capability", "match pattern"),
        (lambda v: v["host_dispatch"].pop("compiled_s"), "host_dispatch.compiled_s", "this key is required; add it"),
        (_set("host_dispatch", "eager_s", value=5.8), "host_dispatch.eager_s", "give seconds, not microseconds"),
        (_set("sustained", "factor", value=0.5), "sustained.factor", "low <= factor <= high must hold, but got low=0.82, high=0.93"),
        (_set("sustained", "factor", value=1.2), "sustained.factor", "less than or equal to 1"),
        (lambda v: v["light"].pop("spill_width"), "light.spill_width", "this key is required; add it"),
        (_set("light", "dram_bytes_per_s", value=2800.0), "light.dram_bytes_per_s", "not in GB/s or TFLOP/s"),
        (_set("light", "dram_bytes_per_s", value=3.4e12), "light.dram_bytes_per_s", "memory_bandwidth_bytes_per_s must hold, but got"),
        (_set("light", "cache_bytes_per_s", value=1e10), "light", "time grows with the bytes moved, but falls at"),
        (_set("light", "mix", value=[[0.5, 1.0], [0.0, 1.0]]), "light.mix", "read fractions increase strictly"),
        (_set("light", "wide_mix", value=[[0.5, 2.0]]), "light.dram_bytes_per_s", "dram_bytes_per_s * wide_mix <= memory_bandwidth_bytes_per_s must hold"),
        (_set("light", "cache_bytes", value=50.0), "light.cache_bytes", "give bytes, not MB"),
        (_set("light", "wide_mix", value=[[0.5, float("inf")]]), "light.wide_mix.0.1", "finite number"),
    ],
)  # fmt: skip
def test_bad_device_values_are_named(tmp_path: Path, change: Callable[[dict[str, Any]], object], key: str, words: str) -> None:
    with pytest.raises(InputError) as caught:
        load_profile(_changed(tmp_path / "device", change))
    assert "device.toml: " + key in str(caught.value)
    assert words in str(caught.value)


def test_truncated_file_is_named(tmp_path: Path) -> None:
    folder = _changed(tmp_path / "device", lambda _values: None)
    text = (folder / "device.toml").read_text()
    (folder / "device.toml").write_text(text[: len(text) // 2])
    with pytest.raises(InputError, match=r"device\.toml: line \d+: not TOML: .*repeat 'schedlab calibrate'"):
        load_profile(folder)


def _curve(**changes: object) -> dict[str, Any]:
    curve = {
        "kernel_class": "pointwise", "group": "add", "dtype": "float32", "evidence": "measured", "points": [[10.0], [12.0]], "seconds": [1e-6, 4e-6],
        "physical_seconds": [1e-6, 4e-6], "cache_bytes": 0, "coefficients": [0.0, 0.0, 1e-9, 0.0, 0.0, 0.0], "length_scale": 1.0, "noise": 0.1,
        "relative_standard_error": 0.1, "median_error": 0.1,
    }  # fmt: skip
    return {"format": 1, "curve": [curve | changes]}


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"points": [[12.0], [10.0]]}, r"curve\[0\] \(add\)\.points = \[10\.0\]: grid points increase strictly"),
        ({"points": [[12.0], [12.0]]}, "grid points increase strictly"),
        ({"seconds": [1e-6]}, "have one length"),
        ({"seconds": [1e-6, -1.0]}, r"kernels\.toml: curve\.0\.seconds\.1 = -1\.0"),
        ({"median_error": float("nan")}, "finite number"),
    ],
)
def test_bad_curves_are_named(tmp_path: Path, changes: dict[str, object], words: str) -> None:
    folder = _changed(tmp_path / "device", lambda values: values.update(_curve(**changes)), "kernels.toml")
    with pytest.raises(InputError, match=words):
        load_profile(folder)


def test_missing_folder_content(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"no such file; a profile is a folder with device\.toml"):
        load_profile(tmp_path)


@pytest.mark.parametrize("name", catalogue_names())
def test_catalogue_loads_with_sources(name: str) -> None:
    profile = load_hardware(name)
    assert profile.name == name
    assert profile.peak("float16") >= 1e13
    assert all(one.source for one in profile.efficiencies)


def test_a_profile_without_the_optional_sections_loads(tmp_path: Path) -> None:
    optional = "light host_dispatch sustained l2_bytes boost_clock_hz tdp_w peer_bytes_per_s workspace_bytes architecture host_link peer_link".split()

    def strip(values: dict[str, Any]) -> None:
        for key in optional:
            del values[key]

    bare = load_profile(_changed(tmp_path / "device", strip))
    assert bare.light is None
    assert bare.host_dispatch is None
    assert bare.sustained is None
    assert bare.l2_bytes == 0
    assert bare.peak_flops_per_s == load_hardware("h100-sxm").peak_flops_per_s
    assert "light" not in bare.evidence


def test_evidence_names_every_section() -> None:
    kinds = load_hardware("h200-sxm").evidence
    assert kinds["light"] == "published"
    assert kinds["sustained"] == "published"
    assert kinds["l2_bytes"] == "datasheet"
    assert load_hardware("h100-sxm").evidence["light"] == "datasheet"


def test_folder_and_file_load_alike() -> None:
    assert load_hardware(DATA / "l4") == load_hardware(DATA / "l4" / "device.toml")


def test_unknown_name_lists_the_known() -> None:
    with pytest.raises(
        UnknownNameError, match=r"known are .*h100-sxm.*this; did you mean 'h100-sxm'.*schedlab calibrate"
    ) as caught:
        load_hardware("h100-smx")
    assert caught.value.known == (*catalogue_names(), "this")
    with pytest.raises(UnknownNameError, match=r"; Or give the folder of a profile"):
        load_hardware("zzz")


def test_this_machine_uncalibrated(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SCHEDLAB_CACHE", str(tmp_path))
    assert this_profile_path("cpu").is_relative_to(tmp_path)
    with pytest.raises(InputError, match="has not been calibrated; run 'schedlab calibrate --device cpu'"):
        load_hardware("this")
    shutil.copytree(DATA / "l4", this_profile_path("cpu"))
    assert load_hardware("this").name == "l4"
    assert this_profile_path("cpu").name in {entry.name for entry in list_hardware()}


def test_dtype_without_a_peak_names_the_known() -> None:
    with pytest.raises(InputError, match="no peak for this dtype; known are float32, float16"):
        load_hardware("v100-sxm2-32gb").peak("bfloat16")


def test_failed_write_leaves_the_old_file(tmp_path: Path) -> None:
    path = tmp_path / "a.toml"
    write_toml(path, {"a": 1})
    with pytest.raises(TypeError):
        write_toml(path, {"a": object()})
    assert tomllib.loads(path.read_text()) == {"a": 1}
    assert list(tmp_path.iterdir()) == [path]
