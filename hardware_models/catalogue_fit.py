"""Fits the catalogue's gridded curves to published timings: ``python -m hardware_models.catalogue_fit --measurements DIR``."""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np

from hardware_models.aliases import device_named
from hardware_models.catalogue import CATALOGUE_FOLDER, catalogue_names, load_hardware
from hardware_models.gridded import GriddedCurve
from hardware_models.gridded_file import write_grids
from hardware_models.gridded_fit import fit_gridded
from hardware_models.kernel_tables import TRAINING_ATTENTION, TimedKernel, read_kernels
from hardware_models.physical_law import Floats, Integers, Sizes
from hardware_models.profile import DeviceProfile

GRID_TABLES = ("gemm_latency_aiconfigurator.csv", "attention_prefill_aiconfigurator.csv", "attention_decode_aiconfigurator.csv")
"""Tables of kernels timed alone on full grids of sizes."""
TRAINING_TABLE = "op_efficiency_simumax_b200_a100pcie.csv"
"""Attention as training frameworks run it, forward and backward, at few shapes."""
TIMED_IN_TRAINING = MappingProxyType({"b200": "b200", "a100-sxm-80gb": "a100-pcie-80gb"})
"""Devices with a grid of attention, and the device of that table whose timings shift it (the PCIe board's clock is the same, its power limit lower)."""
SIZES_OF_GROUP: Mapping[str, Sizes] = MappingProxyType(
    {"mm": "product", "attention": "attention", "attention_decode": "decode", "attention_backward": "attention-backward"}
)
STACK_ORDER = (
    "transformer-engine", "torch.nn.functional.linear", "vllm_default", "CutlassFP8ScaledMMLinearKernel", "torch_flow", "vllm_flash_attn_fa3",
)  # fmt: skip
"""Software nearest to torch's own first: it prices training. Eight-bit products: the scaled product of CUTLASS, as ``torch._scaled_mm``, before TensorRT-LLM's, which on H100
is hardly faster than its own bfloat16. Attention was timed in one stack on all devices, which comes before another's."""
NOISY = frozenset({("b200", "CutlassFP8ScaledMMLinearKernel")})
"""(device, stack) whose neighbouring shapes scatter too much to price training by."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Timings:
    """Timings of one operator, dtype and stack on one device."""

    device: str
    group: str
    dtype: str
    stack: str
    shapes: Integers
    seconds: Floats
    source: str


def group_of_timing(row: TimedKernel) -> str:
    """The group whose curve a timing belongs to."""
    if row.kernel.kernel_class == "gemm":
        return "mm"
    if row.kernel.op == "attention" and row.kernel.shape[3] == 1:
        return "attention_decode"
    return row.kernel.op


def gathered(rows: Iterable[TimedKernel]) -> tuple[Timings, ...]:
    """Timings by device, operator, dtype and stack, in the order of `STACK_ORDER`."""
    found: dict[tuple[str, str, str, str], list[TimedKernel]] = {}
    for row in rows:
        found.setdefault((device_named(row.device), group_of_timing(row), row.kernel.dtype, row.stack), []).append(row)
    order = {stack: place for place, stack in enumerate(STACK_ORDER)}
    keys = sorted(found, key=lambda key: (*key[:3], (key[0], key[3]) in NOISY, order.get(key[3], len(order)), key[3]))
    return tuple(
        Timings(
            device=key[0], group=key[1], dtype=key[2], stack=key[3], shapes=np.array([row.kernel.shape for row in found[key]], dtype=np.int64),
            seconds=np.array([row.seconds for row in found[key]]), source=found[key][0].source,
        )
        for key in keys
    )  # fmt: skip


def fitted(timings: Timings, profile: DeviceProfile) -> GriddedCurve:
    """The curve through the timings, under the profile's law."""
    return fit_gridded(
        timings.shapes, timings.seconds, kernel_class="gemm" if timings.group == "mm" else "attention", group=timings.group, dtype=timings.dtype,
        stack=timings.stack, sizes=SIZES_OF_GROUP[timings.group], law=profile.laws()[timings.dtype], source=timings.source,
    )  # fmt: skip


GENERATIONS = MappingProxyType(
    {"pascal": 0.0, "volta": 1.0, "turing": 2.0, "ampere": 3.0, "ada": 3.4, "hopper": 4.4, "blackwell": 5.4}
)
"""Places in the order of release: devices borrow from the nearest that was timed. Ada's tensor cores take the instructions of Ampere's (``mma.sync``; NVIDIA, PTX
ISA), Hopper's have their own (``wgmma``), so Ada stands nearer to Ampere."""
BACKWARD_OVER_FORWARD = 1.08
"""Time over law of attention's backward pass over that of its forward pass.

**Source**: B200 1.07 and A100 PCIe 1.08, medians of 32 and 12 shapes, MooreThreads/SimuMax configs/system @4dcaae513b (both passes by one library).
"""
BACKWARD_ERROR = 0.2
"""Relative standard error of that ratio: the spread over those shapes."""
DTYPES_BORROWED = ("bfloat16", "float16", "float8_e4m3fn", "tf32")
_LIKE = MappingProxyType({"float16": "bfloat16", "tf32": "bfloat16"})
"""Dtypes without timings take the ratios of another: the tensor cores' tiles are the same, the law has the dtype's own peak and bytes."""
_TRIMMED = 0.99


