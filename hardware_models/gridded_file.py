"""Gridded curves on disk: ``grids.toml`` with one table of nodes beside it for each curve, and curves borrowed from another device's folder."""

from __future__ import annotations

import re
import warnings
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hardware_models.errors import InputError
from hardware_models.files import whole_file
from hardware_models.gridded import GriddedCurve
from hardware_models.kernel import KernelClass
from hardware_models.physical_law import PhysicalLaw, Sizes
from hardware_models.toml_file import Count, Name, NonNegative, Positive, Section, read_section, write_toml

GRIDS_FILE = "grids.toml"
FORMAT = 1
LENDERS_FOLDER = Path(__file__).parent / "data"
"""Devices that others borrow curves from are catalogued."""
AXIS_NAMES: Mapping[Sizes, tuple[str, str, str]] = MappingProxyType(
    {
        "product": ("m", "n", "k"), "attention": ("batch_heads", "length", "heads_per_kv_head"),
        "attention-backward": ("batch_heads", "length", "heads_per_kv_head"), "decode": ("batch_kv_heads", "kv_len", "heads_per_kv_head"),
    }
)  # fmt: skip
MOST_LOG_RATIO = 7.0
"""No kernel takes a thousand times its roofline: a greater logarithm is a broken table."""


_Axis = Annotated[list[Positive], Field(min_length=1)]


class _Errors(Section):
    relative_standard_error: NonNegative
    median_error: NonNegative
    p90_error: NonNegative
    p99_error: NonNegative


class _GridSection(_Errors):
    kernel_class: KernelClass
    group: Name
    dtype: Name
    stack: Name
    sizes: Sizes
    evidence: Literal["measured", "published", "datasheet"]
    source: Name
    num_points: Count
    axes: tuple[_Axis, _Axis, _Axis]
    nodes: Annotated[str, Field(pattern=r"^[\w.-]+\.csv$")]


class _BorrowedSection(_Errors):
    kernel_class: KernelClass
    group: Name
    dtype: Name
    stack: Name
    borrowed_from: Name
    borrowed_dtype: Name
    factor: Positive
    source: Name


class _GridsFile(Section):
    format: Literal[1]
    grid: list[_GridSection] = Field(default_factory=list)
    borrowed: list[_BorrowedSection] = Field(default_factory=list)


def load_grids(folder: Path, laws: Mapping[str, PhysicalLaw]) -> tuple[GriddedCurve, ...]:
    """Gridded curves of a device's folder; none where it has no ``grids.toml``. The first of a class, operator and dtype is the one that prices training.

    Args:
        folder: of the device.
        laws: its physical law by dtype.

    Raises:
        InputError: a file breaks a rule.
    """
    path = folder / GRIDS_FILE
    if not path.exists():
        return ()
    file = read_section(_GridsFile, path)
    own = [
        _grid(section, path, position, _law(laws, section.dtype, path, position)) for position, section in enumerate(file.grid)
    ]
    lenders: dict[str, tuple[GriddedCurve, ...]] = {}
    for position, section in enumerate(file.borrowed):
        if section.borrowed_from not in lenders:
            lenders[section.borrowed_from] = _lender(LENDERS_FOLDER / section.borrowed_from, path, position, laws)
        own.append(
            _borrowed(section, lenders[section.borrowed_from], _law(laws, section.dtype, path, position), path, position)
        )
    return tuple(own)


def _law(laws: Mapping[str, PhysicalLaw], dtype: str, path: Path, position: int) -> PhysicalLaw:
    if dtype not in laws:
        raise InputError(
            source=str(path), key=f"[{position}].dtype", value=dtype, rule=f"the device has a peak for it; known are {', '.join(laws)}",
            remedy="add the peak to device.toml or remove the curve",
        )  # fmt: skip
    return laws[dtype]


def _lender(folder: Path, path: Path, position: int, laws: Mapping[str, PhysicalLaw]) -> tuple[GriddedCurve, ...]:
    """Own curves of the device that is borrowed from; their laws do not matter, they are replaced."""
    lender_path = folder / GRIDS_FILE
    if not lender_path.exists():
        raise InputError(
            source=str(path), key=f"borrowed[{position}].borrowed_from", value=folder.name, rule="a catalogued device with grids.toml",
            remedy="name a device that has been timed",
        )  # fmt: skip
    any_law = next(iter(laws.values()))
    return tuple(
        _grid(section, lender_path, place, any_law) for place, section in enumerate(read_section(_GridsFile, lender_path).grid)
    )


def _borrowed(
    section: _BorrowedSection, lender: Sequence[GriddedCurve], law: PhysicalLaw, path: Path, position: int
) -> GriddedCurve:
    key = (section.kernel_class, section.group, section.borrowed_dtype, section.stack)
    found = [curve for curve in lender if (curve.kernel_class, curve.group, curve.dtype, curve.stack) == key]
    if not found:
        raise InputError(
            source=str(path), key=f"borrowed[{position}]", value=list(key), rule=f"{section.borrowed_from} has a grid of this class, operator, dtype and stack",
            remedy="name one that it has",
        )  # fmt: skip
    return found[0].borrowed(
        law, dtype=section.dtype, factor=section.factor, source=section.source, relative_standard_error=section.relative_standard_error,
        median_error=section.median_error, p90_error=section.p90_error, p99_error=section.p99_error,
    )  # fmt: skip


