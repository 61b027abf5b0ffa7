"""What one kernel costs beside its own work: host dispatch per operator and mode, launch floor, CUDA graphs, compiled chains (bare machine)."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import torch

from hardware_models.microbench_cases import ATEN
from hardware_models.microbench_timing import Stopwatch, keep_busy

_CALLS = 200
"""Operator calls in one sample; below the depth of a GPU's launch queue (about 1000)."""
_SAMPLES = 9
_TINY = 8
_GRAPH_KERNELS = 200
_CHAIN_ELEMENTS = (2**14, 2**20, 2**24, 2**26)
_CHAIN_COLUMNS = 1024


def dispatch_by_operator(device: str) -> dict[str, dict[str, float]]:
    """Host seconds of one eager call on tiny operands, by operator: ``bare_s`` (no autograd), ``forward_s``, ``backward_s`` (all of its nodes)."""
    return {name: _dispatch(build, device) for name, build in _OPERATORS.items()}


def _operands(device: str, *shape: int) -> torch.Tensor:
    return torch.ones(shape, device=device)


def _layer_norm(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x, (_TINY,), weight)


def _attend(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
    heads = (x @ weight).view(1, 1, _TINY, _TINY)
    return torch.nn.functional.scaled_dot_product_attention(heads, heads, heads)


_OPERATORS: Mapping[str, Callable[[torch.Tensor, torch.Tensor], torch.Tensor]] = {
    "mul": torch.mul, "add": torch.add, "mm": torch.mm, "gelu": lambda x, _w: torch.nn.functional.gelu(x), "native_layer_norm": _layer_norm,
    "_softmax": lambda x, _w: torch.softmax(x, -1), "cat": lambda x, w: torch.cat((x, w)), "sum": lambda x, _w: x.sum(0),
    "view": lambda x, _w: x.view(-1), "mm_and_attention": _attend,
}  # fmt: skip
"""Operators of two tiny square matrices."""


def _dispatch(operator: Callable[[torch.Tensor, torch.Tensor], torch.Tensor], device: str) -> dict[str, float]:
    x, weight = _operands(device, _TINY, _TINY), _operands(device, _TINY, _TINY)
    if operator is _layer_norm:
        weight = _operands(device, _TINY)
    with torch.no_grad():
        bare_s = _host_seconds(lambda: operator(x, weight), device)
    leaf = x.clone().requires_grad_()
    with torch.enable_grad():
        forward_s = _host_seconds(lambda: operator(leaf, weight), device)
        backward_s = _backward_seconds(lambda: operator(leaf, weight), leaf, device)
    return {"bare_s": bare_s, "forward_s": forward_s, "backward_s": backward_s}


def _synchronize(device: str) -> None:
    if device == "cuda":
        torch.cuda.synchronize()


def _quartile(samples: list[float]) -> float:
    return sorted(samples)[len(samples) // 4]


def _host_seconds(run: Callable[[], object], device: str, *, num_calls: int = _CALLS) -> float:
    """Lower quartile over samples of the host seconds that a call takes to return."""
    samples = []
    for _ in range(_SAMPLES):
        _synchronize(device)
        begin = time.perf_counter()
        for _ in range(num_calls):
            run()
        samples.append((time.perf_counter() - begin) / num_calls)
    return _quartile(samples)


def _backward_seconds(run: Callable[[], torch.Tensor], leaf: torch.Tensor, device: str) -> float:
    """As `_host_seconds`, of the backward of a sum of many results, by result; includes adding up the leaf's gradients."""
    samples = []
    for _ in range(_SAMPLES):
        results = [run() for _ in range(_CALLS)]
        gradients = [torch.ones_like(result) for result in results]
        _synchronize(device)
        begin = time.perf_counter()
        torch.autograd.grad(results, [leaf], gradients)
        samples.append((time.perf_counter() - begin) / _CALLS)
    return _quartile(samples)


def launches(stopwatch: Stopwatch) -> dict[str, float]:
    """Of tiny kernels on the GPU: device seconds each in a full stream and inside a CUDA graph, host seconds of a replay, by kernel and whole.

    ``graph_replay_s`` is the host's time to launch a graph of 200 kernels; ``isolated_s`` the time between events around one.
    """
    x = torch.ones(_TINY, device="cuda")
    in_stream_s = [stopwatch.time(lambda: x.add_(1), _GRAPH_KERNELS, host_s=2e-5) / _GRAPH_KERNELS for _ in range(_SAMPLES)]
    isolated_s = [stopwatch.time(lambda: x.add_(1), 1, host_s=1e-4) for _ in range(_SAMPLES)]
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(_GRAPH_KERNELS):
            x.add_(1)
    in_graph_s, replay_s = [], []
    for _ in range(_SAMPLES):
        in_graph_s.append(stopwatch.time(graph.replay, 1, host_s=1e-3) / _GRAPH_KERNELS)
        torch.cuda.synchronize()
        keep_busy(1e-3)
        begin = time.perf_counter()
        graph.replay()
        replay_s.append(time.perf_counter() - begin)
    torch.cuda.synchronize()
    return {
        "stream_kernel_s": _quartile(in_stream_s), "isolated_s": _quartile(isolated_s), "graph_kernel_s": _quartile(in_graph_s),
        "graph_replay_s": _quartile(replay_s), "num_kernels": _GRAPH_KERNELS,
    }  # fmt: skip


def _gelu_bias(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x + y)


def _silu_mul(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.silu(x) * y


def _dropout_add(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.dropout(x, 0.1) + y


def _add_norm(x: torch.Tensor, y: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.layer_norm(x + y, (x.shape[-1],))


CHAINS: Mapping[str, tuple[Callable[[torch.Tensor, torch.Tensor], torch.Tensor], int]] = {
    "bias_gelu": (_gelu_bias, 2), "silu_mul": (_silu_mul, 2), "dropout_add": (_dropout_add, 3), "add_layer_norm": (_add_norm, 2),
}  # fmt: skip
"""Chains of two inputs that a compiler fuses into one kernel, with the number of operators that eager mode runs."""


def chain_timings(
    stopwatch: Stopwatch, *, device: str, dtype: torch.dtype, end_s: float, sizes: tuple[int, ...] = _CHAIN_ELEMENTS,
    compiler: Callable[..., Any] = torch.compile, tell: Callable[[float], None] = lambda _fraction: None,
) -> list[dict[str, Any]]:  # fmt: skip
    """Rows of a chain and a size: seconds eager and compiled, the traffic of a fused kernel, host seconds of a call either way.

    Args:
        stopwatch: of the device.
        device: ``cpu`` or ``cuda``.
        dtype: of the operands.
        end_s: of `time.perf_counter`; no chain starts after it.
        sizes: elements.
        compiler: what makes a function one kernel.
        tell: told the fraction done.
    """
    rows: list[dict[str, Any]] = []
    for position, (name, (chain, num_operators)) in enumerate(CHAINS.items()):
        if time.perf_counter() > end_s:
            break
        compiled = compiler(chain, dynamic=False)
        for elements in sizes:
            if time.perf_counter() > end_s:
                break
            shape = (max(1, elements // _CHAIN_COLUMNS), _CHAIN_COLUMNS)
            x, y = (torch.randn(shape, device=device).to(dtype) for _ in range(2))
            rows.append({
                "chain": name, "elements": shape[0] * shape[1], "num_operators": num_operators, "moved_bytes": 3 * x.numel() * x.element_size(),
                **_chain_row("eager", chain, x, y, stopwatch), **_chain_row("compiled", compiled, x, y, stopwatch),
            })  # fmt: skip
        tell((position + 1) / len(CHAINS))
    return rows


def _chain_row(
    mode: str, chain: Callable[..., torch.Tensor], x: torch.Tensor, y: torch.Tensor, stopwatch: Stopwatch
) -> dict[str, float]:
    def run() -> torch.Tensor:
        return chain(x, y)

    with torch.no_grad():
        for _ in range(3):
            run()
        stopwatch.synchronize()
        times = []
        host = []
        for _ in range(5):
            stopwatch.flush()
            times.append(stopwatch.time(run, 1, host_s=1e-3))
            stopwatch.synchronize()
            begin = time.perf_counter()
            run()
            host.append(time.perf_counter() - begin)
    return {f"{mode}_s": sorted(times)[2], f"{mode}_host_s": sorted(host)[1]}


_LONG = 8
"""Reductions in the long compiled region: each needs the one before in full, so none is fused with another."""


def _many_kernels(x: torch.Tensor) -> torch.Tensor:
    for number in range(_LONG):
        x = x - x.amax(dim=number % 2, keepdim=True)
    return x


def _one_kernel(x: torch.Tensor) -> torch.Tensor:
    return torch.nn.functional.gelu(x) * x


def compiled_dispatch(device: str, *, compiler: Callable[..., Any] = torch.compile) -> dict[str, float]:
    """Host seconds of calling compiled regions of one kernel (``short_s``) and of ``num_kernels`` (``long_s``) on tiny operands.

    Of the long region the last subtraction may be a kernel of its own: it is counted as one.
    """
    x = torch.ones(_GRAPH_KERNELS, _GRAPH_KERNELS, device=device)
    found = {"num_kernels": float(_LONG + 1)}
    with torch.no_grad():
        for name, function in (("short_s", _one_kernel), ("long_s", _many_kernels)):
            compiled = compiler(function, dynamic=False)
            for _ in range(3):
                compiled(x)
            found[name] = _host_seconds(lambda compiled=compiled: compiled(x), device, num_calls=_CALLS // _LONG)  # type: ignore[misc]
    return found


def library_workspaces(main: torch.dtype) -> None:
    """Runs a product, a convolution and their gradients, so that the libraries' modules and workspaces are loaded."""
    x = torch.randn(256, 256, device="cuda", dtype=main, requires_grad=True)
    (x @ x).sum().backward()
    image = torch.randn(4, 16, 32, 32, device="cuda", dtype=main, requires_grad=True)
    weight = torch.randn(16, 16, 3, 3, device="cuda", dtype=main, requires_grad=True)
    ATEN.convolution(image, weight, None, [1, 1], [1, 1], [1, 1], False, [0, 0], 1).sum().backward()
    torch.cuda.synchronize()
