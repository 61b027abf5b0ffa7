"""The fits of the catalogue: gathering, lenders, transfers, and that fitting again gives the committed files."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hardware_models.catalogue import CATALOGUE_FOLDER, catalogue_names, load_hardware
from hardware_models.catalogue_fit import (
    BACKWARD_ERROR,
    BACKWARD_OVER_FORWARD,
    GENERATIONS,
    GRID_TABLES,
    SIZES_OF_GROUP,
    STACK_ORDER,
    Timings,
    backward_curve,
    borrowed_sections,
    fit_catalogue,
    fitted,
    gathered,
    group_of_timing,
    lender_of,
    transfers,
)
from hardware_models.gridded import GriddedCurve
from hardware_models.kernel import Kernel
from hardware_models.kernel_tables import TimedKernel, attention_kernel, gemm_kernel
from hardware_models.physical_law import law_seconds
from hardware_models.profile import DeviceProfile

MEASUREMENTS = Path(__file__).parents[3] / "shared" / "measurements"
PROFILES = {name: load_hardware(name) for name in catalogue_names()}
TIMED = tuple(name for name, profile in PROFILES.items() if any(grid.num_points for grid in profile.grids))
SIZES = [(m, n, k) for m in (1, 64, 1024, 8192) for n in (1024, 4096) for k in (1024, 4096)]


def timed(
    kernel: Kernel, *, device: str = "NVIDIA H100 80GB HBM3", stack: str = "torch_flow", seconds: float = 1e-3
) -> TimedKernel:
    return TimedKernel(device=device, stack=stack, kernel=kernel, seconds=seconds, op="test", source="a table", line=2)


def timings_of(device: str, factor: float = 1.0) -> Timings:
    """Products that take ``factor`` times a device's law."""
    shapes = np.array(SIZES, dtype=np.int64)
    seconds = factor * law_seconds("product", shapes, PROFILES[device].laws()["bfloat16"])
    return Timings(
        device=device, group="mm", dtype="bfloat16", stack="torch_flow", shapes=shapes, seconds=seconds, source="a table"
    )


def test_groups_of_timings() -> None:
    assert group_of_timing(timed(gemm_kernel(1, 2, 3, "bfloat16"))) == "mm"
    forward = attention_kernel(1, 8, 8, 64, 64, 64, "bfloat16", causal=True)
    assert group_of_timing(timed(forward)) == "attention"
    assert (
        group_of_timing(timed(attention_kernel(1, 8, 8, 64, 64, 64, "bfloat16", causal=True, backward=True)))
        == "attention_backward"
    )
    assert group_of_timing(timed(attention_kernel(1, 8, 8, 1, 64, 64, "bfloat16", causal=False))) == "attention_decode"


def test_timings_are_gathered_by_device_dtype_and_stack_nearest_to_torch_first() -> None:
    product = gemm_kernel(8, 1024, 1024, "bfloat16")
    rows = [
        timed(product, stack="zeta"),
        timed(product, stack=STACK_ORDER[2]),
        timed(product, stack=STACK_ORDER[0], seconds=2e-3),
        timed(gemm_kernel(8, 1024, 1024, "float8_e4m3fn"), stack="zeta"),
        timed(product, device="NVIDIA A100-SXM4-80GB", stack="zeta"),
        timed(gemm_kernel(16, 1024, 1024, "bfloat16"), stack="zeta"),
    ]
    found = gathered(rows)
    assert [(one.device, one.dtype, one.stack) for one in found] == [
        ("a100-sxm-80gb", "bfloat16", "zeta"),
        ("h100-sxm", "bfloat16", STACK_ORDER[0]),
        ("h100-sxm", "bfloat16", STACK_ORDER[2]),
        ("h100-sxm", "bfloat16", "zeta"),
        ("h100-sxm", "float8_e4m3fn", "zeta"),
    ]
    assert found[1].seconds.tolist() == [2e-3]
    assert found[3].shapes.tolist() == [[8, 1024, 1024], [16, 1024, 1024]]


def test_fit_takes_the_devices_law() -> None:
    curve = fitted(timings_of("h100-sxm", 1.2), PROFILES["h100-sxm"])
    assert curve.law == PROFILES["h100-sxm"].laws()["bfloat16"]
    assert (curve.kernel_class, curve.group, curve.sizes, curve.num_points) == ("gemm", "mm", "product", len(SIZES))
    assert np.exp(curve.log_ratios) == pytest.approx(np.full(curve.log_ratios.shape, 1.2), rel=1e-3)


def test_backward_by_hand() -> None:
    forward = next(grid for grid in PROFILES["h100-sxm"].grids if grid.group == "attention")
    backward = backward_curve(forward)
    assert np.exp(backward.log_ratios - forward.log_ratios) == pytest.approx(
        np.full(forward.log_ratios.shape, BACKWARD_OVER_FORWARD)
    )
    assert backward.relative_standard_error == pytest.approx(np.hypot(forward.relative_standard_error, BACKWARD_ERROR))
    shape = np.array([(4, 32, 8, 4096, 4096, 128, 1)], dtype=np.int64)
    # five products for two where arithmetic decides
    assert backward.seconds(shape)[0] / forward.seconds(shape)[0] == pytest.approx(2.5 * BACKWARD_OVER_FORWARD, rel=0.02)


