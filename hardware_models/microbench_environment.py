"""Where timings were taken: processor or GPU, versions, clocks, limits, and what the driver says while kernels run (bare machine)."""

from __future__ import annotations

import os
import platform
import subprocess
import threading
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Self

import numpy as np
import torch

_CACHE_UNITS = {"K": 2**10, "M": 2**20}
_SMI = "nvidia-smi"
_SMI_PERIOD_MS = 50
_SMI_TIMEOUT_S = 20.0
_STATIC_FIELDS = (
    "driver_version", "clocks.max.sm", "clocks.max.mem", "power.limit", "ecc.mode.current", "persistence_mode", "compute_mode",
    "pcie.link.gen.max", "pcie.link.gen.current", "pcie.link.width.current", "mig.mode.current",
)  # fmt: skip
_LIVE_FIELDS = ("clocks.sm", "clocks.mem", "power.draw", "temperature.gpu", "memory.used")
_REASONS = ("clocks_event_reasons.active", "clocks_throttle_reasons.active")
"""The field's name in drivers from 535 on, and before."""
REASON_BITS: Mapping[int, str] = {
    0x1: "gpu_idle", 0x2: "applications_clocks_setting", 0x4: "sw_power_cap", 0x8: "hw_slowdown", 0x10: "sync_boost",
    0x20: "sw_thermal_slowdown", 0x40: "hw_thermal_slowdown", 0x80: "hw_power_brake_slowdown", 0x100: "display_clock_setting",
}  # fmt: skip
"""Why clocks are below their maximum (NVML API reference, NvmlClocksEventReasons)."""
THROTTLED = frozenset({"hw_slowdown", "sw_thermal_slowdown", "hw_thermal_slowdown", "hw_power_brake_slowdown"})
"""Reasons that say that the machine is not as it should be; the power cap belongs to sustained load."""


def environment(device: str) -> dict[str, Any]:
    """Where and with what: versions, processor or GPU, threads, clocks and limits where the system shows them, load."""
    info: dict[str, Any] = {
        "date": time.strftime("%Y-%m-%d", time.gmtime()), "python": platform.python_version(), "torch": torch.__version__, "numpy": np.__version__,
        "system": f"{platform.system()} {platform.machine()}", "device": device, "num_threads": torch.get_num_threads(),
        "num_cpus": os.cpu_count() or 1, "load_average": list(os.getloadavg()), "host_processor": _processor_name(),
        "host_memory_bytes": host_memory_bytes(),
    }  # fmt: skip
    if device == "cuda":
        return info | _gpu()
    return info | {
        "device_name": _processor_name(), "memory_bytes": host_memory_bytes(), "num_multiprocessors": 0,
        "capability": torch.backends.cpu.get_cpu_capability(), "cache_bytes": _cpu_cache_bytes(), "clock_mhz": _cpu_clock_mhz(),
    }  # fmt: skip


def _gpu() -> dict[str, Any]:
    properties = torch.cuda.get_device_properties(0)
    cudnn = torch.backends.cudnn.version() if torch.backends.cudnn.is_available() else None
    return {
        "device_name": properties.name, "memory_bytes": int(properties.total_memory), "num_multiprocessors": int(properties.multi_processor_count),
        "capability": f"{properties.major}.{properties.minor}", "cache_bytes": int(properties.L2_cache_size), "cuda": str(torch.version.cuda),
        "cudnn": str(cudnn), "cublas": _cublas_version(), "nccl": _nccl_version(), "clock_mhz": _gpu_clock_mhz(),
        "context_bytes": context_bytes(), "driver": query_gpu(_STATIC_FIELDS), "state": query_gpu((*_LIVE_FIELDS, *reasons_field())),
    }  # fmt: skip


def context_bytes() -> int:
    """What the device holds beyond this process's allocator (other processes included: measure on an idle GPU)."""
    torch.cuda.synchronize()
    free, total = torch.cuda.mem_get_info()
    return int(total - free - torch.cuda.memory_reserved())


def host_memory_bytes() -> int:
    """Memory of the host."""
    return os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")


