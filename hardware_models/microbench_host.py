"""The part of `microbench` that is no single kernel: eager dispatch, copies between host and device, sustained load."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import fx

from hardware_models.microbench_timing import Stopwatch

_NUM_OPS = 100
_TINY = 4
_COPY_BYTES = (2**12, 2**16, 2**20, 2**23, 2**26, 2**28)
_SUSTAINED_SIZE = {"cpu": 512, "cuda": 8192}
_SUSTAINED_SHARE = 0.4


class _TinyChain(torch.nn.Module):
    """A hundred operators on four numbers: nothing but dispatch."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(_TINY))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The chain."""
        for _ in range(_NUM_OPS // 2):
            x = x * self.weight
            x = x + self.weight
        return x


def host_timings(device: str, *, time_limit_s: float) -> dict[str, Any]:
    """Dispatch seconds per kernel (forward, backward), copies (CUDA only) and the rate under sustained load."""
    stopwatch = Stopwatch(device)
    result: dict[str, Any] = {"dispatch": dispatch(device, stopwatch)}
    result["sustained"] = sustained(device, stopwatch, duration_s=_SUSTAINED_SHARE * time_limit_s)
    if device == "cuda":
        result["copies"] = copies(stopwatch)
    return result


def dispatch(device: str, stopwatch: Stopwatch, *, repeats: int = 15) -> Mapping[str, float]:
    """Seconds per kernel of a Python fx graph under autograd, forward and backward, lower quartiles.

    The backward of a product launches two kernels and two reductions of no size; what is reported is per kernel of the chain's
    forward and per node of its backward.
    """
    graph = fx.symbolic_trace(_TinyChain()).to(device)
    x = torch.ones(_TINY, device=device)
    forward, backward, bare = [], [], []
    for _ in range(repeats):
        stopwatch.synchronize()
        begin = time.perf_counter()
        y = graph(x).sum()
        middle = time.perf_counter()
        y.backward()
        stopwatch.synchronize()
        end = time.perf_counter()
        graph.zero_grad()
        forward.append((middle - begin) / (_NUM_OPS + 1))
        backward.append((end - middle) / (_NUM_OPS + 1))
        bare.append(_bare_operator(x))
    quartile = repeats // 4
    return {
        "forward_s": sorted(forward)[quartile], "backward_s": sorted(backward)[quartile], "operator_s": sorted(bare)[quartile],
    }  # fmt: skip


def _bare_operator(x: torch.Tensor) -> float:
    """Seconds of one operator call without autograd, in a plain Python loop."""
    with torch.no_grad():
        begin = time.perf_counter()
        for _ in range(_NUM_OPS):
            torch.mul(x, x)
        return (time.perf_counter() - begin) / _NUM_OPS


def sustained(device: str, stopwatch: Stopwatch, *, duration_s: float) -> Mapping[str, float]:
    """Rates of a matrix product in the first and the last quarter of a stretch under load: what clocks do when hot."""
    size = _SUSTAINED_SIZE[device]
    dtype = torch.float32 if device == "cpu" else torch.bfloat16
    a = torch.ones(size, size, device=device, dtype=dtype)
    rates: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < duration_s or len(rates) < 4:  # noqa: PLR2004 - a quarter needs one
        rates.append(2 * size**3 / stopwatch.time(lambda: torch.mm(a, a), 1))
    quarter = len(rates) // 4
    return {"first_flops_per_s": _median(rates[:quarter]), "last_flops_per_s": _median(rates[-quarter:]), "num": len(rates)}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


def copies(stopwatch: Stopwatch, *, sizes: tuple[int, ...] = _COPY_BYTES) -> list[Mapping[str, Any]]:
    """Pinned copies host to device and back: alone, both at once, and under a matrix product (whose slowdown is kept too)."""
    rows: list[Mapping[str, Any]] = []
    streams = torch.cuda.Stream(), torch.cuda.Stream()
    for size in sizes:
        hosts = [torch.empty(size, dtype=torch.uint8).pin_memory() for _ in range(2)]
        devices = [torch.empty(size, dtype=torch.uint8, device="cuda") for _ in range(2)]

        def to_device(hosts: list[torch.Tensor] = hosts, devices: list[torch.Tensor] = devices) -> None:
            devices[0].copy_(hosts[0], non_blocking=True)

        def to_host(hosts: list[torch.Tensor] = hosts, devices: list[torch.Tensor] = devices) -> None:
            hosts[1].copy_(devices[1], non_blocking=True)

        alone = {"h2d": _best(stopwatch, to_device), "d2h": _best(stopwatch, to_host)}
        rows.append(
            {"bytes": size, "h2d_s": alone["h2d"], "d2h_s": alone["d2h"], "duplex_s": _both(streams, to_device, to_host)}
        )
        if size == sizes[-1]:
            rows[-1] = {**rows[-1], **_under_compute(streams[0], to_device)}
    return rows


def _best(stopwatch: Stopwatch, run: Callable[[], None], repeats: int = 5) -> float:
    run()
    return min(stopwatch.time(run, 1) for _ in range(repeats))


def _both(streams: tuple[torch.cuda.Stream, torch.cuda.Stream], *runs: Callable[[], None]) -> float:
    """Wall seconds of both directions at once."""
    times = []
    for _ in range(5):
        torch.cuda.synchronize()
        begin = time.perf_counter()
        for stream, run in zip(streams, runs, strict=True):
            with torch.cuda.stream(stream):
                run()
        torch.cuda.synchronize()
        times.append(time.perf_counter() - begin)
    return min(times)


def _under_compute(stream: torch.cuda.Stream, run: Callable[[], None]) -> Mapping[str, float]:
    """The copy's and the product's times while both run."""
    a = torch.ones(8192, 8192, device="cuda", dtype=torch.bfloat16)
    num_products = 20

    def events() -> tuple[torch.cuda.Event, torch.cuda.Event]:
        return torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)

    def products(*, with_copy: bool) -> tuple[float, float]:
        torch.cuda.synchronize()
        compute, copy = events(), events()
        compute[0].record()
        for _ in range(num_products):
            torch.mm(a, a)
        compute[1].record()
        if with_copy:
            with torch.cuda.stream(stream):
                copy[0].record()
                run()
                copy[1].record()
        torch.cuda.synchronize()
        return compute[0].elapsed_time(compute[1]) / 1e3, copy[0].elapsed_time(copy[1]) / 1e3 if with_copy else 0.0

    products(with_copy=False)
    alone_s, _ = products(with_copy=False)
    together_s, copy_s = products(with_copy=True)
    return {"compute_alone_s": alone_s, "compute_with_copy_s": together_s, "copy_with_compute_s": copy_s}
