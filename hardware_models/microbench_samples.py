"""Samples of one case: taking them, keeping them in the raw file, and how far they scatter (standard library, numpy and torch only)."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch.utils._pytree import tree_leaves

from hardware_models.files import whole_file
from hardware_models.microbench_cases import Call, Case, Pool
from hardware_models.microbench_timing import Stopwatch

_SLOW_ENOUGH_S = 2e-4
"""A sample of a faster kernel repeats it until it lasts as long as this."""
_MAX_REPEATS = 64
_NEEDS_NO_WARM_UP_S = 2e-2
"""The first call of a kernel slower than this is a sample already: what it initialises is small beside it."""
_LEAST_SAMPLES = 3
"""A quartile needs so many."""
TF32 = "tf32"
"""The dtype of float32 products that may round their operands to TensorFloat-32."""


@dataclass(slots=True)
class Measured:
    """Samples of one case."""

    case: Case
    read_bytes: int = 0
    written_bytes: int = 0
    repeats: int = 1
    warm: bool = False
    host_s: float = 0.0
    """Host seconds to hand one ``run`` to the device, as last seen; the device is kept busy for as long before it is timed."""
    samples_s: list[float] = field(default_factory=list)

    def as_json(self) -> dict[str, Any]:
        """What the raw file holds of it."""
        case = self.case
        row = {
            "kernel_class": case.kernel_class, "op": case.op, "shape": list(case.shape), "dtype": case.dtype, "flops": case.flops,
            "read_bytes": self.read_bytes, "written_bytes": self.written_bytes, "samples_s": self.samples_s,
        }  # fmt: skip
        return row | ({"variant": case.variant} if case.variant else {})


@contextmanager
def precision_of(dtype: str) -> Iterator[None]:
    """Lets float32 products use TensorFloat-32 inside the block where the case's dtype says so, and only there."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if dtype == TF32 else "highest")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def sample(measured: Measured, pool: Pool, stopwatch: Stopwatch) -> None:
    """Adds one sample of the case, its operands as cold as in a real step; the first call of a case warms it up and records its traffic."""
    call = measured.case.build(pool)
    _prepare(call, stopwatch)
    if not measured.warm:
        warm_up_s = _first_call(measured, call, stopwatch)
        if warm_up_s > _NEEDS_NO_WARM_UP_S and stopwatch.device == "cpu":
            measured.samples_s.append(warm_up_s / call.repeats)
            return
        _prepare(call, stopwatch)
    duration_s = stopwatch.time(call.run, measured.repeats, host_s=measured.host_s)
    measured.host_s = stopwatch.host_s
    measured.samples_s.append(duration_s / (measured.repeats * call.repeats))


def _prepare(call: Call, stopwatch: Stopwatch) -> None:
    stopwatch.flush()
    call.touch()
    stopwatch.synchronize()


def _first_call(measured: Measured, call: Call, stopwatch: Stopwatch) -> float:
    results: list[Any] = []
    warm_up_s = stopwatch.time(lambda: results.append(call.run()), 1)
    written = call.writes if call.writes is not None else [x for x in tree_leaves(results) if isinstance(x, torch.Tensor)]
    measured.read_bytes = sum(x.numel() * x.element_size() for x in call.reads)
    measured.written_bytes = max(1, sum(x.numel() * x.element_size() for x in written))
    results.clear()
    if warm_up_s < _NEEDS_NO_WARM_UP_S or stopwatch.device == "cuda":  # a first launch on a GPU may load its module
        once_s = stopwatch.time(call.run, 1)
        measured.host_s = stopwatch.host_s
        measured.repeats = max(1, min(_MAX_REPEATS, int(_SLOW_ENOUGH_S / max(once_s, 1e-9))))
    measured.warm = True
    return warm_up_s


def load_previous(path: Path, cases: Sequence[Case], *, device: str = "cpu") -> list[Measured]:
    """Cases with the samples that an earlier, unfinished run on the same file left; none of another device's."""
    found: dict[str, dict[str, Any]] = {}
    raw = json.loads(path.read_text()) if path.exists() else {"environment": {}}
    if raw["environment"].get("device") == device:
        for row in raw["results"]:
            variant = f"/{row['variant']}" if row.get("variant") else ""
            key = f"{row['kernel_class']}/{row['op']}/{row['dtype']}/{'x'.join(map(str, row['shape']))}{variant}"
            found[key] = row
    nothing: dict[str, Any] = {"samples_s": [], "read_bytes": 0, "written_bytes": 0}
    kept = ((case, found.get(case.key, nothing)) for case in cases)
    return [
        Measured(case=case, samples_s=list(row["samples_s"]), read_bytes=row["read_bytes"], written_bytes=row["written_bytes"])
        for case, row in kept
    ]


def previous_yardstick(path: Path, places: int) -> list[list[float]]:
    """What an earlier, unfinished run on the same file found of the yardstick at so many places of the grid; nothing where the grid was another one."""
    found = json.loads(path.read_text()).get("yardstick_s", []) if path.exists() else []
    return [list(samples) for samples in found] if len(found) == places else [[] for _ in range(places)]


def store(path: Path, raw: dict[str, Any], measured: Sequence[Measured]) -> None:
    """Puts the samples so far into ``raw`` and writes it."""
    raw["results"] = [one.as_json() for one in measured if one.samples_s and not np.isnan(one.samples_s[0])]
    write_raw(path, raw)


def write_raw(path: Path, raw: dict[str, Any]) -> None:
    """Writes the raw timings as compact JSON, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(json.dumps(raw, separators=(",", ":")))


def noise(measured: Sequence[Measured]) -> float:
    """How much the machine is disturbed: median over cases of (median sample - lower quartile) / lower quartile.

    1 where most cases have fewer than three samples: a machine that slow is disturbed, or the time limit was too short to tell.
    """
    ratios = []
    for one in measured:
        if len(one.samples_s) >= _LEAST_SAMPLES:
            low, middle = np.quantile(one.samples_s, (0.25, 0.5))
            ratios.append(middle / low - 1)
    return float(np.median(ratios)) if 2 * len(ratios) > len(measured) else 1.0
