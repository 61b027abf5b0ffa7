"""The tensor graph of a block says what the recorded passes say."""

from __future__ import annotations

import pytest

from simulator.tensor_graph import TensorGraph
from simulator.tracing.record import Setting
from simulator.tracing.record_graph import record_graph
from simulator.tracing.traced_model import Traced
from tests.small_models import SMALL_MODELS, traced


def graph_of(model: Traced, index: int) -> TensorGraph:
    return record_graph(Setting(chain=model.chain, index=index, shared=model.shared, fresh_shared=frozenset()))


def test_operators_of_a_residual_block() -> None:
    graph = graph_of(traced("residual-mlp"), 2)
    named = [(operation.name, operation.reads, operation.writes) for operation in graph.operations]
    assert named[:4] == [
        ("native_layer_norm", (0,), (1, 2, 3)), ("addmm", (1,), (4,)), ("gelu", (4,), (5,)), ("addmm", (5,), (6,))
    ]  # fmt: skip
    assert named[-1] == ("add", (0, 8), (9,))
    assert [operation.name for operation in graph.operations if not operation.is_repeatable] == ["empty_like"]
    assert [number for number, tensor in enumerate(graph.tensors) if tensor.is_boundary] == [0, 9]


@pytest.mark.parametrize(
    "name",
    [
        name if name in {"spectral", "in-place-boundary"} else pytest.param(name, marks=pytest.mark.slow)
        for name in SMALL_MODELS
    ],
)
def test_agrees_with_the_recorded_passes(name: str) -> None:
    model = traced(name)
    for index, block in enumerate(model.workload.blocks):
        graph, option = graph_of(model, index), block.options[0]
        saved = sum(tensor.size_bytes for tensor in graph.tensors if tensor.is_saved and not tensor.is_boundary)
        assert saved == option.saved_internal_bytes
        assert sorted(str(kernel) for operation in graph.operations for kernel in operation.kernels) == sorted(
            str(kernel) for kernel in option.forward.kernels
        )
        there = {number for number, tensor in enumerate(graph.tensors) if tensor.is_boundary}
        for operation in graph.operations:
            assert set(operation.reads) <= there
            there.update(operation.writes)