@dataclass(frozen=True, slots=True, kw_only=True)
class Transfer:
    """How well one device's timings are met with another's ratios under its own law."""

    device: str
    lender: str
    group: str
    dtype: str
    same_generation: bool
    errors: Floats
    """Magnitudes of the relative errors."""


def training_curve(forward: GriddedCurve, rows: Sequence[TimedKernel]) -> GriddedCurve:
    """Attention as training frameworks run it: a grid of other software, shifted by the median of the logarithms of a few timings over it.

    Args:
        forward: the grid.
        rows: timings of forward passes by `TRAINING_ATTENTION`.
    """
    shapes = np.array([row.kernel.shape for row in rows], dtype=np.int64)
    logs = np.log(np.array([row.seconds for row in rows]) / forward.seconds(shapes))
    shift = float(np.median(logs))
    errors = np.sort(np.abs(np.expm1(logs - shift)))
    return replace(
        forward, stack=TRAINING_ATTENTION, log_ratios=forward.log_ratios + shift, num_points=len(rows), source=f"{forward.source}; shifted to {rows[0].source}",
        relative_standard_error=float(np.sqrt(np.mean(errors**2))), median_error=float(np.median(errors)), p90_error=float(np.quantile(errors, 0.9)),
        p99_error=float(np.quantile(errors, 0.99)),
    )  # fmt: skip


def backward_curve(forward: GriddedCurve) -> GriddedCurve:
    """Attention's backward pass, from the grid of its forward pass (`BACKWARD_OVER_FORWARD`)."""
    error = float(np.hypot(forward.relative_standard_error, BACKWARD_ERROR))
    return replace(
        forward, group="attention_backward", sizes="attention-backward", log_ratios=forward.log_ratios + np.log(BACKWARD_OVER_FORWARD), relative_standard_error=error,
        source=f"{forward.source}; times {BACKWARD_OVER_FORWARD}: MooreThreads/SimuMax configs/system @4dcaae513b",
    )  # fmt: skip


def lender_of(profile: DeviceProfile, candidates: Sequence[DeviceProfile]) -> DeviceProfile:
    """The timed device whose ratios another takes: nearest generation, then nearest balance of arithmetic to bandwidth."""

    def distance(other: DeviceProfile) -> tuple[float, float]:
        generations = abs(GENERATIONS[profile.architecture] - GENERATIONS[other.architecture])
        return generations, abs(float(np.log(_balance(other) / _balance(profile))))

    return min(candidates, key=distance)


def _balance(profile: DeviceProfile) -> float:
    peaks = profile.peak_flops_per_s
    return peaks.get("bfloat16", peaks.get("float16", peaks["float32"])) / profile.memory_bandwidth_bytes_per_s


def transfers(
    timings: Sequence[Timings], curves: Mapping[str, Sequence[GriddedCurve]], profiles: Mapping[str, DeviceProfile]
) -> tuple[Transfer, ...]:
    """Each timed device predicted without its own timings, from the device that it would borrow from."""
    found = []
    for one in timings:
        profile = profiles[one.device]
        first = next(
            (
                curve
                for curve in curves[one.device]
                if (curve.group, curve.dtype) == (one.group, one.dtype) and curve.stack != TRAINING_ATTENTION
            ),
            None,
        )
        others = [profiles[name] for name in curves if name != one.device and _first(curves[name], one.group, one.dtype)]
        if first is None or first.stack != one.stack or not others:
            continue
        lender = lender_of(profile, others)
        borrowed = _first(curves[lender.name], one.group, one.dtype, stack=one.stack)
        assert borrowed is not None
        predicted = replace(borrowed, law=profile.laws()[one.dtype]).seconds(one.shapes)
        found.append(
            Transfer(
                device=one.device, lender=lender.name, group=one.group, dtype=one.dtype, same_generation=lender.architecture == profile.architecture,
                errors=np.abs(predicted / one.seconds - 1.0),
            )
        )  # fmt: skip
    return tuple(found)


def _first(curves: Sequence[GriddedCurve], group: str, dtype: str, *, stack: str = "") -> GriddedCurve | None:
    """The curve of an operator in a dtype: that of ``stack`` if there is one, else the first."""
    found = [curve for curve in curves if (curve.group, curve.dtype) == (group, dtype)]
    return next((curve for curve in found if curve.stack == stack), found[0] if found else None)


