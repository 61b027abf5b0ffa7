"""Host time of a layer, and of an exchange with a neighbour, written as Megatron-LM v2.5 writes them: modules, autograd functions, scripted fusions, forked random states, checkpointing.

Plain torch on a tiny input, so that nothing but the host is timed. Prints seconds per layer (lower quartile of the thread's own time): forward, backward, and both with
the layer checkpointed; then of one exchange (a send and a receipt of the steady state, on a group that moves nothing), and of what lies
between a number read back and an attention's launch. `simulator.parallel.host_python` holds what it gave.

    python -m validation.layer_host_time

**Source**: the operators and calls of NVIDIA/Megatron-LM v2.5 megatron/model/transformer.py, fused_bias_gelu.py, fused_softmax.py, mpu/layers.py, mpu/random.py, p2p_communication.py (``_communicate``); written anew here.

**Not modelled**: launches on a device (the tiny kernels of a CPU stand in for them), collectives, the training loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, distributed, nn
from torch.nn import functional
from torch.testing._internal.distributed.fake_pg import FakeStore

BATCH, LENGTH, WIDTH, HEADS, LAYERS = 1, 4, 32, 2, 12
REPEATS = 60
_WARM_UP = 10
_DROPOUT = 0.1
_NEIGHBOURS = 4
"""Pipeline ranks of the group that moves nothing."""
_STATE_BYTES = 16
"""Of a generator on CUDA."""


class _RandomStates:
    """Random states by name, as the tracker for tensor parallel ranks keeps them."""

    def __init__(self) -> None:
        self.current, self.named = (
            torch.zeros(_STATE_BYTES, dtype=torch.uint8),
            {"parallel": torch.zeros(_STATE_BYTES, dtype=torch.uint8)},
        )

    def get(self) -> Tensor:
        return self.current.clone()

    def put(self, state: Tensor) -> None:
        self.current.copy_(state)

    @contextmanager
    def fork(self) -> Iterator[None]:
        before = self.get()
        self.put(self.named["parallel"])
        try:
            yield
        finally:
            self.named["parallel"] = self.get()
            self.put(before)


STATES = _RandomStates()


class _Passed(torch.autograd.Function):
    """The place of a collective, forward or backward."""

    @staticmethod
    def forward(_context: Any, x: Tensor) -> Tensor:
        return x

    @staticmethod
    def backward(_context: Any, gradient: Tensor) -> Tensor:
        return gradient


def _add_and_drop(x: Tensor, bias: Tensor, residual: Tensor) -> Tensor:
    return residual + functional.dropout(x + bias, p=0.1, training=True)


def _gelu(bias: Tensor, x: Tensor) -> Tensor:
    y = x + bias
    return y * 0.5 * (1.0 + torch.tanh(0.79788456 * y * (1.0 + 0.044715 * y * y)))


def _gelu_gradient(gradient: Tensor, bias: Tensor, x: Tensor) -> Tensor:
    y = x + bias
    inner = torch.tanh(0.79788456 * y * (1.0 + 0.044715 * y * y))
    return gradient * (0.5 * y * ((1.0 - inner * inner) * (0.79788456 + 0.1070322243 * y * y)) + 0.5 * (1.0 + inner))


class _Fused:
    """The three fusions, scripted once."""

    def __init__(self) -> None:
        self.add_and_drop, self.gelu, self.gelu_gradient = (
            torch.jit.script(one) for one in (_add_and_drop, _gelu, _gelu_gradient)
        )


class _FusedGelu(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor, bias: Tensor, fused: _Fused) -> Any:
        context.save_for_backward(x, bias)
        context.fused = fused
        return fused.gelu(bias, x)

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        x, bias = context.saved_tensors
        made = context.fused.gelu_gradient(gradient, bias, x)
        return made, made, None


class _FusedSoftmax(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, x: Tensor) -> Any:
        result = torch.softmax(x, -1)
        context.save_for_backward(result)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        (result,) = context.saved_tensors
        return torch._softmax_backward_data(gradient, result, -1, result.dtype)  # noqa: SLF001 - the operator behind torch's own softmax


class _Product(nn.Module):
    """A linear layer whose bias is returned for the next fusion, with a collective's place before or behind it."""

    def __init__(self, rows: int, columns: int, *, gives_bias: bool) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.randn(columns, rows)), nn.Parameter(torch.zeros(columns))
        self.gives_bias = gives_bias

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        whole = _Passed.apply(x)  # type: ignore[no-untyped-call]
        return functional.linear(whole, self.weight, None if self.gives_bias else self.bias), self.bias


