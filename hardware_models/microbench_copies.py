"""Copies between host and device by size: alone, both ways at once, pageable, and beside kernels (bare machine).

All that needs a device is behind `Bench`: a GPU's (`cuda_bench`) or a CPU's (`cpu_bench`).
"""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import cycle
from typing import Any

import torch

from hardware_models.microbench_environment import available_host_bytes
from hardware_models.microbench_timing import Lanes
from hardware_models.microbench_worker import one_thread_worker

COPY_BYTES = tuple(2**exponent for exponent in range(12, 31, 2))
"""4 KiB to 1 GiB."""
QUICK_COPY_BYTES = tuple(2**exponent for exponent in (12, 16, 20, 24, 28))
CPU_COPY_BYTES = (2**14, 2**20, 2**23, 2**26)
_LOADED_BYTES = (2**24, 2**28)
"""Copies beside kernels: a tensor of activations, a layer of weights."""
_HOST_SHARE = 0.1
"""Of the host's free memory for each pinned buffer."""
_REPEATS = 5
_COVER = 2.0
"""Kernels beside a copy last so many times the copy alone, so that it never runs alone."""
_MOST_KERNELS = 500
"""Below the depth of the launch queue (about 1000), so that all are enqueued before the first starts."""
_ADDED_ELEMENTS = 2**26
_PRODUCT_SIZE = 4096
_CPU_ADDED_ELEMENTS = 2**24
_CPU_TURN_BYTES = 2**28
"""Of the buffers on either side that a CPU's copies take in turn: more than its caches hold."""
_CPU_PRODUCT_SIZE = 512

Run = Callable[[], object]


@dataclass(frozen=True, slots=True, kw_only=True)
class Bench:
    """What runs on the device: lanes at once, copies of a size, and kernels to run beside them."""

    seconds: Callable[[Mapping[str, Run]], Mapping[str, float]]
    """Of each lane, from the common start."""
    wall: Callable[[Run], float]
    """Of one call, on the host's clock until the device is idle: a pageable copy works on the host before it reaches the device."""
    copies: Callable[[int], Mapping[str, Run]]
    """Copies of so many bytes: ``h2d``, ``d2h`` (pinned), ``pageable_h2d``, ``pageable_d2h``."""
    kernels: Mapping[str, Run]
    """``gemm`` (bound by arithmetic) and ``memory`` (bound by bandwidth), each one kernel."""


def copy_timings(
    bench: Bench, *, sizes: tuple[int, ...], tell: Callable[[float], None] = lambda _fraction: None
) -> list[dict[str, Any]]:
    """One row a size: ``bytes``, seconds alone, ``duplex_s`` (until both are done), pageable; ``under`` on some: beside kernels.

    Args:
        bench: the device.
        sizes: bytes, ascending.
        tell: told the fraction done.
    """
    rows: list[dict[str, Any]] = []
    loaded = {size for size in sizes if size in _LOADED_BYTES} or {sizes[-1]}
    for position, size in enumerate(sizes):
        copies = bench.copies(size)
        alone = {f"{name}_s": _best(bench, {name: copies[name]}) for name in ("h2d", "d2h")}
        for name in ("pageable_h2d", "pageable_d2h"):
            alone[f"{name}_s"] = min(bench.wall(copies[name]) for _ in range(_REPEATS))
        both = _best(bench, {name: copies[name] for name in ("h2d", "d2h")})
        row: dict[str, Any] = {"bytes": size, **alone, "duplex_s": both}
        if size in loaded:
            row["under"] = [
                beside(bench, kernel, direction, copies[direction], alone[f"{direction}_s"])
                for kernel in bench.kernels
                for direction in ("h2d", "d2h")
            ]
        rows.append(row)
        tell((position + 1) / len(sizes))
    return rows


def _best(bench: Bench, lanes: Mapping[str, Run]) -> float:
    bench.seconds(lanes)
    return min(max(bench.seconds(lanes).values()) for _ in range(_REPEATS))