@pytest.mark.parametrize(
    ("borrower", "lender"),
    [
        ("l4", "a100-sxm-80gb"),
        ("a100-pcie-80gb", "a100-sxm-80gb"),
        ("v100-sxm2-32gb", "a100-sxm-80gb"),
        ("gb300", "gb200"),
        ("h100-pcie", "h100-sxm"),
    ],
)
def test_lender_is_of_the_nearest_generation_and_balance(borrower: str, lender: str) -> None:
    candidates = [PROFILES[name] for name in ("a100-sxm-80gb", "h100-sxm", "h200-sxm", "b200", "gb200")]
    found = lender_of(PROFILES[borrower], candidates)
    distance = abs(GENERATIONS[found.architecture] - GENERATIONS[PROFILES[borrower].architecture])
    assert distance == min(
        abs(GENERATIONS[one.architecture] - GENERATIONS[PROFILES[borrower].architecture]) for one in candidates
    )
    assert found.name == lender


def test_every_architecture_has_its_place() -> None:
    assert {profile.architecture for profile in PROFILES.values()} <= set(GENERATIONS)


def test_transfer_between_devices_that_follow_their_laws_is_exact() -> None:
    timings = (timings_of("h100-sxm", 1.2), timings_of("a100-sxm-80gb", 1.2))
    curves = {one.device: (fitted(one, PROFILES[one.device]),) for one in timings}
    seen = transfers(timings, curves, PROFILES)
    assert [(one.device, one.lender, one.same_generation) for one in seen] == [
        ("h100-sxm", "a100-sxm-80gb", False),
        ("a100-sxm-80gb", "h100-sxm", False),
    ]
    assert max(one.errors.max() for one in seen) < 2e-3


def test_transfer_errors_are_the_difference_of_the_ratios() -> None:
    timings = (timings_of("h100-sxm", 1.0), timings_of("h200-sxm", 1.25))
    curves = {one.device: (fitted(one, PROFILES[one.device]),) for one in timings}
    by_device = {one.device: one for one in transfers(timings, curves, PROFILES)}
    assert np.median(by_device["h100-sxm"].errors) == pytest.approx(0.25, abs=0.01)
    assert np.median(by_device["h200-sxm"].errors) == pytest.approx(0.2, abs=0.01)
    assert by_device["h100-sxm"].same_generation


def sections_of(name: str, curves: Mapping[str, tuple[GriddedCurve, ...]]) -> list[dict[str, object]]:
    timings = tuple(timings_of(device) for device in curves)
    return borrowed_sections(PROFILES[name], curves.get(name, ()), curves, PROFILES, transfers(timings, curves, PROFILES))


def test_borrowed_sections_name_lender_dtype_and_errors() -> None:
    curves = {name: (fitted(timings_of(name, 1.1), PROFILES[name]),) for name in ("h100-sxm", "a100-sxm-80gb")}
    own = {str(section["dtype"]): section for section in sections_of("h100-sxm", curves)}
    assert set(own) == {"float16", "tf32"}  # bfloat16 is its own; nobody has timed eight bits here
    assert {section["borrowed_from"] for section in own.values()} == {"h100-sxm"}
    other = {str(section["dtype"]): section for section in sections_of("v100-sxm2-32gb", curves)}
    assert set(other) == {"float16"}
    assert (other["float16"]["borrowed_from"], other["float16"]["borrowed_dtype"]) == ("a100-sxm-80gb", "bfloat16")


# the committed files


@pytest.mark.parametrize("name", TIMED)
def test_committed_curves_state_their_errors(name: str) -> None:
    for grid in PROFILES[name].grids:
        assert 0.0 < grid.median_error < grid.p90_error < grid.p99_error
        assert grid.sizes == SIZES_OF_GROUP[grid.group]
        assert grid.evidence == ("published" if grid.num_points else "datasheet")
        assert "@" in grid.source or "parquet" in grid.source


@pytest.mark.parametrize("name", [name for name, profile in PROFILES.items() if profile.kind == "cuda"])
def test_every_gpu_has_a_curve_of_every_operator_in_half_precision(name: str) -> None:
    profile: DeviceProfile = PROFILES[name]
    found = {(grid.group, grid.dtype) for grid in profile.grids}
    halves = [dtype for dtype in ("float16", "bfloat16") if dtype in profile.laws()]
    assert halves
    assert {(group, dtype) for group in SIZES_OF_GROUP for dtype in halves} <= found


@pytest.mark.parametrize("name", TIMED)
def test_first_stack_of_products_is_the_one_nearest_to_torch(name: str) -> None:
    stacks = [grid.stack for grid in PROFILES[name].grids if (grid.group, grid.dtype) == ("mm", "bfloat16") and grid.num_points]
    assert stacks == sorted(stacks, key=STACK_ORDER.index)


@pytest.mark.slow
@pytest.mark.skipif(not MEASUREMENTS.exists(), reason="the published tables are not beside the repository")
def test_fitting_again_gives_the_committed_files(tmp_path: Path) -> None:
    assert all((MEASUREMENTS / table).exists() for table in GRID_TABLES)
    curves, _seen = fit_catalogue(MEASUREMENTS, tmp_path)
    assert set(curves) == set(TIMED)
    for name, profile in PROFILES.items():
        committed = {
            path.name for path in (CATALOGUE_FOLDER / name).iterdir() if path.suffix == ".csv" or path.name == "grids.toml"
        }
        assert {path.name for path in (tmp_path / name).iterdir()} == committed
        own = tuple(grid for grid in profile.grids if grid.num_points)
        for fresh, kept in zip(curves[name] if own else (), own, strict=True):
            assert fresh.log_ratios == pytest.approx(kept.log_ratios, abs=2e-4)
            rounded = {
                key: getattr(kept, key)
                for key in ("log_ratios", "relative_standard_error", "median_error", "p90_error", "p99_error")
            }
            assert replace(fresh, **rounded) == kept
            assert fresh.median_error == pytest.approx(kept.median_error, abs=2e-4)
