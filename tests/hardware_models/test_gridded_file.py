"""Gridded curves on disk: what is written is read, what is broken is refused with file, key and rule."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import tomli_w

from hardware_models import gridded_file
from hardware_models.catalogue import CATALOGUE_FOLDER, catalogue_names, load_hardware
from hardware_models.errors import InputError
from hardware_models.gridded import GriddedCurve
from hardware_models.gridded_file import AXIS_NAMES, GRIDS_FILE, MOST_LOG_RATIO, load_grids, write_grids
from hardware_models.physical_law import PhysicalLaw

LAW = PhysicalLaw(
    flops_per_s=1e14, bandwidth_bytes_per_s=1e12, launch_s=2e-6, num_multiprocessors=100, operand_bytes=2.0, result_bytes=2.0
)
LAWS = {"bfloat16": LAW, "float16": LAW}
CURVE = GriddedCurve(
    kernel_class="gemm", group="mm", dtype="bfloat16", stack="my stack/1", evidence="published", source="a table @1", sizes="product",
    axes=((1.0, 16.0), (1024.0, 2048.0, 4096.0), (512.0, 1024.0)), log_ratios=np.arange(12.0).reshape(2, 3, 2) / 16, law=LAW,
    relative_standard_error=0.0512, median_error=0.0213, p90_error=0.0834, p99_error=0.2001, num_points=12,
)  # fmt: skip
TABLE = "mm-bfloat16-my-stack-1.csv"
ATTENTION = GriddedCurve(
    kernel_class="attention", group="attention", dtype="bfloat16", stack="flash", evidence="published", source="a table @1", sizes="attention",
    axes=((8.0, 64.0), (512.0, 1024.0), (1.0,)), log_ratios=np.full((2, 2, 1), 0.25), law=LAW, relative_standard_error=0.05, median_error=0.02,
    p90_error=0.08, p99_error=0.2, num_points=4,
)  # fmt: skip
BORROWED: dict[str, object] = {
    "kernel_class": "gemm", "group": "mm", "dtype": "float16", "stack": "torch_flow", "borrowed_from": "a100-sxm-80gb", "borrowed_dtype": "bfloat16",
    "factor": 1.25, "source": "test", "relative_standard_error": 0.1, "median_error": 0.05, "p90_error": 0.2, "p99_error": 0.3,
}  # fmt: skip


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    write_grids(tmp_path, (CURVE, ATTENTION), (BORROWED,))
    return tmp_path


def edited(folder: Path, change: Callable[[dict[str, object]], object], table: str = "grid") -> None:
    """Applies ``change`` to the first section of a table in ``grids.toml``."""
    values = gridded_file.read_section(gridded_file._GridsFile, folder / GRIDS_FILE).model_dump()
    change(values[table][0])
    (folder / GRIDS_FILE).write_text(tomli_w.dumps(values), encoding="utf-8")


def refusal(folder: Path) -> InputError:
    with pytest.raises(InputError) as caught:
        load_grids(folder, LAWS)
    return caught.value


def test_what_is_written_is_read(folder: Path) -> None:
    assert load_grids(folder, LAWS)[:2] == (CURVE, ATTENTION)


def test_header_names_the_axes(folder: Path) -> None:
    lines = (folder / TABLE).read_text(encoding="utf-8").splitlines()
    assert lines[0] == "m,n,k=512,k=1024"
    assert lines[1] == "1,1024,0.0000,0.0625"
    assert len(lines) == 1 + 2 * 3


def test_nothing_is_left_beside_the_files(folder: Path) -> None:
    assert sorted(path.name for path in folder.iterdir()) == ["attention-bfloat16-flash.csv", GRIDS_FILE, TABLE]


def test_no_file_means_no_curves(tmp_path: Path) -> None:
    assert load_grids(tmp_path, LAWS) == ()


def test_borrowed_curve_is_the_lenders_under_our_law(folder: Path) -> None:
    borrowed = load_grids(folder, LAWS)[2]
    lender = next(
        grid
        for grid in load_hardware("a100-sxm-80gb").grids
        if (grid.group, grid.dtype, grid.stack) == ("mm", "bfloat16", "torch_flow")
    )
    assert borrowed.log_ratios == pytest.approx(lender.log_ratios + np.log(1.25))
    assert (borrowed.law, borrowed.dtype, borrowed.evidence, borrowed.num_points) == (LAW, "float16", "datasheet", 0)


@pytest.mark.parametrize(
    "key",
    ["kernel_class", "group", "dtype", "stack", "sizes", "evidence", "source", "num_points", "axes", "nodes", "median_error"],
)
def test_missing_key_is_refused(folder: Path, key: str) -> None:
    edited(folder, lambda section: section.pop(key))
    error = refusal(folder)
    assert str(folder / GRIDS_FILE) in str(error)
    assert error.key == f"grid.0.{key}"
    assert "this key is required" in str(error)


@pytest.mark.parametrize("key", list(BORROWED))
def test_missing_key_of_a_borrowed_curve_is_refused(folder: Path, key: str) -> None:
    edited(folder, lambda section: section.pop(key), "borrowed")
    error = refusal(folder)
    assert error.key == f"borrowed.0.{key}"
    assert "this key is required" in str(error)


@pytest.mark.parametrize(
    ("key", "value", "rule"),
    [
        ("median_error", float("nan"), "finite"),
        ("median_error", -0.1, "greater than or equal to 0"),
        ("p99_error", float("inf"), "finite"),
        ("num_points", 0, "greater than or equal to 1"),
        ("num_points", 1.5, "integer"),
        ("evidence", "guessed", "measured"),
        ("sizes", "cube", "product"),
        ("kernel_class", "gemv", "gemm"),
        ("source", "", "at least 1 character"),
        ("nodes", "../other.csv", "pattern"),
        ("typo", 1, "unknown key"),
    ],
)
def test_bad_value_is_refused(folder: Path, key: str, value: object, rule: str) -> None:
    edited(folder, lambda section: section.__setitem__(key, value))
    error = refusal(folder)
    assert error.key == f"grid.0.{key}"
    assert rule in str(error)


@pytest.mark.parametrize(
    ("axis", "rule"),
    [
        ([16.0, 1.0], "sizes increase strictly, but this one follows 16"),
        ([16.0, 16.0], "sizes increase strictly"),
        ([-1.0, 16.0], "greater than 0"),
        ([0.0, 16.0], "greater than 0"),
        ([1.0, float("nan")], "finite"),
        ([1.0, float("inf")], "finite"),
        ([], "at least 1 item"),
        (["one", 2.0], "number"),
    ],
)
def test_bad_axis_is_refused(folder: Path, axis: list[object], rule: str) -> None:
    edited(folder, lambda section: section.__setitem__("axes", [axis, [1024.0, 2048.0, 4096.0], [512.0, 1024.0]]))
    error = refusal(folder)
    assert "grid" in error.key
    assert "axes" in error.key
    assert rule in str(error)


def test_two_axes_are_refused(folder: Path) -> None:
    edited(folder, lambda section: section.__setitem__("axes", [[1.0, 16.0], [512.0, 1024.0]]))
    assert refusal(folder).key == "grid.0.axes.2"


def test_axes_of_another_class_are_refused(folder: Path) -> None:
    edited(folder, lambda section: section.__setitem__("sizes", "decode"))
    error = refusal(folder)
    assert error.key == "grid[0].sizes"
    assert "axes that kernels of class gemm have" in str(error)


def test_dtype_without_a_peak_is_refused(folder: Path) -> None:
    edited(folder, lambda section: section.__setitem__("dtype", "float3"))
    error = refusal(folder)
    assert error.value == "float3"
    assert "the device has a peak for it; known are bfloat16, float16" in str(error)


def test_borrowed_dtype_without_a_peak_is_refused(folder: Path) -> None:
    edited(folder, lambda section: section.__setitem__("dtype", "float3"), "borrowed")
    assert "the device has a peak for it" in str(refusal(folder))


def test_unknown_lender_is_refused(folder: Path) -> None:
    edited(folder, lambda section: section.__setitem__("borrowed_from", "gpu-9000"), "borrowed")
    error = refusal(folder)
    assert (error.key, error.value) == ("borrowed[0].borrowed_from", "gpu-9000")
    assert "a catalogued device with grids.toml" in str(error)


@pytest.mark.parametrize(("key", "value"), [("borrowed_dtype", "float32"), ("stack", "other"), ("group", "attention_sideways")])
def test_what_the_lender_does_not_have_is_refused(folder: Path, key: str, value: str) -> None:
    edited(folder, lambda section: section.__setitem__(key, value), "borrowed")
    error = refusal(folder)
    assert error.key == "borrowed[0]"
    assert "a100-sxm-80gb has a grid of this class, operator, dtype and stack" in str(error)


@pytest.mark.parametrize("factor", [0.0, -1.0, float("nan")])
def test_bad_factor_is_refused(folder: Path, factor: float) -> None:
    edited(folder, lambda section: section.__setitem__("factor", factor), "borrowed")
    assert refusal(folder).key == "borrowed.0.factor"


@pytest.mark.parametrize(
    ("old", "new", "rule"),
    [
        ("1,1024,0.0000", "1,1024,nan", "finite"),
        ("1,1024,0.0000", "1,1024,inf", "finite"),
        ("1,1024,0.0000", f"1,1024,{MOST_LOG_RATIO + 0.1}", "at most 7 in magnitude"),
        ("1,1024,0.0000", f"1,1024,-{MOST_LOG_RATIO + 0.1}", "at most 7 in magnitude"),
        ("1,2048,", "1,2049,", "sizes follow the axes"),
        ("16,1024,", "17,1024,", "sizes follow the axes"),
    ],
)
def test_bad_node_is_refused_with_its_line(folder: Path, old: str, new: str, rule: str) -> None:
    text = (folder / TABLE).read_text(encoding="utf-8")
    assert text.count(f"\n{old}") == 1
    (folder / TABLE).write_text(text.replace(f"\n{old}", f"\n{new}"), encoding="utf-8")
    error = refusal(folder)
    line = next(place for place, one in enumerate(text.splitlines(), start=1) if one.startswith(old))
    assert str(folder / TABLE) in str(error)
    assert error.key == f"line {line}"
    assert rule in str(error)


@pytest.mark.parametrize("content", [b"", b"m,n,k=512,k=1024\n", b"m,n,k=512,k=1024\n1,1024,0.0,0.0625\n"])
def test_table_of_another_shape_is_refused(folder: Path, content: bytes) -> None:
    (folder / TABLE).write_bytes(content)
    assert "rows, columns == (6, 4) by the axes in grids.toml" in str(refusal(folder))


@pytest.mark.parametrize("content", [b"m,n,k\n1,2,three\n", b"m,n,k\n1,2,3\n1,2\n", b"m,n\n\xff\xfe\x00\x01\n"])
def test_table_that_holds_no_numbers_is_refused(folder: Path, content: bytes) -> None:
    (folder / TABLE).write_bytes(content)
    error = refusal(folder)
    assert str(folder / TABLE) in str(error)
    assert "a table of numbers" in str(error)


def test_missing_table_is_refused(folder: Path) -> None:
    (folder / TABLE).unlink()
    assert "a table of numbers" in str(refusal(folder))


@pytest.mark.parametrize(("content", "rule"), [("format = 2\n", "1"), ("grid = [", "not TOML"), ("", "this key is required")])
def test_bad_file_is_refused(folder: Path, content: str, rule: str) -> None:
    (folder / GRIDS_FILE).write_text(content, encoding="utf-8")
    assert rule in str(refusal(folder))


def test_bad_profile_folder_is_refused_through_load_hardware(tmp_path: Path) -> None:
    copied = tmp_path / "a100-sxm-80gb"
    shutil.copytree(CATALOGUE_FOLDER / "a100-sxm-80gb", copied)
    table = next(copied.glob("mm-*.csv"))
    table.write_text("m,n\n", encoding="utf-8")
    with pytest.raises(InputError, match="rows, columns"):
        load_hardware(copied)


@pytest.mark.parametrize("name", catalogue_names())
def test_catalogued_curves_survive_being_written(name: str, tmp_path: Path) -> None:
    profile = load_hardware(name)
    own = tuple(grid for grid in profile.grids if grid.num_points)
    write_grids(tmp_path, own)
    assert load_grids(tmp_path, profile.laws()) == own


def test_every_kind_of_axes_has_names() -> None:
    assert all(len(set(names)) == 3 for names in AXIS_NAMES.values())
