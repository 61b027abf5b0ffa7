"""One picture of each catalogued GPU: ``python -m hardware_models.gallery_figures --out DIR [--measurements DIR]``.

Lines are what the project prices, points are published timings. Panels: products, attention, memory-bound kernels, collectives inside a node.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass, field
from io import BytesIO
from math import log2
from pathlib import Path
from typing import TypeVar

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure
from PIL import Image

from hardware_models.aliases import device_named
from hardware_models.catalogue import catalogue_names, load_hardware
from hardware_models.files import whole_file
from hardware_models.gridded import GriddedCurve
from hardware_models.kernel_tables import TimedKernel, TimedStream, is_kernel_table, is_stream_table, read_kernels, read_streams
from hardware_models.network.cluster import CommGroup
from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.collective_algorithms import bus_factor
from hardware_models.network.collective_curves import CollectiveStack, catalogued_stacks
from hardware_models.network.collectives import price_collectives
from hardware_models.network.network_tables import TimedCollective, is_collective_table, read_collectives
from hardware_models.network.platforms import stack_name
from hardware_models.physical_law import Floats, Integers, work
from hardware_models.profile import DeviceProfile
from hardware_models.units import DTYPE_BYTES, GB, TFLOP

COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9")
"""Colours of Okabe and Ito, which readers with any colour vision tell apart."""
PRODUCTS = ((1024, 1024), (4096, 4096), (7168, 16384), (51200, 7168))
"""Columns and summed sizes of the products that are drawn."""
ATTENTIONS = ((1, 8, 1), (1, 32, 32), (2, 64, 4), (8, 32, 4))
"""Batch, heads and key-value heads of the attentions that are drawn."""
HEAD_DIM = 128
DTYPES = ("bfloat16", "float16")
"""The first that a device has is drawn."""
RANKS = ((2, ":"), (4, "--"), (8, "-"))
"""Numbers of GPUs in a collective, with their lines."""
_ROWS = np.unique(np.rint(np.geomspace(1, 2**17, 80))).astype(np.int64)
_LENGTHS = np.unique(np.rint(np.geomspace(256, 2**16, 50))).astype(np.int64)
_MOVED = np.geomspace(2**15, 2**32, 120)
_SIZES = np.geomspace(2**10, 2**31, 90)
_POINTS_PER_OCTAVE = 2
"""More points of one line than this are thinned."""
_LEAST_RATE_SHARE = 2e-4
"""Bottom of the axis of rates, over the peak."""
_WIDTH_IN, _HEIGHT_IN, _DOTS_PER_INCH = 10.0, 7.2, 76
_SHADES, _GREYS = 16, 32
"""Of each colour towards white, and between black and white: a picture holds no others, which keeps files small."""
_SMALL = 6.5
"""Points of the legends' letters."""
_Row = TypeVar("_Row")


@dataclass(frozen=True, slots=True, kw_only=True)
class Published:
    """Timings to draw as points."""

    kernels: tuple[TimedKernel, ...] = ()
    streams: tuple[TimedStream, ...] = ()
    collectives: tuple[TimedCollective, ...] = ()


@dataclass(slots=True, kw_only=True)
class _Tables:
    kernels: list[TimedKernel] = field(default_factory=list)
    streams: list[TimedStream] = field(default_factory=list)
    collectives: list[TimedCollective] = field(default_factory=list)


def read_published(measurements: Path) -> Published:
    """Timings of all tables in a folder that a reader knows; other files are not about kernels, memory or collectives.

    Raises:
        InputError: a value of a table breaks a rule.
    """
    tables = _Tables()
    for path in sorted(measurements.glob("*.csv")):
        if is_kernel_table(path):
            tables.kernels += read_kernels(path)
        elif is_stream_table(path):
            tables.streams += [row for row in read_streams(path) if row.op == "small_kernel"]
        elif is_collective_table(path):
            tables.collectives += read_collectives(path)
    return Published(kernels=tuple(tables.kernels), streams=tuple(tables.streams), collectives=tuple(tables.collectives))


