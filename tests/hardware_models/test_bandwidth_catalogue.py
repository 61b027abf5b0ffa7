"""[light] of the catalogue: the published tables give the committed values, and nothing else of a file changes."""

from __future__ import annotations

import shutil
import tomllib
from pathlib import Path

import pytest

from hardware_models.bandwidth_catalogue import (
    PRODUCTS_TABLE,
    SMALL_KERNELS_TABLE,
    STREAM_TABLE,
    THREADS,
    TURNAROUND,
    main,
    memory_of,
    update_catalogue,
)
from hardware_models.bandwidth_ramp import BandwidthRamp
from hardware_models.catalogue import CATALOGUE_FOLDER, catalogue_names, load_hardware
from hardware_models.profile_file import load_profile
from hardware_models.profile_sections import DeviceFile
from hardware_models.toml_file import read_section

MEASUREMENTS = Path(__file__).parents[3] / "shared" / "measurements"
TIMED = {"a100_80": "a100-sxm-80gb", "a40": "a40", "l40": "l40", "h200": "h200-sxm"}
RATES = {"v100": 804, "a100_40": 1381, "a100_80": 1732, "a40": 658, "l40": 816, "h100_pcie": 1704, "h200": 3165, "gh200": 3174}


def _device_values(folder: Path, name: str) -> dict[str, object]:
    return tomllib.loads((folder / name / "device.toml").read_text(encoding="utf-8"))


def _ramp(name: str) -> BandwidthRamp:
    ramp = load_hardware(name).light
    assert ramp is not None
    return ramp


def _made_tables(folder: Path) -> Path:
    """Timings that the committed ramps themselves would give, rates from memory in fixed proportions, and two products."""
    folder.mkdir()
    lines = ["gpu,mode,bytes_moved,time_per_kernel_us"]
    for key, name in TIMED.items():
        for octave in range(64, 121):
            moved = 2.0 ** (octave / 4)
            lines.append(f"{key},stream launch,{moved},{float(_ramp(name).seconds(moved)) * 1e6}")
            lines.append(f"{key},cudaGraph,{moved},{float(_ramp(name).seconds(moved, launch='graph')) * 1e6}")
    (folder / SMALL_KERNELS_TABLE).write_text("\n".join(lines) + "\n", encoding="utf-8")
    rates = [f"{key},{1.1 * rate},{1.02 * rate},{rate},{rate}" for key, rate in RATES.items()]
    header = "gpu,init_write_GBps,read_GBps,scale_GBps,triad_GBps"
    (folder / STREAM_TABLE).write_text("\n".join([header, *rates]) + "\n", encoding="utf-8")
    (folder / PRODUCTS_TABLE).write_text(
        "m,n,k,dtype,device,kernel_source,latency_us\n1,16384,16384,bfloat16,NVIDIA B200,x,100\n64,16384,16384,bfloat16,NVIDIA B200,x,1\n",
        encoding="utf-8",
    )
    return folder


@pytest.fixture(scope="module")
def updated(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, dict[str, object]]]:
    base = tmp_path_factory.mktemp("catalogue")
    for name in catalogue_names():
        (base / "data" / name).mkdir(parents=True)
        shutil.copy(CATALOGUE_FOLDER / name / "device.toml", base / "data" / name)
    return base / "data", update_catalogue(_made_tables(base / "tables"), base / "data")


@pytest.mark.slow
def test_only_light_changes_and_profiles_still_load(updated: tuple[Path, dict[str, dict[str, object]]]) -> None:
    folder, sections = updated
    assert set(sections) == set(catalogue_names())
    for name, section in sections.items():
        before, after = _device_values(CATALOGUE_FOLDER, name), _device_values(folder, name)
        assert after["light"] == section
        assert before | {"light": 0} == after | {"light": 0}
        assert list(before) == list(after)
        assert load_profile(folder / name).light is not None


@pytest.mark.slow
def test_timed_devices_get_back_the_ramps_that_made_the_table(updated: tuple[Path, dict[str, dict[str, object]]]) -> None:
    _folder, sections = updated
    for name in TIMED.values():
        ramp = _ramp(name)
        assert sections[name]["graph_launch_s"] == pytest.approx(ramp.graph_launch_s, rel=0.02)
        assert sections[name]["dram_bytes_per_s"] == pytest.approx(ramp.dram_bytes_per_s, rel=0.02)
        assert sections[name]["evidence"] == "published"


@pytest.mark.slow
def test_mixes_follow_the_tables(updated: tuple[Path, dict[str, dict[str, object]]]) -> None:
    _folder, sections = updated
    h100 = sections["h100-pcie"]
    assert h100["mix"] == [[0.0, 1.1], [0.5, 1.0], [0.6667, 1.0], [1.0, 1.02]]
    assert h100["dram_bytes_per_s"] == 1.704e12
    b200 = sections["b200"]  # 2 * (16384^2 + 2 * 16384) bytes in 100 us: 5369 GB/s; the product of 64 rows does not count
    wide = dict(b200["wide_mix"])  # type: ignore[call-overload]
    assert wide[0.5] * b200["dram_bytes_per_s"] == pytest.approx(TURNAROUND * 5.369e12, rel=1e-3)
    assert "products of few rows read 5369 GB/s" in str(b200["source"])
    assert "as b200, by bandwidth" in str(sections["b300"]["source"])


def test_resident_threads_follow_the_compute_capability() -> None:
    threads = {
        name: memory_of(read_section(DeviceFile, CATALOGUE_FOLDER / name / "device.toml")).threads_per_multiprocessor
        for name in ("t4", "a40", "l4", "a100-sxm-80gb", "b200")
    }
    assert threads == {"t4": 1024, "a40": 1536, "l4": 1536, "a100-sxm-80gb": THREADS, "b200": THREADS}


@pytest.mark.slow
@pytest.mark.skipif(not MEASUREMENTS.exists(), reason="the published tables are not beside the project")
def test_the_published_tables_give_the_committed_values(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for name in catalogue_names():
        (tmp_path / name).mkdir()
        shutil.copy(CATALOGUE_FOLDER / name / "device.toml", tmp_path / name)
    main(["--measurements", str(MEASUREMENTS), "--out", str(tmp_path)])
    assert "| h200-sxm | published | 3427 |" in capsys.readouterr().out
    for name in catalogue_names():
        before, after = _device_values(CATALOGUE_FOLDER, name)["light"], _device_values(tmp_path, name)["light"]
        assert isinstance(before, dict)
        assert isinstance(after, dict)
        for key, value in before.items():
            expected = [pytest.approx(pair, rel=3e-4) for pair in value] if isinstance(value, list) else value
            assert after[key] == (pytest.approx(value, rel=3e-4) if isinstance(value, float) else expected), (name, key)
        launch = _device_values(CATALOGUE_FOLDER, name)["launch_s"]
        assert isinstance(launch, dict)
        assert launch["value"] == before["graph_launch_s"]
