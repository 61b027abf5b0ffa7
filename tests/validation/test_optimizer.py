"""The fused optimizer: torch's own steps, complex parameters among them, without temporaries."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from hardware_models.errors import UnknownNameError
from simulator.optimizer_states import OPTIMIZER_STATES, STEP_COUNT_BYTES
from simulator.tracing.live_storages import LiveStorages
from tests.small_steps import Level
from validation.optimizer import FusedOptimizer

NUM_ELEMENTS = 30
FLOAT_BYTES = 4


def parameters(dtype: torch.dtype = torch.float32) -> list[nn.Parameter]:
    torch.manual_seed(0)
    return [nn.Parameter(torch.randn(NUM_ELEMENTS, dtype=dtype)) for _ in range(2)]


def set_gradients(tensors: list[nn.Parameter], seed: int) -> None:
    torch.manual_seed(seed)
    for tensor in tensors:
        tensor.grad = torch.randn_like(tensor)


@pytest.mark.parametrize(("name", "reference"), [("adamw", torch.optim.AdamW), ("sgd", torch.optim.SGD)])
def test_steps_are_torchs(name: str, reference: type[torch.optim.Optimizer]) -> None:
    mine, theirs = parameters(), parameters()
    ours, torchs = FusedOptimizer(mine, name=name, learning_rate=0.1), reference(theirs, lr=0.1)
    for seed in range(3):
        set_gradients(mine, seed)
        set_gradients(theirs, seed)
        ours.step()
        torchs.step()
        for one, other in zip(mine, theirs, strict=True):
            torch.testing.assert_close(one, other)
    assert not torch.equal(mine[0], parameters()[0])


def test_a_complex_parameter_steps_as_its_two_real_parts() -> None:
    mine, theirs = parameters(torch.cfloat), parameters(torch.cfloat)
    ours, torchs = FusedOptimizer(mine, learning_rate=0.1), torch.optim.AdamW(theirs, lr=0.1, foreach=False)
    for seed in range(3):
        set_gradients(mine, seed)
        set_gradients(theirs, seed)
        ours.step()
        torchs.step()
    for one, other in zip(mine, theirs, strict=True):
        torch.testing.assert_close(one, other)
    assert all(one.is_complex() for one in mine)


@pytest.mark.parametrize("dtype", [torch.float32, torch.cfloat])
def test_gradients_are_let_go_and_nothing_else_comes(dtype: torch.dtype) -> None:
    tensors = parameters(dtype)
    optimizer = FusedOptimizer(tensors)
    set_gradients(tensors, 0)
    optimizer.step()
    set_gradients(tensors, 1)
    level = Level()
    live = LiveStorages(level.change)
    live.add([*tensors, *(tensor.grad for tensor in tensors if tensor.grad is not None), *optimizer.state_tensors])
    before, gradients = level.now, sum(tensor.numel() * tensor.element_size() for tensor in tensors)
    with live:
        optimizer.step()
    assert level.now == before - gradients
    assert level.peak == before
    assert all(tensor.grad is None for tensor in tensors)


@pytest.mark.parametrize("name", OPTIMIZER_STATES)
def test_states_are_of_the_predicted_size(name: str) -> None:
    tensors = parameters()
    optimizer = FusedOptimizer(tensors, name=name)
    assert optimizer.state_tensors == []
    set_gradients(tensors, 0)
    optimizer.step()
    expected = len(tensors) * (OPTIMIZER_STATES[name] * NUM_ELEMENTS * FLOAT_BYTES + STEP_COUNT_BYTES[name])
    assert sum(state.numel() * state.element_size() for state in optimizer.state_tensors) == expected


def test_parameters_that_are_frozen_or_have_no_gradient_stay() -> None:
    frozen, unused, used = (nn.Parameter(torch.ones(3)) for _ in range(3))
    frozen.requires_grad_(requires_grad=False)
    optimizer = FusedOptimizer([frozen, unused, used], learning_rate=0.1)
    used.grad = torch.ones(3)
    optimizer.step()
    assert frozen.tolist() == unused.tolist() == [1.0] * 3
    assert used.tolist() != [1.0] * 3
    assert sum(state.numel() for state in optimizer.state_tensors) == 2 * 3 + 1


def test_an_unknown_optimizer_lists_the_known() -> None:
    with pytest.raises(UnknownNameError, match=r"precision.optimizer = 'lion': unknown name; known are adamw, sgd"):
        FusedOptimizer(parameters(), name="lion")


@pytest.mark.parametrize("name", ["adamw", "sgd"])
def test_gradients_of_a_scaled_loss_are_scaled_back_and_infinite_ones_change_nothing(name: str) -> None:
    plain, scaled = parameters(), parameters()
    ours = FusedOptimizer(plain, name=name, learning_rate=0.1)
    wide = FusedOptimizer(scaled, name=name, learning_rate=0.1)
    wide.loss_scale = 1024.0
    assert wide.like(scaled).loss_scale == 1024.0
    for seed in range(3):
        set_gradients(plain, seed)
        for one, other in zip(plain, scaled, strict=True):
            assert one.grad is not None
            other.grad = one.grad * 1024.0
        ours.step()
        wide.step()
    for one, other in zip(plain, scaled, strict=True):
        assert torch.equal(one, other)
    before = [tensor.detach().clone() for tensor in scaled]
    set_gradients(scaled, 9)
    assert scaled[0].grad is not None
    scaled[0].grad[0] = float("inf")
    wide.step()
    assert all(torch.equal(tensor, one) for tensor, one in zip(scaled, before, strict=True))


def test_ranks_update_all_or_none() -> None:
    """Ranks whose own gradients are finite ask the others, also where they have nothing to update."""
    flags: list[float] = []

    def elsewhere(flag: torch.Tensor) -> None:
        flags.append(float(flag))
        flag.fill_(1.0)

    parameter = torch.nn.Parameter(torch.ones(3))
    optimizer, nothing = FusedOptimizer([parameter], learning_rate=0.1), FusedOptimizer([])
    for one in (optimizer, nothing):
        one.loss_scale, one.agree = 8.0, elsewhere
    parameter.grad = torch.full((3,), 16.0)
    optimizer.step()
    nothing.step()
    assert flags == [0.0, 0.0]
    assert torch.equal(parameter, torch.ones(3)), "another rank's gradients were not finite"
    optimizer.agree = lambda _: None
    parameter.grad = torch.full((3,), 16.0)
    optimizer.step()
    assert not torch.equal(parameter, torch.ones(3))
    parameter.grad = torch.full((3,), float("inf"))
    seen: list[float] = []
    optimizer.agree = lambda flag: seen.append(float(flag))
    optimizer.step()
    assert seen == [1.0]