def available_host_bytes() -> int:
    """Memory of the host that is not in use; half of all where the system does not say."""
    path = Path("/proc/meminfo")
    lines = path.read_text().splitlines() if path.exists() else []
    return next((int(line.split()[1]) * 2**10 for line in lines if line.startswith("MemAvailable:")), host_memory_bytes() // 2)


def _cublas_version() -> str | None:
    """As the wheel that torch loads it from says; None where it is built in."""
    from importlib.metadata import distributions  # noqa: PLC0415 - slow to import, needed once

    found = {d.metadata["Name"]: d.version for d in distributions() if str(d.metadata["Name"]).startswith("nvidia-cublas")}
    return next(iter(sorted(f"{name} {version}" for name, version in found.items())), None)


def _nccl_version() -> str | None:
    if not torch.distributed.is_available() or not torch.distributed.is_nccl_available():
        return None
    return ".".join(map(str, torch.cuda.nccl.version()))


def query_gpu(fields: Sequence[str]) -> dict[str, Any]:
    """What ``nvidia-smi`` says of this process's GPU; fields that it does not know are left out, all where there is none."""
    found: dict[str, Any] = {}
    answer = _smi(fields)
    if answer is None:  # one field unknown to this driver fails the whole question
        for name in fields:
            one = _smi((name,))
            found |= {} if one is None else {name: one[0]}
    else:
        found = dict(zip(fields, answer, strict=True))
    return {name: value for name, value in found.items() if value is not None}


def _smi(fields: Sequence[str]) -> list[Any] | None:
    try:
        answer = subprocess.run(_smi_command(fields), capture_output=True, text=True, timeout=_SMI_TIMEOUT_S, check=False)  # noqa: S603 - fixed words
    except (OSError, subprocess.TimeoutExpired):
        return None
    lines = answer.stdout.strip().splitlines()
    if answer.returncode or not lines:
        return None
    values = parse_smi_line(lines[0])
    return values if len(values) == len(fields) else None


def _smi_command(fields: Sequence[str], *options: str) -> list[str]:
    uuid = getattr(torch.cuda.get_device_properties(0), "uuid", None)
    which = [] if uuid is None else ["-i", f"GPU-{str(uuid).removeprefix('GPU-')}"]
    return [_SMI, f"--query-gpu={','.join(fields)}", "--format=csv,noheader,nounits", *which, *options]


def parse_smi_line(line: str) -> list[Any]:
    """Values of one line: numbers as such, hexadecimal masks as integers, what the driver does not tell as None."""
    return [_value(text.strip()) for text in line.split(",")]


def _value(text: str) -> Any:
    if not text or text.startswith("[") or text == "N/A":
        return None
    try:
        return int(text, 16) if text.startswith("0x") else float(text)
    except ValueError:
        return text


def reasons_field() -> tuple[str, ...]:
    """The name that this driver has for the reasons of low clocks; empty where it has none."""
    return next(((name,) for name in _REASONS if _smi((name,)) is not None), ())


def reasons_of(mask: float | None) -> list[str]:
    """Names of the bits of a mask of reasons."""
    return [name for bit, name in REASON_BITS.items() if int(mask or 0) & bit]


class GpuMonitor:
    """Clocks, power, temperature and reasons of low clocks while kernels run; nothing where there is no ``nvidia-smi``."""

    def __init__(self) -> None:
        self._reasons = reasons_field()
        self._fields = (*_LIVE_FIELDS, *self._reasons)
        self._samples: list[tuple[float, list[Any]]] = []
        self._process: subprocess.Popen[bytes] | None = None
        self._reader: threading.Thread | None = None

    def __enter__(self) -> Self:
        ours, its = os.openpty()  # to a terminal the tool writes line by line, to a pipe in blocks
        try:
            command = _smi_command(self._fields, "-lms", str(_SMI_PERIOD_MS))
            self._process = subprocess.Popen(command, stdout=its, stderr=subprocess.DEVNULL)  # noqa: S603 - fixed words
        except OSError:
            os.close(ours)
            return self
        finally:
            os.close(its)
        self._reader = threading.Thread(target=self._read, args=(ours,), daemon=True)
        self._reader.start()
        return self

    def __exit__(self, *_: object) -> None:
        if self._process is not None and self._reader is not None:
            self._process.terminate()
            self._process.wait()
            self._reader.join(_SMI_TIMEOUT_S)

    def _read(self, descriptor: int) -> None:
        with os.fdopen(descriptor, encoding="utf-8", errors="replace") as lines:
            try:
                for line in lines:
                    self._samples.append((time.perf_counter(), parse_smi_line(line)))
            except OSError:  # how a terminal says that the other side is gone
                return

    def between(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """Medians of the numbers and the union of the reasons between two times of `time.perf_counter`."""
        return self.during([(begin_s, end_s)])

    def during(self, intervals: Sequence[tuple[float, float]]) -> dict[str, Any]:
        """The same over several intervals (begin, end) together."""
        samples = [(at, row) for at, row in list(self._samples) if len(row) == len(self._fields)]
        return summary_of(
            self._fields, [row for at, row in samples if any(begin_s <= at <= end_s for begin_s, end_s in intervals)]
        )


def summary_of(fields: Sequence[str], rows: Sequence[Sequence[Any]]) -> dict[str, Any]:
    """Medians of the live fields over samples, and the names of all reasons seen; ``num`` samples."""
    found: dict[str, Any] = {"num": len(rows)}
    mask = 0
    for position, name in enumerate(fields):
        values = [row[position] for row in rows if isinstance(row[position], int | float)]
        if name in _REASONS:
            for value in values:
                mask |= int(value)
        elif values:
            found[name] = float(np.median(values))
    return found | {"reasons": reasons_of(mask)}


def _processor_name() -> str:
    for line in _cpuinfo():
        if line.startswith("model name"):
            return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()


def _cpu_clock_mhz() -> float | None:
    clocks = [float(line.split(":", 1)[1]) for line in _cpuinfo() if line.startswith("cpu MHz")]
    return max(clocks, default=None)


def _cpu_cache_bytes() -> int:
    """Of the last level; 0 where the system does not say."""
    sizes = [path.read_text().strip() for path in Path("/sys/devices/system/cpu/cpu0/cache").glob("index*/size")]
    return max((int(size[:-1]) * _CACHE_UNITS[size[-1]] for size in sizes if size[-1:] in _CACHE_UNITS), default=0)


def _cpuinfo() -> list[str]:
    path = Path("/proc/cpuinfo")
    return path.read_text().splitlines() if path.exists() else []


def _gpu_clock_mhz() -> float | None:
    try:
        return float(torch.cuda.clock_rate())
    except (ModuleNotFoundError, RuntimeError, ImportError):  # no NVML bindings
        return None
