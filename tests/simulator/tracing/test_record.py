"""Record: what each pass allocates, keeps and lets go; the books balance for every small model, option and block."""

# ruff: noqa: D102 - small modules: forward is forward

from __future__ import annotations

from collections import Counter
from typing import get_args

import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from simulator.tracing.trace import trace
from simulator.workload import Block, Buffer, Pass, Workload
from tests.small_models import BATCH, SMALL_MODELS, TOKENS, WIDTH, traced

FLOAT_BYTES = 4
BOUNDARY_BYTES = BATCH * WIDTH * WIDTH * FLOAT_BYTES


def net(run: Pass) -> Counter[str]:
    """Bytes left of each buffer after a pass; those that came and went left out."""
    sums = Counter[str]()
    for event in run.memory:
        sums[event.buffer] += event.delta_bytes
    return Counter({name: size for name, size in sums.items() if size})


def blocks_of(name: str, num_microbatches: int = 1) -> tuple[Workload, tuple[Block, ...]]:
    workload = traced(name, num_microbatches).workload
    return workload, workload.blocks


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_the_books_of_every_block_balance(name: str) -> None:
    workload, blocks = blocks_of(name)
    for index, block in enumerate(blocks):
        last = index == len(blocks) - 1
        discard = net(block.discard)
        assert discard.pop("output") == block.output_bytes
        assert set(discard) <= {"carried"}, "a forward pass without a graph leaves its output and what is carried"
        for option in block.options:
            forward = net(option.forward)
            assert forward["output"] == block.output_bytes
            assert forward["internal"] == option.saved_internal_bytes >= 0
            assert option.backward.kernels
            for backward, made in ((option.backward, block.gradient_bytes), (option.backward_accumulate, 0)):
                sums = net(backward)
                assert sums["internal"] == -option.saved_internal_bytes, (index, option.name)
                assert sums["gradient"] == made, (index, option.name)
                assert sums["grad_input"] == (blocks[index - 1].output_bytes if index else 0)
                assert (sums["saved_input"] < 0) == option.keeps_input
                assert (sums["saved_output"] < 0) == option.keeps_output
        assert block.output_bytes == (FLOAT_BYTES if last else blocks[index + 1].input_bytes)
    assert sum(block.gradient_bytes for block in blocks) + workload.shared_gradient_bytes == workload.gradient_bytes


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_events_come_in_order_and_within_their_pass(name: str) -> None:
    for block in blocks_of(name)[1]:
        for option in block.options:
            for run in (block.discard, option.forward, option.backward, option.backward_accumulate):
                kernels = [event.kernel for event in run.memory]
                assert kernels == sorted(kernels)
                assert all(0 <= kernel <= len(run.kernels) for kernel in kernels)
                assert {event.buffer for event in run.memory} <= set(get_args(Buffer))


@pytest.mark.parametrize("name", SMALL_MODELS)
def test_selective_keeps_less_and_computes_products_once(name: str) -> None:
    for block in blocks_of(name)[1]:
        first, *others = block.options
        assert first.name == "all"
        for option in others:
            assert option.name == "selective"
            assert option.saved_internal_bytes < first.saved_internal_bytes
            assert option.forward.flops == first.forward.flops
            assert option.backward.flops == first.backward.flops, "only what is no product runs again"
            assert len(option.backward.kernels) > len(first.backward.kernels)


