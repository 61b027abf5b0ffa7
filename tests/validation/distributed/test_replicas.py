"""Gradients in buckets and parameters in parts, on a group of one process: what is packed comes back, and an update of parts is the update."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch.distributed as dist
from torch import nn

from simulator.parallel.traced_replicas import Bucket, buckets_of
from simulator.parallel.traced_stage import Holding
from validation.distributed.replicas import ReplicaExchange
from validation.optimizer import FusedOptimizer

LEARNING_RATE = 0.1


@pytest.fixture(scope="module")
def group() -> Iterator[dist.ProcessGroup]:
    dist.init_process_group("gloo", store=dist.HashStore(), rank=0, world_size=1)
    whole = dist.group.WORLD
    assert whole is not None
    yield whole
    dist.destroy_process_group()


def parameters_of(seed: int = 0) -> dict[str, nn.Parameter]:
    generator = torch.Generator().manual_seed(seed)
    shapes = {"a": (3, 5), "b": (7,), "c": (4, 6)}
    found = {name: nn.Parameter(torch.randn(shape, generator=generator)) for name, shape in shapes.items()}
    found["turned"] = nn.Parameter(torch.randn((6, 2), generator=generator).t())
    found["z"] = nn.Parameter(torch.randn((3, 2), dtype=torch.complex64, generator=generator))
    return found


def buckets(parameters: dict[str, nn.Parameter], *, ranks: int) -> tuple[Bucket, ...]:
    held = {
        name: Holding(
            size_bytes=value.numel() * value.element_size(), elements=value.numel(), trained=True, dtype=str(value.dtype)
        )
        for name, value in parameters.items()
    }
    return buckets_of(held, limit_bytes=100, multiple=16 * ranks)


def fill(parameters: dict[str, nn.Parameter]) -> dict[str, torch.Tensor]:
    for name, value in parameters.items():
        value.grad = torch.full_like(value, len(name)) + torch.arange(value.numel()).view(value.shape)
    return {name: value.grad.clone() for name, value in parameters.items() if value.grad is not None}


@pytest.mark.parametrize("overlaps", [True, False])
def test_sums_come_back_to_their_parameters(group: dist.ProcessGroup, overlaps: bool) -> None:
    parameters = parameters_of()
    exchange = ReplicaExchange(parameters, buckets(parameters, ranks=1), group, splits=False, overlaps=overlaps)
    for _ in range(2):
        exchange.begin()
        expected = fill(parameters)
        exchange.final(["a", "b", "unknown"])
        exchange.final(["c"])
        exchange.finish()
        for name, value in parameters.items():
            assert value.grad is not None
            assert value.grad.stride() == value.stride()
            assert torch.equal(value.grad, expected[name])
    assert exchange.parts == []


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_an_update_of_parts_is_the_update(group: dist.ProcessGroup, name: str) -> None:
    plain, split = parameters_of(), parameters_of()
    exchange = ReplicaExchange(split, buckets(split, ranks=1), group, splits=True, overlaps=True)
    assert all(torch.equal(plain[key], split[key]) for key in plain)
    whole = FusedOptimizer(plain.values(), name=name, learning_rate=LEARNING_RATE)
    parts = FusedOptimizer(exchange.parts, name=name, learning_rate=LEARNING_RATE)
    for _ in range(3):
        exchange.begin()
        fill(plain)
        expected = fill(split)
        exchange.finish()
        gathered = {key: value.clone() for key, value in exchange.take_gradients().items()}
        assert all(torch.equal(gathered[key], expected[key]) for key in expected)
        exchange.begin()
        fill(split)
        exchange.finish()
        assert all(value.grad is None for value in split.values())
        whole.step()
        parts.step()
        exchange.gather()
    for key in plain:
        assert torch.allclose(plain[key], split[key], rtol=1e-6, atol=1e-7)
        assert not torch.equal(plain[key], parameters_of()[key])


def update_on_two(rank: int) -> None:
    """Run on two processes: parts of two ranks together are the plain update. `tests.validation.distributed.several_jobs` calls it."""
    group = dist.group.WORLD
    assert group is not None
    plain, split = parameters_of(), parameters_of()
    exchange = ReplicaExchange(split, buckets(split, ranks=2), group, splits=True, overlaps=False)
    whole = FusedOptimizer(plain.values(), learning_rate=LEARNING_RATE)
    parts = FusedOptimizer(exchange.parts, learning_rate=LEARNING_RATE)
    assert 2 * sum(part.numel() for part in exchange.parts) == sum(bucket.elements for bucket in buckets(plain, ranks=2))
    for _ in range(3):
        exchange.begin()
        for key, grad in fill(plain).items():
            plain[key].grad = 3 * grad
            split[key].grad = (1 + rank) * grad
        exchange.finish()
        whole.step()
        parts.step()
        exchange.gather()
    for key in plain:
        assert torch.allclose(plain[key], split[key], rtol=1e-6, atol=1e-7), key