def device_figure(profile: DeviceProfile, published: Published | None = None) -> Figure:
    """The picture of a device; a panel says so where nothing is known."""
    published = published or Published()
    figure = Figure(figsize=(_WIDTH_IN, _HEIGHT_IN), layout="constrained")
    axes = figure.subplots(2, 2).ravel()
    drawn = (
        draw_products(axes[0], profile, published.kernels),
        draw_attention(axes[1], profile, published.kernels),
        draw_ramp(axes[2], profile, published.streams),
        draw_collectives(axes[3], profile.name, published.collectives),
    )
    for panel, known in zip(axes, drawn, strict=True):
        if not known:
            panel.set_axis_off()
            continue
        panel.grid(visible=True, linewidth=0.3)
        panel.legend(fontsize=_SMALL, loc="best", framealpha=0.6)
        panel.tick_params(labelsize=7, which="both")
    figure.suptitle(f"{profile.name}: lines are prices, points are published timings", fontsize=10)
    return figure


def has_picture(profile: DeviceProfile) -> bool:
    """Whether there is anything to draw: a grid or a ramp."""
    return bool(profile.grids) or profile.light is not None


def drawn_grid(profile: DeviceProfile, group: str) -> GriddedCurve | None:
    """The curve of an operator that is drawn: of the first of `DTYPES` that has one, that with most timings, the first of equals."""
    for dtype in DTYPES:
        found = [grid for grid in profile.grids if (grid.group, grid.dtype) == (group, dtype)]
        if found:
            return max(found, key=lambda grid: grid.num_points)
    return None


def draw_products(axes: Axes, profile: DeviceProfile, kernels: Sequence[TimedKernel]) -> bool:
    """FLOP/s of products over their rows, with the peak and each roofline; whether there was a curve."""
    grid = drawn_grid(profile, "mm")
    if grid is None:
        return False
    peak, width = profile.peak(grid.dtype), DTYPE_BYTES[grid.dtype]
    timed = [row for row in _of_grid(grid, profile.name, kernels) if row.kernel.kernel_class == "gemm"]
    for colour, (columns, summed) in zip(COLOURS, PRODUCTS, strict=False):
        shapes = np.stack([_ROWS, np.full_like(_ROWS, columns), np.full_like(_ROWS, summed)], axis=1)
        flops, read, written = work("product", shapes)
        axes.plot(_ROWS, flops / grid.seconds(shapes) / TFLOP, color=colour, linewidth=1, label=f"n = {columns}, k = {summed}")
        roofline_s = np.maximum(flops / peak, width * (read + written) / profile.memory_bandwidth_bytes_per_s)
        axes.plot(_ROWS, flops / roofline_s / TFLOP, color=colour, linewidth=0.5, linestyle=":")
        points = [row for row in timed if row.kernel.shape[1:] == (columns, summed)]
        _scatter(
            axes, [row.kernel.shape[0] for row in points], [row.kernel.flops / row.seconds / TFLOP for row in points], colour
        )
    axes.axhline(peak / TFLOP, color="black", linewidth=0.7, linestyle="--", label="peak (dense); dots: rooflines")
    _log_axes(axes, "rows m", "TFLOP/s")
    axes.set_ylim(bottom=_LEAST_RATE_SHARE * peak / TFLOP)
    axes.set_title(f"products, {_origin(grid)}", fontsize=8)
    return True


def draw_attention(axes: Axes, profile: DeviceProfile, kernels: Sequence[TimedKernel]) -> bool:
    """FLOP/s of causal attention over a prompt, the unmasked part counted, over its length; whether there was a curve."""
    grid = drawn_grid(profile, "attention")
    if grid is None:
        return False
    timed = [row for row in _of_grid(grid, profile.name, kernels) if row.op == "attention_prefill"]
    for colour, heads in zip(COLOURS, ATTENTIONS, strict=False):
        shapes = _attention_shapes(heads, _LENGTHS)
        rate = work("attention", shapes)[0] / grid.seconds(shapes) / TFLOP
        axes.plot(_LENGTHS, rate, color=colour, linewidth=1, label="batch {}, {} heads, {} key-value heads".format(*heads))
        points = [row for row in timed if (*row.kernel.shape[:3], row.kernel.shape[5]) == (*heads, HEAD_DIM)]
        lengths = np.array([row.kernel.shape[3] for row in points], dtype=np.int64)
        flops = work("attention", _attention_shapes(heads, lengths))[0]
        _scatter(
            axes, lengths.tolist(), [float(one) / row.seconds / TFLOP for one, row in zip(flops, points, strict=True)], colour
        )
    axes.axhline(profile.peak(grid.dtype) / TFLOP, color="black", linewidth=0.7, linestyle="--", label="peak (dense)")
    _log_axes(axes, "tokens", "TFLOP/s")
    axes.set_title(f"causal attention forward, {_origin(grid)}", fontsize=8)
    return True


