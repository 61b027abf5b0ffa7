"""Cut: which blocks a module becomes, which of them are one, and what a block says about itself."""

# ruff: noqa: D101, D102 - small modules: forward is forward

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

from simulator.tracing import cut as cutting
from simulator.tracing.capture import capture
from simulator.tracing.cut import Chain, cut
from tests.small_models import BATCH, SMALL_MODELS, TOKENS, WIDTH, build, traced

NUM_BLOCKS = {
    "residual-mlp": (5, 3),
    "convolution-net": (5, 5),
    "transformer": (8, 5),
    "own-function": (1, 1),
    "no-grad-region": (3, 3),
    "skip-over-everything": (1, 1),
    "cached-attribute": (3, 3),
    "spectral": (4, 3),
    "shared-layer": (6, 4),
    "class-token": (4, 3),
    "transposing": (3, 3),
    "in-place-boundary": (3, 3),
}
"""(blocks, distinct blocks)."""


def chain(name: str) -> Chain:
    return cut(capture(*build(name), name=name))


@pytest.mark.parametrize(("name", "expected"), NUM_BLOCKS.items())
def test_blocks_and_which_of_them_are_one(name: str, expected: tuple[int, int]) -> None:
    blocks = traced(name).workload.blocks
    assert (len(blocks), len({id(block) for block in blocks})) == expected


def test_identical_blocks_are_the_same_object() -> None:
    first, one, two, three, last = traced("residual-mlp").workload.blocks
    assert one is two
    assert two is three
    assert first is not one
    assert last is not three, "the last block holds the loss"


def test_blocks_of_the_residual_network_begin_with_its_layers() -> None:
    operators = [block.operators for block in chain("residual-mlp").blocks]
    assert operators[0] == ("linear",)
    assert operators[1] == ("layer_norm", "linear", "gelu", "linear", "dropout", "add")
    assert operators[-1][: len(operators[1])] == operators[1]


def test_all_operators_are_in_one_block_each() -> None:
    for name in ("residual-mlp", "transformer", "spectral"):
        found = chain(name)
        assert found.capture.graph is not None
        nodes = [n for n in found.capture.graph.graph.nodes if n.op not in {"placeholder", "get_attr", "output"}]
        in_blocks = [operator for block in found.blocks for operator in block.operators]
        assert in_blocks == [cutting.operator_name(node) for node in nodes], name


@pytest.mark.parametrize("name", ["skip-over-everything", "own-function"])
def test_a_graph_without_a_cut_is_one_block_and_says_so(name: str) -> None:
    (note,) = chain(name).notes
    assert note.startswith("one block: ")
    if name == "skip-over-everything":
        assert note == "one block: no single tensor crosses between its operators"


def test_tables_and_masks_are_carried_and_do_not_hinder_a_cut() -> None:
    found = chain("transformer")
    assert {tuple(value.shape) for value in found.carried.values()} >= {(TOKENS, WIDTH // 4), (TOKENS, TOKENS)}
    makers = [block for block in found.blocks if block.carried_out]
    assert makers == [found.blocks[0]]
    assert all(block.names("c") for block in found.blocks[1:-1:2])
    assert [tuple(x.shape) for x in found.boundaries[1:] if x is not None] == [(BATCH, TOKENS, WIDTH)] * 7


def test_a_region_without_gradients_lies_within_one_block() -> None:
    for block in chain("no-grad-region").blocks:
        assert block.operators.count("_set_grad_enabled") == 2


def test_a_boundary_is_not_changed_by_the_block_after_it() -> None:
    found = chain("in-place-boundary")
    assert [block.operators for block in found.blocks[:2]] == [("linear", "relu_"), ("linear", "relu_")]


class Autocast(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.layers = nn.ModuleList(nn.Linear(8, 8) for _ in range(4))

    def forward(self, x: Tensor) -> Tensor:
        x = self.layers[0](x)
        with torch.autocast("cpu", dtype=torch.bfloat16):
            x = self.layers[2](self.layers[1](x))
        return self.layers[3](x.float())


def test_an_autocast_region_lies_within_one_block() -> None:
    found = cut(capture(Autocast(), {"x": torch.randn(2, 8)}))
    inside = [block for block in found.blocks if "_enter_autocast" in block.operators]
    assert len(found.blocks) == 3
    assert len(inside) == 1
    assert "_exit_autocast" in inside[0].operators
    assert inside[0].operators.count("linear") == 2


def test_long_chains_are_joined(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cutting, "MAX_BLOCKS", 4)
    found = chain("residual-mlp")
    assert len(found.blocks) == 3
    assert found.notes == ("5 blocks joined by 2 to stay under 4",)


def test_blocks_say_what_they_draw_mix_and_change() -> None:
    found = chain("residual-mlp")
    assert [block.uses_randomness for block in found.blocks] == [False, True, True, True, True]
    assert not any(block.uses_randomness for block in chain("eval-mlp").blocks)
    found = chain("convolution-net")
    assert [block.mixes_samples for block in found.blocks] == [False, True, True, True, False]
    assert found.blocks[1].mutated_buffers == (
        "layers.0.norm.num_batches_tracked", "layers.0.norm.running_mean", "layers.0.norm.running_var",
    )  # fmt: skip
    evaluated = chain("eval-convolution")
    assert not any(block.mixes_samples or block.mutated_buffers for block in evaluated.blocks)


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_every_parameter_with_a_gradient_is_an_argument_of_some_block(name: str) -> None:
    found = traced(name).chain
    used = {parameter for block in found.blocks for parameter in block.names("p")}
    assert used >= found.capture.trained


def test_parameters_of_several_blocks_are_shared() -> None:
    assert traced("transformer").shared == {"embedding.weight"}
    assert traced("shared-layer").shared == {"shared.weight", "shared.bias"}
    assert not traced("residual-mlp").shared
