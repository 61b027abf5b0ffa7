"""The part of `microbench` that is no single kernel: eager dispatch, the host's memory, sustained load of a CPU."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import fx
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from hardware_models.microbench_timing import Stopwatch

_NUM_OPS = 100
_VIEWED_OPS = 4
"""Operators of a link of `_ViewedChain`: a view, a product, two others."""
_TINY = 4
_SUSTAINED_SIZE = 512
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
    """Of a CPU: dispatch seconds per kernel (forward, backward), what selective checkpointing costs, and the rate under sustained load."""
    stopwatch = Stopwatch(device)
    return {
        "dispatch": dispatch(device, stopwatch), "checkpoint_policy": checkpoint_policy(), "sustained": sustained(stopwatch, duration_s=_SUSTAINED_SHARE * time_limit_s),
    }  # fmt: skip


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


class _ViewedChain(torch.nn.Module):
    """A hundred operators on a tiny matrix, a view beside every two kernels, as in layers of products."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.ones(_TINY, _TINY))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """The chain."""
        for _ in range(_NUM_OPS // _VIEWED_OPS):
            x = torch.mm(x, self.weight.t())
            x = x + self.weight
            x = x * x
        return x


def _keep_products(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operator.overloadpacket.__name__ == "mm" else CheckpointPolicy.PREFER_RECOMPUTE


def checkpoint_policy(*, repeats: int = 15) -> Mapping[str, float]:
    """Host seconds of torch's selective checkpointing for each operator that its policy is asked about, forward and again backward: ``operator_s``.

    **Model**: forward and backward passes of a chain of tiny operators, less those of the chain as it is and another forward pass of it, by twice the number of operators.
    """
    graph = fx.symbolic_trace(_ViewedChain())
    x = torch.ones(_TINY, _TINY, requires_grad=True)
    ways: Mapping[str, Callable[[], torch.Tensor]] = {
        "plain": lambda: graph(x), "again": lambda: graph(x),
        "policy": lambda: checkpoint(graph, x, use_reentrant=False, context_fn=partial(create_selective_checkpoint_contexts, _keep_products)),
    }  # fmt: skip
    seconds: dict[str, list[float]] = {name: [] for name in ways}
    for _ in range(repeats):
        for name, run in ways.items():
            begin = time.perf_counter()
            y = run()
            if name != "again":
                y.sum().backward()
            seconds[name].append(time.perf_counter() - begin)
            x.grad = None
            graph.zero_grad()
    plain_s, again_s, policy_s = (sorted(seconds[name])[repeats // 4] for name in ("plain", "again", "policy"))
    calls = 2 * (_VIEWED_OPS * (_NUM_OPS // _VIEWED_OPS))
    return {"operator_s": max(0.0, policy_s - plain_s - again_s) / calls}


def _bare_operator(x: torch.Tensor) -> float:
    """Seconds of one operator call without autograd, in a plain Python loop."""
    with torch.no_grad():
        begin = time.perf_counter()
        for _ in range(_NUM_OPS):
            torch.mul(x, x)
        return (time.perf_counter() - begin) / _NUM_OPS


def sustained(stopwatch: Stopwatch, *, duration_s: float) -> Mapping[str, float]:
    """Rates of a matrix product in the first and the last quarter of a stretch under load: what clocks do when hot."""
    size = _SUSTAINED_SIZE
    a = torch.ones(size, size)
    rates: list[float] = []
    begin = time.perf_counter()
    while time.perf_counter() - begin < duration_s or len(rates) < 4:  # noqa: PLR2004 - a quarter needs one
        rates.append(2 * size**3 / stopwatch.time(lambda: torch.mm(a, a), 1))
    quarter = len(rates) // 4
    return {"first_flops_per_s": _median(rates[:quarter]), "last_flops_per_s": _median(rates[-quarter:]), "num": len(rates)}


def _median(values: list[float]) -> float:
    return sorted(values)[len(values) // 2]


_HOST_COPY_BYTES = 2**28
"""More than the last-level cache of any server processor but a few; two such buffers."""


def host_memory(*, size_bytes: int = _HOST_COPY_BYTES, repeats: int = 5) -> Mapping[str, float]:
    """Bytes/s read plus written by a copy in the host's memory, with all of torch's threads and with one."""
    source, target = (torch.ones(size_bytes // 4) for _ in range(2))
    found = {"bytes": float(size_bytes), "copy_bytes_per_s": _copy_rate(source, target, repeats)}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    try:
        found["copy_one_thread_bytes_per_s"] = _copy_rate(source, target, repeats)
    finally:
        torch.set_num_threads(threads)
    return found


def _copy_rate(source: torch.Tensor, target: torch.Tensor, repeats: int) -> float:
    times = []
    for _ in range(repeats):
        begin = time.perf_counter()
        target.copy_(source)
        times.append(time.perf_counter() - begin)
    return 2 * source.numel() * source.element_size() / min(times)