def _attention_shapes(heads: tuple[int, int, int], lengths: Integers) -> Integers:
    """Shapes as in `Kernel`, one for each length, causal."""
    fixed = [np.full_like(lengths, size) for size in heads]
    return np.stack([*fixed, lengths, lengths, np.full_like(lengths, HEAD_DIM), np.ones_like(lengths)], axis=1)


def draw_ramp(axes: Axes, profile: DeviceProfile, streams: Sequence[TimedStream]) -> bool:
    """Bytes per second of memory-bound kernels over the bytes that they move; whether the device has a ramp."""
    ramp = profile.light
    if ramp is None:
        return False
    timed = [row for row in streams if device_named(row.device) == profile.name]
    wide = _MOVED / ramp.seconds(_MOVED, wide=True) / GB
    axes.plot(_MOVED, wide, color=COLOURS[5], linewidth=3, alpha=0.6, label="from a stream, wide loads")
    for colour, launch, label in (
        (COLOURS[0], "stream", "from a stream, 8-byte loads"),
        (COLOURS[1], "graph", "in a CUDA graph, 8-byte loads"),
    ):
        seconds = ramp.seconds(_MOVED, launch="graph" if launch == "graph" else "stream")
        axes.plot(_MOVED, _MOVED / seconds / GB, color=colour, linewidth=1, label=label)
        points = _thinned((row for row in timed if row.launch == launch), lambda row: row.moved_bytes)
        _scatter(axes, [row.moved_bytes for row in points], [row.moved_bytes / row.seconds / GB for row in points], colour)
    axes.axhline(
        profile.memory_bandwidth_bytes_per_s / GB, color="black", linewidth=0.7, linestyle="--", label="memory (data sheet)"
    )
    _log_axes(axes, "bytes moved, half of them read", "GB/s")
    origin = "timed" if ramp.evidence == "published" else "carried from other devices"
    axes.set_title(f"memory-bound kernels, {origin}: median error {ramp.median_error:.1%}", fontsize=8)
    return True


def draw_collectives(axes: Axes, device: str, collectives: Sequence[TimedCollective]) -> bool:
    """Bus bandwidth of collectives inside a node over their size, where a node of the device was measured; whether it was."""
    stack = node_stack(device)
    if stack is None:
        return False
    cluster = load_cluster(stack.cluster)
    measured = {(curve.collective, curve.num_ranks) for curve in stack.curves if curve.num_domains == 1}
    timed = [row for row in collectives if row.num_nodes == 1 and stack_name(row) == stack.name]
    for colour, collective in zip(COLOURS, sorted({one for one, _ranks in measured}), strict=False):
        for ranks, line in RANKS:
            if (collective, ranks) not in measured:
                continue
            group = CommGroup(num_ranks=ranks, ranks_per_node=ranks)
            seconds = price_collectives(collective, _SIZES, group, cluster, stack=stack.name, stacks=(stack,)).seconds
            factor = bus_factor(collective, ranks)
            axes.plot(
                _SIZES, factor * _SIZES / seconds / GB, line, color=colour, linewidth=0.9, label=f"{collective}, {ranks} GPUs"
            )
            points = _thinned(_timed_collectives(timed, collective, ranks), lambda row: row.bytes)
            _scatter(axes, [row.bytes for row in points], [factor * row.bytes / row.seconds / GB for row in points], colour)
    axes.axhline(
        cluster.fabric.link.theoretical_bytes_per_s.value / GB,
        color="black",
        linewidth=0.7,
        linestyle="--",
        label="link (data sheet)",
    )
    _log_axes(axes, "bytes", "bus GB/s")
    axes.set_title(f"collectives: {stack.name}", fontsize=8)
    return True