def beside(bench: Bench, kernel: str, direction: str, copy: Run, copy_s: float) -> dict[str, Any]:
    """What a copy and kernels do to each other.

    **Model**: over the copy's time c the kernels advance at 1/s of their rate, so their total grows from a to a', with
    ``s = 1 / (1 - (a' - a) / c)``; the copy slows down by its time beside the kernels over its time alone.

    Returns:
        ``compute_slowdown`` and ``copy_slowdown`` (at least about 1) with the seconds that they come from.
    """
    run = bench.kernels[kernel]
    bench.seconds({"compute": run})
    one_s = min(bench.seconds({"compute": run})["compute"] for _ in range(2))
    number = max(1, min(_MOST_KERNELS, round(_COVER * copy_s / one_s) + 1))

    def kernels() -> None:
        for _ in range(number):
            run()

    alone_s = min(bench.seconds({"compute": kernels})["compute"] for _ in range(_REPEATS))
    together = [bench.seconds({"copy": copy, "compute": kernels}) for _ in range(_REPEATS)]
    compute_s, loaded_s = (sorted(row[name] for row in together)[_REPEATS // 2] for name in ("compute", "copy"))
    return {
        "kernel": kernel, "direction": direction, "num_kernels": number, "compute_alone_s": alone_s, "compute_with_copy_s": compute_s,
        "copy_alone_s": copy_s, "copy_with_compute_s": loaded_s, "compute_slowdown": slowdown(alone_s, compute_s, loaded_s),
        "copy_slowdown": loaded_s / copy_s,
    }  # fmt: skip


_LEAST_PROGRESS = 1e-2
"""Kernels that did less than this of their work beside a copy were stopped by it, not slowed down."""


def slowdown(alone_s: float, together_s: float, copy_s: float) -> float:
    """Time of kernels while a copy runs over their time alone (see `beside`).

    Args:
        alone_s: seconds of the kernels.
        together_s: with the copy beside them.
        copy_s: seconds of the copy beside them.
    """
    beside_s = min(copy_s, together_s)
    return 1.0 / max(_LEAST_PROGRESS, 1.0 - (together_s - alone_s) / beside_s)


def admitted_sizes(sizes: tuple[int, ...], *, host_bytes: float, device_bytes: float) -> tuple[int, ...]:
    """Those whose two buffers on either side take no more than a tenth of what is free."""
    return tuple(size for size in sizes if size <= _HOST_SHARE * min(host_bytes, device_bytes))


def cuda_bench(main: torch.dtype) -> Bench:
    """The bench of the GPU; products in the training dtype."""
    lanes = Lanes()
    a = torch.randn(_PRODUCT_SIZE, _PRODUCT_SIZE, device="cuda").to(main)
    out = torch.mm(a, a)
    x = torch.randn(_ADDED_ELEMENTS, device="cuda").to(main)
    total = torch.empty_like(x)
    return Bench(
        seconds=lanes.seconds, wall=_wall, copies=_cuda_copies,
        kernels={"gemm": lambda: torch.mm(a, a, out=out), "memory": lambda: torch.add(x, x, out=total)},
    )  # fmt: skip


def cpu_bench() -> Bench:
    """The bench of a CPU that is its own host: copies run in a worker of one thread each, as replay runs them, kernels in the calling thread with all of torch's."""
    a = torch.randn(_CPU_PRODUCT_SIZE, _CPU_PRODUCT_SIZE)
    product = torch.mm(a, a)
    x = torch.randn(_CPU_ADDED_ELEMENTS)
    total = torch.empty_like(x)
    return Bench(
        seconds=_thread_seconds, wall=_thread_wall, copies=_cpu_copies,
        kernels={"gemm": lambda: torch.mm(a, a, out=product), "memory": lambda: torch.add(x, x, out=total)},
    )  # fmt: skip


def _thread_wall(run: Run) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def _thread_seconds(lanes: Mapping[str, Run]) -> dict[str, float]:
    """Seconds of each lane from the common start: ``compute`` in the calling thread, others in workers of their own."""
    workers = {name: one_thread_worker(name) for name in lanes if name != "compute"}
    begin = time.perf_counter()

    def ended(run: Run) -> float:
        run()
        return time.perf_counter() - begin

    futures = {name: worker.submit(ended, lanes[name]) for name, worker in workers.items()}
    found = {"compute": ended(lanes["compute"])} if "compute" in lanes else {}
    found |= {name: future.result() for name, future in futures.items()}
    for worker in workers.values():
        worker.shutdown()
    return found


def _cpu_copies(size: int) -> Mapping[str, Run]:
    """Copies whose places are as cold as those of a step, which sends each tensor once: every copy takes the next pair of many buffers."""
    here, there = (torch.ones(max(2, _CPU_TURN_BYTES // size), size, dtype=torch.uint8) for _ in range(2))
    ups, downs = (cycle(range(first, len(here), 2)) for first in range(2))

    def up() -> None:
        place = next(ups)
        here[place].copy_(there[place])

    def down() -> None:
        place = next(downs)
        there[place].copy_(here[place])

    return {"h2d": up, "d2h": down, "pageable_h2d": up, "pageable_d2h": down}


def cpu_copy_timings(*, quick: bool) -> list[dict[str, Any]]:
    """Copies within this machine's memory, by size."""
    return copy_timings(cpu_bench(), sizes=CPU_COPY_BYTES[1::2] if quick else CPU_COPY_BYTES)


def _wall(run: Run) -> float:
    torch.cuda.synchronize()
    begin = time.perf_counter()
    run()
    torch.cuda.synchronize()
    return time.perf_counter() - begin


def _cuda_copies(size: int) -> Mapping[str, Run]:
    pinned = [torch.empty(size, dtype=torch.uint8, pin_memory=True) for _ in range(2)]
    pageable = torch.ones(size, dtype=torch.uint8)
    devices = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]
    return {
        "h2d": lambda: devices[0].copy_(pinned[0], non_blocking=True), "d2h": lambda: pinned[1].copy_(devices[1], non_blocking=True),
        "pageable_h2d": lambda: devices[0].copy_(pageable), "pageable_d2h": lambda: pageable.copy_(devices[1]),
    }  # fmt: skip


def cuda_copy_timings(main: torch.dtype, *, quick: bool, tell: Callable[[float], None]) -> list[dict[str, Any]]:
    """Copies of this machine's first GPU, in sizes that fit."""
    sizes = QUICK_COPY_BYTES if quick else COPY_BYTES
    admitted = admitted_sizes(sizes, host_bytes=available_host_bytes(), device_bytes=torch.cuda.mem_get_info()[0])
    return copy_timings(cuda_bench(main), sizes=admitted, tell=tell) if admitted else []