def test_saved_tensors_of_a_residual_layer() -> None:
    """The last is dropout's mask, which is of the activations' dtype."""
    block = blocks_of("residual-mlp")[1][1]
    option = block.option("all")
    rows = BATCH * WIDTH
    assert [(saved.op, saved.size_bytes // FLOAT_BYTES) for saved in option.saved if saved.dtype == "float32"] == [
        ("input", rows * WIDTH), ("native_layer_norm", rows * WIDTH), ("native_layer_norm", rows), ("native_layer_norm", rows),
        ("addmm", rows * 2 * WIDTH), ("gelu", rows * 2 * WIDTH),
        ("empty_like", rows * WIDTH),
    ]  # fmt: skip
    assert option.keeps_input
    assert not option.keeps_output
    assert block.input_bytes == block.output_bytes == BOUNDARY_BYTES
    kept = {saved.op for saved in block.option("selective").saved}
    assert "addmm" in kept
    assert not kept & {"gelu", "native_layer_norm"}


def test_an_unknown_option_is_a_key_error() -> None:
    with pytest.raises(KeyError, match="nothing"):
        blocks_of("residual-mlp")[1][0].option("nothing")


def test_selective_says_how_often_it_asks_its_policy() -> None:
    block = blocks_of("residual-mlp")[1][1]
    plain, selective = block.option("all"), block.option("selective")
    assert (plain.forward.policy_calls, plain.backward.policy_calls, block.discard.policy_calls) == (0, 0, 0)
    calls = selective.forward.policy_calls
    assert selective.backward.policy_calls == selective.backward_accumulate.policy_calls == calls
    assert len(selective.forward.kernels) < calls < 4 * len(selective.forward.kernels), "of each operator, views among them"


def test_a_block_that_changes_a_product_in_place_has_no_selective_option() -> None:
    stem, *layers, _ = blocks_of("convolution-net")[1]
    assert [option.name for option in stem.options] == ["all"], "relu_ overwrites the convolution's result"
    assert all(len(block.options) == 2 for block in layers), "relu_ overwrites the normalisation's"


def test_a_block_keeps_a_copy_of_its_running_statistics() -> None:
    channels, count_bytes = 8, 8
    _, *layers, _ = blocks_of("convolution-net")[1]
    assert [block.state_bytes for block in layers] == [2 * channels * FLOAT_BYTES + count_bytes] * 3
    assert not any(block.state_bytes for block in blocks_of("eval-convolution")[1])


def test_flops_of_a_layer_and_of_a_model() -> None:
    workload, blocks = blocks_of("residual-mlp")
    product = 2 * BATCH * WIDTH * WIDTH * 2 * WIDTH
    assert blocks[1].discard.flops == 2 * product
    assert blocks[1].option("all").backward.flops == 2 * 2 * product
    first = 2 * BATCH * WIDTH * WIDTH * WIDTH
    assert workload.forward_flops == first + 4 * 2 * product
    assert workload.model_flops == 3 * workload.forward_flops - first, "no gradient of the batch"


def test_a_shared_gradient_is_made_once_and_added_to_later() -> None:
    workload, blocks = blocks_of("shared-layer")
    users = [block for block in blocks if block.parameter_bytes == 0]
    made = [net(block.option("all").backward)["shared_gradient"] for block in users]
    assert made == [0, 0, workload.shared_gradient_bytes], "backward begins with the last"
    assert [net(block.option("all").backward_accumulate)["shared_gradient"] for block in users] == made
    assert sum(kernel.written_bytes for kernel in workload.shared_accumulate.kernels) == workload.shared_gradient_bytes


def test_parameters_without_a_gradient_take_no_gradient_bytes() -> None:
    unused = traced("unused-parameter").workload
    plain = traced("residual-mlp").workload
    assert unused.parameter_bytes == plain.parameter_bytes + WIDTH * WIDTH * FLOAT_BYTES
    assert (unused.gradient_bytes, unused.optimizer_tensors) == (plain.gradient_bytes, plain.optimizer_tensors)
    frozen = traced("frozen-first").workload
    assert frozen.parameter_bytes == plain.parameter_bytes
    assert frozen.gradient_bytes == FLOAT_BYTES * frozen.parameter_elements < plain.gradient_bytes


def test_sizes_of_a_workload() -> None:
    workload = traced("transformer").workload
    tokens = BATCH * TOKENS
    assert (workload.micro_batch, workload.tokens, workload.batch_bytes) == (BATCH, tokens, 2 * tokens * 8)
    assert traced("transformer", 3).workload.micro_batch == BATCH // 3
    assert traced("residual-mlp").workload.tokens == BATCH
    assert [traced(name).workload.mixes_samples for name in ("convolution-net", "eval-convolution", "spectral")] == [
        True,
        False,
        False,
    ]


class Cast(nn.Module):
    """Works in a half-precision copy of its weight."""

    def __init__(self) -> None:
        super().__init__()
        self.layer = nn.Linear(WIDTH, WIDTH)

    def forward(self, x: Tensor) -> Tensor:
        return F.linear(x.bfloat16(), self.layer.weight.bfloat16()).float()


def test_dtypes_are_the_operators() -> None:
    workload = trace(Cast(), {"x": torch.randn(4, WIDTH)}).workload
    products = {kernel.dtype for block in workload.blocks for kernel in block.discard.kernels if kernel.kernel_class == "gemm"}
    assert products == {"bfloat16"}
    spectral = {
        kernel.dtype for block in blocks_of("spectral")[1] for kernel in block.discard.kernels if "gemm" in kernel.kernel_class
    }
    assert "complex64" in spectral