def _timed_collectives(rows: Sequence[TimedCollective], collective: str, num_ranks: int) -> Iterator[TimedCollective]:
    return (row for row in rows if (row.collective, row.num_ranks) == (collective, num_ranks))


def node_stack(device: str) -> CollectiveStack | None:
    """What was measured inside a node of this very device: clusters are priced by it unasked, then most curves, then the newest library."""
    found = [stack for stack in catalogued_stacks() if load_cluster(stack.cluster).device == device and _inside(stack)]

    def rank(stack: CollectiveStack) -> tuple[bool, int, str]:
        return "intra" in stack.automatic, _inside(stack), stack.nccl_version

    return max(found, key=rank, default=None)


def _inside(stack: CollectiveStack) -> int:
    """Number of curves inside a node."""
    return sum(curve.num_domains == 1 for curve in stack.curves)


def _of_grid(grid: GriddedCurve, device: str, kernels: Sequence[TimedKernel]) -> Iterator[TimedKernel]:
    """Timings of the dtype and software of a curve on a device."""
    return (
        row
        for row in kernels
        if row.kernel.dtype == grid.dtype and row.stack == grid.stack and device_named(row.device) == device
    )


def _origin(grid: GriddedCurve) -> str:
    """What a curve rests on, for a title."""
    kind = (
        f"{grid.num_points} timings of {grid.stack}: median error"
        if grid.num_points
        else "not timed, borrowed: expected median error"
    )
    return f"{grid.dtype}, {kind} {grid.median_error:.1%}"


def _thinned(rows: Iterable[_Row], size: Callable[[_Row], float]) -> Sequence[_Row]:
    """One row, the first, of those whose sizes lie within a part of an octave."""
    first: dict[int, _Row] = {}
    for row in rows:
        first.setdefault(round(_POINTS_PER_OCTAVE * log2(size(row))), row)
    return tuple(first.values())


def _scatter(axes: Axes, across: Sequence[float], up: Sequence[float] | Floats, colour: str) -> None:
    axes.plot(across, up, "o", color=colour, markersize=2.2, markeredgewidth=0)


def _log_axes(axes: Axes, across: str, up: str) -> None:
    axes.set_xscale("log", base=2)
    axes.set_yscale("log")
    axes.set_xlabel(across, fontsize=8)
    axes.set_ylabel(up, fontsize=8)


def save_picture(figure: Figure, path: Path) -> None:
    """Writes a PNG with few colours, whole or not at all, the same bytes each time."""
    buffer = BytesIO()
    figure.savefig(buffer, dpi=_DOTS_PER_INCH)
    with Image.open(buffer) as image, whole_file(path) as temporary:
        image.convert("RGB").quantize(palette=_palette(), dither=Image.Dither.NONE).save(temporary, optimize=True)


def _palette() -> Image.Image:
    """Shades of `COLOURS` and greys."""
    ends = [np.array([int(colour[start : start + 2], 16) for start in (1, 3, 5)]) for colour in COLOURS]
    shades = [end + (255 - end) * share for end in ends for share in np.linspace(0.0, 1.0, _SHADES, endpoint=False)]
    greys = [np.full(3, level) for level in np.linspace(0, 255, _GREYS)]
    palette = Image.new("P", (1, 1))
    palette.putpalette([round(float(level)) for colour in (*shades, *greys) for level in colour])
    return palette


def main(arguments: Sequence[str] | None = None) -> None:
    """Draws the gallery; prints a line for each picture."""
    parser = argparse.ArgumentParser(description="draw what the project prices on each catalogued GPU")
    parser.add_argument("--out", type=Path, required=True, help="folder of the pictures")
    parser.add_argument("--measurements", type=Path, help="folder of published tables, drawn as points")
    parser.add_argument("--device", action="append", choices=catalogue_names(), help="only this device; may be repeated")
    options = parser.parse_args(arguments)
    published = read_published(options.measurements) if options.measurements else Published()
    for name in options.device or catalogue_names():
        profile = load_hardware(name)
        if has_picture(profile):
            save_picture(device_figure(profile, published), options.out / f"{name}.png")
            sys.stdout.write(f"{options.out / f'{name}.png'}\n")


if __name__ == "__main__":
    main()