class _Attention(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.output = _Product(WIDTH, 3 * WIDTH, gives_bias=False), _Product(WIDTH, WIDTH, gives_bias=True)
        self.dropout = nn.Dropout(_DROPOUT)

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor]:
        length, batch, _ = x.shape
        mixed, _ = self.qkv(x)
        query, key, value = (
            part.reshape(length, batch * HEADS, -1)
            for part in mixed.view(length, batch, HEADS, -1).split(WIDTH // HEADS, dim=3)
        )
        room = torch.empty(batch * HEADS, length, length)
        scores = torch.baddbmm(room, query.transpose(0, 1), key.transpose(0, 1).transpose(1, 2), beta=0.0, alpha=0.25)
        shares = _FusedSoftmax.apply(scores.view(batch, HEADS, length, length).view(-1, length, length))  # type: ignore[no-untyped-call]
        with STATES.fork():
            shares = self.dropout(shares.view(batch, HEADS, length, length))
        found = torch.bmm(shares.view(batch * HEADS, length, length), value.transpose(0, 1)).view(batch, HEADS, length, -1)
        result: tuple[Tensor, Tensor] = self.output(found.permute(2, 0, 1, 3).contiguous().view(length, batch, WIDTH))
        return result


class _Layer(nn.Module):
    def __init__(self, fused: _Fused) -> None:
        super().__init__()
        self.fused = fused
        self.first, self.second = nn.LayerNorm(WIDTH), nn.LayerNorm(WIDTH)
        self.attention = _Attention()
        self.up, self.down = _Product(WIDTH, 4 * WIDTH, gives_bias=True), _Product(4 * WIDTH, WIDTH, gives_bias=True)

    def forward(self, x: Tensor) -> Tensor:
        branch, bias = self.attention(self.first(x))
        middle = self.fused.add_and_drop(branch, bias.expand_as(x), x)
        wide, bias = self.up(self.second(middle))
        branch, bias = self.down(_FusedGelu.apply(wide, bias, self.fused))  # type: ignore[no-untyped-call]
        result: Tensor = self.fused.add_and_drop(branch, bias.expand_as(middle), middle)
        return result


class _Checkpointed(torch.autograd.Function):
    @staticmethod
    def forward(context: Any, layer: nn.Module, x: Tensor) -> Any:
        context.layer, context.states = layer, (STATES.get(), STATES.get(), dict(STATES.named))
        with torch.no_grad():
            result = layer(x)
        context.save_for_backward(x)
        return result

    @staticmethod
    def backward(context: Any, gradient: Tensor) -> Any:
        (x,) = context.saved_tensors
        before = (STATES.get(), STATES.get(), dict(STATES.named))
        STATES.put(context.states[0])
        STATES.put(context.states[1])
        STATES.named = dict(context.states[2])
        again = x.detach().requires_grad_()
        with torch.enable_grad():
            result = context.layer(again)
        STATES.put(before[0])
        STATES.put(before[1])
        STATES.named = before[2]
        torch.autograd.backward(result, gradient)
        return None, again.grad


def layer_seconds(*, checkpointed: bool, repeats: int = REPEATS) -> tuple[float, float]:
    """Seconds of the thread for one layer's forward and backward pass, lower quartiles over repeats."""
    fused = _Fused()
    layers = [_Layer(fused) for _ in range(LAYERS)]
    forward, backward = [], []
    for _ in range(_WARM_UP + repeats):
        x = torch.randn(LENGTH, BATCH, WIDTH, requires_grad=True)
        begin = time.thread_time()
        for layer in layers:
            x = _Checkpointed.apply(layer, x) if checkpointed else layer(x)  # type: ignore[no-untyped-call]
        middle = time.thread_time()
        x.sum().backward()
        forward.append((middle - begin) / LAYERS)
        backward.append((time.thread_time() - middle) / LAYERS)
    quartile = repeats // 4
    return sorted(forward[_WARM_UP:])[quartile], sorted(backward[_WARM_UP:])[quartile]


def exchange_seconds(*, repeats: int = REPEATS) -> float:
    """Seconds of the thread for one exchange that the host waits for, lower quartile over repeats: buffer, two operations, their group, the wait."""
    distributed.init_process_group("fake", rank=1, world_size=_NEIGHBOURS, store=FakeStore())
    try:
        sent, found = torch.zeros(LENGTH, BATCH, WIDTH), []
        for _ in range(_WARM_UP + repeats):
            begin = time.thread_time()
            for _ in range(LAYERS):
                received = torch.empty(sent.shape, requires_grad=True)
                peer = (distributed.get_rank() + 1) % distributed.get_world_size()
                both = (distributed.P2POp(distributed.isend, sent, peer), distributed.P2POp(distributed.irecv, received, peer))
                for request in distributed.batch_isend_irecv(list(both)):
                    request.wait()
            found.append((time.thread_time() - begin) / LAYERS)
    finally:
        distributed.destroy_process_group()
    return sorted(found[_WARM_UP:])[repeats // 4]


class _Attends(torch.autograd.Function):
    """Stands for a fused attention over packed samples, with as many arguments as flash-attn's."""

    @staticmethod
    def forward(context: Any, query: Tensor, key: Tensor, value: Tensor, *others: Any) -> Tensor:
        found, sums = torch.empty_like(query), torch.empty(HEADS)
        context.save_for_backward(query, key, value, found, sums)
        context.others = others
        return found


def read_back_seconds(*, repeats: int = REPEATS) -> float:
    """Seconds of the thread between a number that the host has read back and the launch of an attention, lower quartile: three views and the function's call."""
    queries = [torch.randn(LENGTH, BATCH, HEADS, WIDTH, requires_grad=True) for _ in range(3)]
    places, found = torch.tensor([0, LENGTH]), []
    for _ in range(_WARM_UP + repeats):
        begin = time.thread_time()
        for _ in range(LAYERS):
            packed = (x.permute(1, 0, 2, 3).reshape(-1, HEADS, WIDTH) for x in queries)
            _Attends.apply(*packed, places, places, LENGTH, LENGTH, 0.0, 1.0, True, (-1, -1), 0.0, None, False, False, None)  # type: ignore[no-untyped-call]
        found.append((time.thread_time() - begin) / LAYERS)
    return sorted(found[_WARM_UP:])[repeats // 4]


def main() -> None:
    """Prints them."""
    torch.set_num_threads(1)
    for checkpointed in (False, True):
        forward_s, backward_s = layer_seconds(checkpointed=checkpointed)
        kind = "checkpointed" if checkpointed else "plain"
        print(f"{kind}: forward {forward_s * 1e6:.0f} us, backward {backward_s * 1e6:.0f} us")  # noqa: T201 - the command's output
    print(f"exchange: {exchange_seconds() * 1e6:.0f} us")  # noqa: T201 - the command's output
    print(f"attention after a number read back: {read_back_seconds() * 1e6:.0f} us")  # noqa: T201 - the command's output


if __name__ == "__main__":
    main()
