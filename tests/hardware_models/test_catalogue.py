"""The catalogue of devices: complete, sourced, consistent in itself, quick to load."""

from __future__ import annotations

import tomllib
from pathlib import Path
from time import perf_counter

import pytest

from hardware_models.catalogue import catalogue_names, list_hardware, load_hardware
from hardware_models.profile import DeviceProfile

REQUIRED = (
    "v100-sxm2-16gb v100-sxm2-32gb v100-pcie-32gb a100-sxm-40gb a100-sxm-80gb a100-pcie-80gb h100-sxm h100-pcie h200-sxm gh200 b200 b300 gb200 gb300 "
    "l40s l40 a40 a30 l4 t4 rtx-4090 p100-sxm2 p100-pcie"
).split()
DATA = Path(__file__).parents[2] / "hardware_models" / "data"
ALL = pytest.mark.parametrize("name", catalogue_names())

VENDOR = {
    # name: bf16 or fp16 dense TFLOP/s, GB/s, GB, multiprocessors, compute capability
    "p100-sxm2": (21.2, 732, 16, 56, "6.0"), "v100-sxm2-16gb": (125, 900, 16, 80, "7.0"), "v100-pcie-32gb": (112, 900, 32, 80, "7.0"), "t4": (65, 320, 16, 40, "7.5"),
    "a100-sxm-40gb": (312, 1555, 40, 108, "8.0"), "a100-pcie-80gb": (312, 1935, 80, 108, "8.0"), "a30": (165, 933, 24, 56, "8.0"), "a40": (149.7, 696, 48, 84, "8.6"),
    "l4": (121, 300, 24, 58, "8.9"), "l40s": (362, 864, 48, 142, "8.9"), "rtx-4090": (165.2, 1008, 24, 128, "8.9"), "h100-sxm": (989, 3350, 80, 132, "9.0"),
    "h100-pcie": (756, 2000, 80, 114, "9.0"), "h200-sxm": (989, 4800, 141, 132, "9.0"), "gh200": (989, 4000, 96, 132, "9.0"), "b200": (2250, 8000, 180, 148, "10.0"),
    "gb200": (2500, 8000, 186, 148, "10.0"), "b300": (2250, 8000, 288, 148, "10.3"),
}  # fmt: skip


def test_required_devices_are_there() -> None:
    assert set(REQUIRED) <= set(catalogue_names())
    assert [entry.name for entry in list_hardware()][: len(catalogue_names())] == list(catalogue_names())


@pytest.mark.parametrize("name", sorted(VENDOR))
def test_vendor_values(name: str) -> None:
    tflops, bandwidth, memory, multiprocessors, capability = VENDOR[name]
    profile = load_hardware(name)
    assert profile.peak("float16") == tflops * 1e12
    assert profile.memory_bandwidth_bytes_per_s == bandwidth * 1e9
    assert 0.93 * memory * 1e9 < profile.memory_bytes < 1.075 * memory * 2**30  # usable or nominal, which counts 1e9 or 2**30
    assert profile.num_multiprocessors == multiprocessors
    assert profile.compute_capability == capability


def _ratio(profile: DeviceProfile, fast: str, slow: str) -> float:
    return profile.peak(fast) / profile.peak(slow)


@ALL
def test_peaks_are_dense_and_double_as_the_width_halves(name: str) -> None:
    profile = load_hardware(name)
    peaks = profile.peak_flops_per_s
    if "bfloat16" in peaks:
        assert peaks["bfloat16"] == peaks["float16"]
    if "float8" in peaks:
        assert _ratio(profile, "float8", "float16") == pytest.approx(2.0, rel=0.02)
    if "float4" in peaks:
        assert 1.9 < _ratio(profile, "float4", "float8") <= 3.0  # Blackwell Ultra: three times
    if "tf32" in peaks and name != "l4":
        assert _ratio(profile, "float16", "tf32") == pytest.approx(2.0, rel=0.02)
    assert peaks["float32"] < peaks["float16"]


@ALL
def test_clock_and_cores_give_the_stated_rate(name: str) -> None:
    profile = load_hardware(name)
    cores = 64 if profile.compute_capability in {"6.0", "7.0", "7.5", "8.0"} else 128
    computed = 2 * cores * profile.num_multiprocessors * profile.boost_clock_hz
    assert computed == pytest.approx(profile.peak("float32"), rel=0.08)


@ALL
def test_every_value_has_a_source_and_a_date(name: str) -> None:
    values = tomllib.loads((DATA / name / "device.toml").read_text())
    sections = [one for one in values.values() if isinstance(one, dict) and "value" in one] + list(
        values["peak_flops_per_s"].values()
    )
    assert len(sections) >= 10
    for section in (*sections, values["host_dispatch"], values["sustained"]):
        assert len(section["source"]) > 2
        assert section["date"].startswith("20")
    assert values["light"]["source"]


@ALL
def test_other_sections_are_plausible(name: str) -> None:
    profile = load_hardware(name)
    assert 2**27 < profile.context_bytes < 2**30
    assert profile.workspace_bytes == (2**25 if float(profile.compute_capability) >= 9 else 8519680)
    assert profile.sustained is not None
    assert profile.host_dispatch is not None
    host = profile.host_dispatch
    assert host.cuda_graph_s < host.autograd_backward_s < host.eager_s < host.compiled_call_s
    assert (host.eager_s + host.autograd_backward_s) / 2 == pytest.approx(profile.dispatch_s)
    assert profile.copy_engine is not None
    assert profile.copy_engine.to_device_bytes_per_s < profile.memory_bandwidth_bytes_per_s
    assert 60 <= profile.tdp_w <= 1500


@ALL
def test_links_are_in_the_table_of_links(name: str) -> None:
    names = {link["name"] for link in tomllib.loads((DATA / "links.toml").read_text())["link"]}
    profile = load_hardware(name)
    assert profile.host_link in names
    assert not profile.peer_link or profile.peer_link in names
    assert not profile.peer_link or profile.peer_bytes_per_s > 0


def test_power_limited_boards_sustain_less() -> None:
    factors = {name: load_hardware(name).sustained for name in ("t4", "l4", "rtx-4090", "h100-sxm", "h100-sxm-96gb")}
    values = {name: one.factor for name, one in factors.items() if one is not None}
    assert values["t4"] < values["l4"] < values["rtx-4090"]
    assert values["h100-sxm-96gb"] < values["h100-sxm"]


def test_a_profile_loads_quickly() -> None:
    load_hardware("h100-sxm")
    times = []
    for _repeat in range(5):
        start = perf_counter()
        load_hardware("h100-sxm")
        times.append(perf_counter() - start)
    assert min(times) < 0.05
