"""Published timings of collectives and copies: four CSV formats, told apart by their columns, into one kind of row."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hardware_models.csv_table import Cells, format_of, required_format, rows_of
from hardware_models.errors import UnknownNameError
from hardware_models.network.collective_algorithms import bus_factor, canonical
from hardware_models.units import GB, MIB, US_PER_S

COPIES = ("host_to_device", "host_to_device_duplex", "device_to_device")
"""Copies that the table of links holds beside collectives."""
_NVBANDWIDTH_BYTES = 512 * MIB
"""Buffer of NVIDIA/nvbandwidth unless told otherwise (its README)."""
_BENCH_BYTES = 4 * GB
"""Buffer of torch's all_reduce_bench (`all_reduce (4 GB ...)` in the table)."""
_BENCH_COUNTS = 2.0
"""That script's algorithm throughput counts every byte sent and received."""

_GALVATRON_BYTES = 16 * MIB
"""Size at which Galvatron's profiler takes nccl-tests' bandwidth: the first of 16 MiB and up (Hsword/Hetu tools/Galvatron
profile_hardware/scripts/profile_hardware.sh: START_MB=16, first); taken to hold for its shipped files."""
BANDWIDTH_ONLY = "-bandwidth"
"""Ends the stack's name of rows that state a bandwidth and no size: the size is an assumption, so nothing is fitted to them."""
_NODE_RANKS = 8
"""GPUs in a node of the profiled machine."""
_PAIR = 2

Row = Mapping[str, str]


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedCollective:
    """One timing.

    ``device`` and ``platform`` as the table writes them; ``stack`` the software: ``nccl-VERSION`` or the name of the source.
    """

    device: str
    stack: str
    collective: str
    num_ranks: int
    num_nodes: int
    ranks_per_node: int
    bytes: float
    dtype: str
    """As the table writes it; empty where it does not say."""
    seconds: float
    platform: str
    source: str
    commit: str
    line: int
    """Of the file, the header being 1."""


@dataclass(frozen=True, slots=True, kw_only=True)
class UnreadRow:
    """A row that states no single timing, and why."""

    line: int
    platform: str
    reason: str


def read_collectives(path: str | Path) -> tuple[TimedCollective, ...]:
    """Timings of a CSV file; rows without one are listed by `unread_rows`.

    Raises:
        InputError: the columns are those of no known table, or a value is no number; names file, line and column.
    """
    rows, _ = _read(Path(path))
    return rows


def unread_rows(path: str | Path) -> tuple[UnreadRow, ...]:
    """Rows of a CSV file that state no single timing (ranges, bandwidth without a size)."""
    _, unread = _read(Path(path))
    return unread


def is_collective_table(path: str | Path) -> bool:
    """Whether `read_collectives` knows a file's columns."""
    return format_of(Path(path), _FORMATS) is not None


