"""LiveStorages: one count per storage, from its first appearance to its end."""

from __future__ import annotations

import torch

from simulator.tracing.live_storages import LiveStorages, storage_of
from tests.small_steps import Level

FLOAT_BYTES = 4


def test_every_result_counts_once_until_its_last_view_ends() -> None:
    level = Level()
    with LiveStorages(level.change) as live:
        x = torch.ones(10)
        view = x.view(2, 5)[0]
        assert level.now == 10 * FLOAT_BYTES
        y = view + 1
        assert level.now == (10 + 5) * FLOAT_BYTES
        del x
        assert level.now == (10 + 5) * FLOAT_BYTES, "a view holds its base's storage"
        del view
        assert level.now == live.alive_bytes == 5 * FLOAT_BYTES
        y.add_(1)
        assert level.now == 5 * FLOAT_BYTES
        del y
    assert level.now == live.alive_bytes == 0
    assert level.peak == (10 + 5) * FLOAT_BYTES


def test_temporaries_of_an_expression_show_in_the_peak() -> None:
    level = Level()
    x = torch.ones(10)
    with LiveStorages(level.change):
        y = (x + 1) * 2
    assert level.peak == 2 * 10 * FLOAT_BYTES
    assert level.now == 10 * FLOAT_BYTES
    assert y.sum() == 40


def test_storages_made_before_are_counted_when_they_are_added_and_once() -> None:
    changes: list[tuple[int, int]] = []
    live = LiveStorages(lambda identity, delta_bytes: changes.append((identity, delta_bytes)))
    x = torch.ones(3)
    identity = storage_of(x)
    live.add([x, x, x.view(3, 1)])
    live.add([x[1:]])
    assert changes == [(identity, 3 * FLOAT_BYTES)]
    del x
    assert changes[1:] == [(identity, -3 * FLOAT_BYTES)]


def test_empty_storages_are_not_counted() -> None:
    level = Level()
    with LiveStorages(level.change):
        assert torch.empty(0).numel() == 0
    assert level.peak == 0


def test_a_storage_that_outlives_the_mode_is_followed_to_its_end() -> None:
    level = Level()
    with LiveStorages(level.change):
        x = torch.ones(2)
    torch.ones(5)
    assert level.now == 2 * FLOAT_BYTES
    del x
    assert level.now == 0


def test_what_autograd_saves_is_alive_until_the_backward_pass() -> None:
    level = Level()
    weight = torch.ones(4, requires_grad=True)
    with LiveStorages(level.change):
        y = (weight * 2).exp().sum()
        assert level.now == (4 + 1) * FLOAT_BYTES, "exp saves its result, the product is gone"
        y.backward()
        assert level.now == (4 + 1) * FLOAT_BYTES, "the gradient and the loss"
    assert weight.grad is not None