def _grid(section: _GridSection, path: Path, position: int, law: PhysicalLaw) -> GriddedCurve:
    for name, axis in zip(AXIS_NAMES[section.sizes], section.axes, strict=True):
        for before, after in pairwise(axis):
            if not before < after:
                raise InputError(
                    source=str(path), key=f"grid[{position}].axes ({name})", value=after, rule=f"sizes increase strictly, but this one follows {before:g}",
                    remedy="sort the axis and the rows of its table",
                )  # fmt: skip
    if (section.kernel_class == "gemm") != (section.sizes == "product"):
        raise InputError(
            source=str(path), key=f"grid[{position}].sizes", value=section.sizes, rule=f"axes that kernels of class {section.kernel_class} have",
            remedy="product for gemm, the others for attention",
        )  # fmt: skip
    values = section.model_dump(exclude={"nodes"}) | {"axes": tuple(tuple(axis) for axis in section.axes)}
    return GriddedCurve(**values, law=law, log_ratios=_nodes(path.with_name(section.nodes), section))


def _nodes(path: Path, section: _GridSection) -> NDArray[np.float64]:
    """The table of nodes: a row for each pair of sizes on the first two axes, then a column for each size on the third."""
    lengths = [len(axis) for axis in section.axes]
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", UserWarning)  # of an empty table, which is refused below
            rows = np.loadtxt(path, delimiter=",", skiprows=1, ndmin=2)
    except (OSError, ValueError) as problem:
        raise InputError(
            source=str(path), key="", value=None, rule=f"a table of numbers: {problem}", remedy="restore the file"
        ) from problem
    expected = lengths[0] * lengths[1], lengths[2] + 2
    if rows.shape != expected:
        raise InputError(
            source=str(path), key="", value=list(rows.shape), rule=f"rows, columns == {expected} by the axes in {GRIDS_FILE}", remedy="restore both files",
        )  # fmt: skip
    first, second = np.meshgrid(section.axes[0], section.axes[1], indexing="ij")
    wrong = np.flatnonzero((rows[:, 0] != first.ravel()) | (rows[:, 1] != second.ravel()))
    broken = np.argwhere(~(np.abs(rows[:, 2:]) <= MOST_LOG_RATIO))
    if len(wrong) or len(broken):
        line = int(wrong[0] if len(wrong) else broken[0][0])
        rule = (
            "sizes follow the axes"
            if len(wrong)
            else f"logarithms of measured over law are finite and at most {MOST_LOG_RATIO:g} in magnitude"
        )
        raise InputError(
            source=str(path), key=f"line {line + 2}", value=rows[line].tolist(), rule=rule, remedy="restore the file"
        )
    return np.ascontiguousarray(rows[:, 2:].reshape(lengths))


def write_grids(folder: Path, curves: Sequence[GriddedCurve], borrowed: Sequence[Mapping[str, object]] = ()) -> None:
    """Writes ``grids.toml`` and the tables of nodes (four decimals: 0.01%).

    Args:
        folder: of the device.
        curves: its own, the one that prices training first.
        borrowed: sections of curves of other devices: class, group, dtype, stack, lender and its dtype, factor, source, errors.
    """
    sections = []
    for curve in curves:
        name = re.sub(r"[^\w.-]+", "-", f"{curve.group}-{curve.dtype}-{curve.stack}").lower() + ".csv"
        _write_nodes(folder / name, curve)
        sections.append(
            {
                "kernel_class": curve.kernel_class, "group": curve.group, "dtype": curve.dtype, "stack": curve.stack, "sizes": curve.sizes,
                "evidence": curve.evidence, "source": curve.source, "num_points": curve.num_points, "nodes": name,
                **{key: round(float(getattr(curve, key)), 4) for key in _Errors.model_fields}, "axes": [list(axis) for axis in curve.axes],
            }
        )  # fmt: skip
    write_toml(folder / GRIDS_FILE, {"format": FORMAT, "grid": sections, "borrowed": [dict(section) for section in borrowed]})


def _write_nodes(path: Path, curve: GriddedCurve) -> None:
    first, second = np.meshgrid(curve.axes[0], curve.axes[1], indexing="ij")
    table = np.column_stack([first.ravel(), second.ravel(), curve.log_ratios.reshape(first.size, -1)])
    names = AXIS_NAMES[curve.sizes]
    header = ",".join([names[0], names[1], *(f"{names[2]}={size:g}" for size in curve.axes[2])])
    with whole_file(path) as temporary:
        np.savetxt(
            temporary, table, fmt=["%d", "%d", *["%.4f"] * len(curve.axes[2])], delimiter=",", header=header, comments=""
        )