def _read(path: Path) -> tuple[tuple[TimedCollective, ...], tuple[UnreadRow, ...]]:
    chosen = required_format(path, _FORMATS)
    rows: list[TimedCollective] = []
    unread: list[UnreadRow] = []
    previous = ""
    for row in rows_of(path):
        cells = _Cells(path=path, line=row.line, values=row.values, previous=previous)
        found = chosen(cells)
        previous = cells.platform
        (rows if isinstance(found, TimedCollective) else unread).append(found)  # type: ignore[arg-type]
    return tuple(rows), tuple(unread)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cells(Cells):
    """A row of collectives."""

    previous: str
    """Platform of the row before."""

    def count(self, column: str) -> int:
        """The whole number that a cell begins with (``1 (NVL domain)``)."""
        match = re.match(r"\d+", self.text(column))
        if match is None or int(match.group()) < 1:
            raise self.error(column, self.values.get(column), "a whole number above 0 is required")
        return int(match.group())

    def collective(self) -> str:
        try:
            return canonical(self.text("collective"))
        except UnknownNameError as problem:
            raise self.error("collective", problem.value, problem.rule) from problem

    @property
    def platform(self) -> str:
        """The platform; ``same`` means that of the row before."""
        name = (self.values.get("platform") or "").strip()
        return self.previous if name == "same" else name

    def row(self, *, device: str, stack: str, ranks_per_node: int | None = None, **changes: object) -> TimedCollective:
        ranks, nodes = self.count("n_gpus"), self.count("n_nodes")
        values: dict[str, object] = {
            "device": device, "stack": stack, "collective": "", "num_ranks": ranks, "num_nodes": nodes,
            "ranks_per_node": ranks_per_node or max(1, ranks // nodes), "bytes": 0.0, "dtype": (self.values.get("dtype") or "").strip(), "seconds": 0.0, "platform": self.platform or device,
            "source": self.text("source"), "commit": self.text("provenance"), "line": self.line,
        }  # fmt: skip
        return TimedCollective(**(values | changes))  # type: ignore[arg-type]


def _nccl_tests(cells: _Cells) -> TimedCollective:
    return cells.row(
        device=cells.text("device"), stack=f"nccl-{cells.text('nccl_version')}", collective=cells.collective(),
        bytes=cells.number("bytes"), seconds=cells.number("time_us") / US_PER_S,
    )  # fmt: skip


def _vtrain(cells: _Cells) -> TimedCollective:
    return cells.row(
        device=cells.text("gpu"), stack="vtrain", collective=cells.collective(),
        bytes=cells.number("bytes"), seconds=cells.number("time_us") / US_PER_S,
    )  # fmt: skip


def _vidur(cells: _Cells) -> TimedCollective:
    return cells.row(
        device=cells.text("platform"), stack="vidur", ranks_per_node=cells.count("gpus_per_node"), collective=cells.collective(),
        bytes=cells.number("bytes"), seconds=cells.number("time_us_median") / US_PER_S,
    )  # fmt: skip


def _misc(cells: _Cells) -> TimedCollective | UnreadRow:
    source = cells.text("source")
    stack = next((name for word, name in _MISC_STACKS.items() if word in source), "misc")
    kind = cells.text("collective")
    if "4 GB torch" in kind and cells.has("busbw_GBps"):
        seconds = _BENCH_COUNTS * _BENCH_BYTES / (cells.number("busbw_GBps") * GB)
        return cells.row(
            device=cells.platform, stack=stack, collective="all_reduce", bytes=float(_BENCH_BYTES), seconds=seconds
        )
    copy = next((name for pattern, name in _COPY_NAMES.items() if re.match(pattern, kind)), None)
    if copy is not None:
        size = cells.number("bytes") if cells.has("bytes") else float(_NVBANDWIDTH_BYTES)
        seconds = size / (cells.number("busbw_GBps") * GB)
        return cells.row(device=cells.platform, stack=stack, collective=copy, bytes=size, seconds=seconds)
    if not cells.has("bytes") and "Galvatron" in source and cells.has("busbw_GBps"):
        return _galvatron_bandwidth(cells, stack)
    if not cells.has("bytes"):
        return UnreadRow(
            line=cells.line, platform=cells.platform, reason=f"no size and no single time ({cells.values.get('notes', '')})"
        )
    collective, size = cells.collective(), cells.number("bytes")
    if cells.has("time_us"):
        seconds = cells.number("time_us") / US_PER_S
    else:
        seconds = size * bus_factor(collective, cells.count("n_gpus")) / (cells.number("busbw_GBps") * GB)
    return cells.row(device=cells.platform, stack=stack, collective=collective, bytes=size, seconds=seconds)


def _galvatron_bandwidth(cells: _Cells, stack: str) -> TimedCollective | UnreadRow:
    """A bandwidth of Galvatron's profile inside a node; those between nodes share adapters that the source does not state."""
    collective, ranks = cells.collective(), cells.count("n_gpus")
    notes = cells.values.get("notes") or ""
    if (cells.count("n_nodes") > 1 and "_consec_1" not in notes) or ranks > _NODE_RANKS:
        reason = "bandwidth between nodes whose adapters are not stated"
        return UnreadRow(line=cells.line, platform=cells.platform, reason=f"{reason} ({notes})")
    if collective == "send_recv" and ranks > _PAIR:
        return UnreadRow(line=cells.line, platform=cells.platform, reason=f"send_recv among {ranks} ranks at once ({notes})")
    seconds = _GALVATRON_BYTES * bus_factor(collective, ranks) / (cells.number("busbw_GBps") * GB)
    return cells.row(
        device=cells.platform, stack=f"{stack}{BANDWIDTH_ONLY}", collective=collective, num_nodes=1, ranks_per_node=ranks,
        bytes=float(_GALVATRON_BYTES), seconds=seconds,
    )  # fmt: skip


_MISC_STACKS = MappingProxyType(
    {
        "ml-engineering": "ml-engineering",
        "coreweave": "coreweave",
        "Galvatron": "galvatron",
        "bigscience": "bigscience",
        "nvbandwidth": "nvbandwidth",
    }
)
_COPY_NAMES = MappingProxyType(
    {r"H2D while D2H": "host_to_device_duplex", r"H2D": "host_to_device", r"D2D": "device_to_device"}
)  # fmt: skip
_FORMATS: tuple[tuple[frozenset[str], Callable[[_Cells], TimedCollective | UnreadRow]], ...] = (
    (frozenset({"device", "nccl_version", "n_gpus", "collective", "bytes", "time_us"}), _nccl_tests),
    (frozenset({"gpu", "n_gpus", "collective", "bytes", "time_us"}), _vtrain),
    (frozenset({"platform", "gpus_per_node", "collective", "bytes", "time_us_median"}), _vidur),
    (frozenset({"platform", "n_gpus", "collective", "bytes", "time_us", "busbw_GBps", "notes"}), _misc),
)