def borrowed_sections(
    profile: DeviceProfile, own: Sequence[GriddedCurve], curves: Mapping[str, Sequence[GriddedCurve]], profiles: Mapping[str, DeviceProfile],
    seen: Sequence[Transfer],
) -> list[dict[str, object]]:  # fmt: skip
    """Sections of ``grids.toml`` for the operators and dtypes that were not timed on a device but on others."""
    sections: list[dict[str, object]] = []
    for group in SIZES_OF_GROUP:
        for dtype in DTYPES_BORROWED:
            if dtype not in profile.laws() or _first(own, group, dtype):
                continue
            source_dtype = dtype if any(_first(others, group, dtype) for others in curves.values()) else _LIKE.get(dtype, dtype)
            lenders = [profiles[name] for name in curves if _first(curves[name], group, source_dtype)]
            if not lenders:
                continue
            lender = profile if _first(own, group, source_dtype) else lender_of(profile, lenders)
            curve = _first(curves[lender.name], group, source_dtype)
            assert curve is not None
            same = lender.architecture == profile.architecture
            sections.append(
                {
                    "kernel_class": curve.kernel_class, "group": group, "dtype": dtype, "stack": curve.stack, "borrowed_from": lender.name,
                    "borrowed_dtype": source_dtype, "factor": 1.0,
                    "source": f"ratios to the roofline of {lender.name} in {source_dtype} ({curve.source}), roofline by the data sheet",
                    **_transfer_errors(seen, group, same_generation=same),
                }
            )  # fmt: skip
    return sections


def _transfer_errors(seen: Sequence[Transfer], group: str, *, same_generation: bool) -> dict[str, float]:
    """Errors of timed devices predicted from another of the same, or of another generation."""
    timed = "attention" if group == "attention_backward" else group
    fitting = [one.errors for one in seen if one.group == timed and one.same_generation == same_generation]
    errors = np.sort(np.concatenate(fitting or [one.errors for one in seen if one.group == timed]))
    kept = errors[: int(_TRIMMED * len(errors))]
    spread = float(np.sqrt(np.mean(kept**2)))
    return {
        "relative_standard_error": round(float(np.hypot(spread, BACKWARD_ERROR if group == "attention_backward" else 0.0)), 4),
        "median_error": round(float(np.median(errors)), 4), "p90_error": round(float(np.quantile(errors, 0.9)), 4), "p99_error": round(float(np.quantile(errors, 0.99)), 4),
    }  # fmt: skip


def fit_catalogue(
    measurements: Path, folder: Path = CATALOGUE_FOLDER
) -> tuple[dict[str, tuple[GriddedCurve, ...]], tuple[Transfer, ...]]:
    """Fits every table of `GRID_TABLES` and writes ``grids.toml`` of every catalogued GPU; returns the curves by device and the transfers between devices."""
    rows = [row for name in GRID_TABLES for row in read_kernels(measurements / name)]
    training = [row for row in read_kernels(measurements / TRAINING_TABLE) if row.kernel.op == "attention"]
    timings = gathered(rows)
    profiles = {name: load_hardware(name) for name in catalogue_names()}
    curves: dict[str, tuple[GriddedCurve, ...]] = {}
    for one in timings:
        curve = fitted(one, profiles[one.device])
        found = [curve]
        if one.group == "attention":
            shifted = [row for row in training if device_named(row.device) == TIMED_IN_TRAINING.get(one.device)]
            found = [training_curve(curve, shifted), curve] if shifted else [curve]
            found += [backward_curve(forward) for forward in found]
        curves[one.device] = (*curves.get(one.device, ()), *found)
    seen = transfers(timings, curves, profiles)
    for name, profile in profiles.items():
        own = curves.get(name, ())
        write_grids(folder / name, own, borrowed_sections(profile, own, curves, profiles, seen))
    return curves, seen


def main() -> None:
    """Command line of `fit_catalogue`; prints the errors as Markdown tables."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--measurements", type=Path, required=True, help="folder of the published tables")
    parser.add_argument("--out", type=Path, default=CATALOGUE_FOLDER, help="folder of the devices' folders")
    options = parser.parse_args()
    curves, seen = fit_catalogue(options.measurements, options.out)
    lines = ["| device | operator | dtype | stack | timings | median | p90 | p99 |", "|---|---|---|---|---|---|---|---|"]
    lines += [
        f"| {name} | {curve.group} | {curve.dtype} | {curve.stack} | {curve.num_points} | {curve.median_error:.1%} | {curve.p90_error:.1%} | {curve.p99_error:.1%} |"
        for name, own in curves.items() for curve in own if curve.group != "attention_backward"
    ]  # fmt: skip
    lines += ["", "| device | predicted from | operator | dtype | median | p90 |", "|---|---|---|---|---|---|"]
    lines += [
        f"| {one.device} | {one.lender} | {one.group} | {one.dtype} | {np.median(one.errors):.1%} | {np.quantile(one.errors, 0.9):.1%} |"
        for one in seen
    ]
    sys.stdout.write("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
