"""Compiled blocks: the partition computes what the block computes and keeps less; what it keeps and fuses is predicted; gradients are the eager module's."""

from __future__ import annotations

from dataclasses import replace
from functools import cache, partial

import pytest
import torch
from torch import nn
from torch._inductor.cpp_builder import get_cpp_compiler
from torch._inductor.exc import InvalidCxxCompiler
from torch.fx.experimental.proxy_tensor import make_fx

from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from simulator.lower import PassPrices, lower
from simulator.parallel.compiled_kernels import FUSED_OP
from simulator.plan import Memory, MemoryBlock, Plan, Runtime, check_single_device
from simulator.sequence import checkpoint_blocks, keep_all
from simulator.simulate import static_peak_bytes
from simulator.tracing import compiled_block
from simulator.tracing.trace import Traced, trace
from simulator.tracing.traced_model import TracedModel
from simulator.workload import MemoryEvent, Pass
from tests.small_models import build
from tests.small_steps import unit_times
from validation.run_step import ScheduledStep
from validation.session import ReplaySession

ROUNDING = 1e-5
PEAK_TOLERANCE = 0.05
"""Inductor orders kernels for the least peak, which of a module this small is a tenth."""
BATCH, WIDTH = 64, 32


class Layer(nn.Module):
    """A norm, a product and pointwise operators."""

    def __init__(self) -> None:
        super().__init__()
        self.norm, self.up, self.down = nn.LayerNorm(WIDTH), nn.Linear(WIDTH, WIDTH), nn.Linear(WIDTH, WIDTH)

    def forward(self, x: torch.Tensor) -> torch.Tensor:  # noqa: D102 - forward is forward
        return x + self.down(nn.functional.gelu(self.up(self.norm(x))).sin())


def small() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    torch.manual_seed(0)
    return nn.Sequential(Layer(), Layer()), {"input": torch.randn(BATCH, WIDTH)}


@cache
def traces() -> tuple[Traced, Traced]:
    """Eager and compiled."""
    module, inputs = small()
    return trace(module, inputs), trace(module, inputs, compiled=True)


@pytest.mark.slow
def test_the_partition_computes_what_the_block_computes() -> None:
    _, compiled = traces()
    chain = compiled_block.partitioned_chain(compiled.chain)
    module, inputs = small()
    reference, _ = small()
    count = len(chain.blocks)
    reference(**inputs).square().mean().backward()
    step = ScheduledStep(
        module=module, traced=replace(compiled, chain=chain), operations=checkpoint_blocks(count, [1], ["all"] * count)
    )
    step([inputs])
    for mine, theirs in zip(module.parameters(), reference.parameters(), strict=True):
        torch.testing.assert_close(mine.grad, theirs.grad, rtol=ROUNDING, atol=ROUNDING)


def test_a_compiled_block_keeps_less_in_fewer_kernels() -> None:
    blocks = [one.workload.blocks for one in traces()]
    assert [option.name for block in blocks[1] for option in block.options] == ["all"] * len(blocks[0])
    eager_bytes, compiled_bytes = (
        sum(tensor.size_bytes for block in own for tensor in block.options[0].saved) for own in blocks
    )
    assert compiled_bytes < eager_bytes
    for pass_of in (lambda option: option.forward, lambda option: option.backward):
        eager, compiled = ([kernel for block in own for kernel in pass_of(block.options[0]).kernels] for own in blocks)
        assert len(compiled) < len(eager)
        assert FUSED_OP in {kernel.op for kernel in compiled}
        assert sum(kernel.flops for kernel in compiled) == sum(kernel.flops for kernel in eager)


def test_values_are_made_where_they_are_read() -> None:
    def loss(x: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        early, before = x.exp(), x.sin()
        scale = before.sum(1, keepdim=True)
        kept = x.cos()
        product = x @ weight
        return product + early * scale + kept

    graph = make_fx(loss)(torch.ones(4, 4), torch.ones(4, 4)).graph
    compiled_block._sink(graph)
    names = [node.name for node in graph.nodes if node.op == "call_function"]
    # behind the reduction, yet before the product, which is no part of any generated kernel
    assert names == ["sin", "sum_1", "cos", "exp", "mm", "mul", "add", "add_1"]


def test_a_generated_kernel_writes_on_what_it_reads_last() -> None:
    def kernel(name: str) -> Kernel:
        return Kernel(kernel_class=name, op=name, shape=(4,), dtype="float32", flops=0, read_bytes=16, written_bytes=16)  # type: ignore[arg-type]

    events = (
        MemoryEvent(kernel=0, buffer="transient", delta_bytes=16), MemoryEvent(kernel=1, buffer="transient", delta_bytes=16),
        MemoryEvent(kernel=1, buffer="transient", delta_bytes=-16), MemoryEvent(kernel=2, buffer="gradient", delta_bytes=16),
        MemoryEvent(kernel=2, buffer="transient", delta_bytes=-16),
    )  # fmt: skip
    one = compiled_block.in_place(Pass(kernels=(kernel("gemm"), kernel("pointwise")), memory=events))
    assert [(event.kernel, event.delta_bytes) for event in one.memory] == [(0, 16), (1, -16), (1, 16), (1, -16), (2, 16)]
    products = compiled_block.in_place(Pass(kernels=(kernel("gemm"), kernel("gemm")), memory=events))
    assert products.memory == events


@pytest.mark.parametrize(
    ("memory", "message"),
    [
        (Memory(recompute="selective"), "memory.recompute = 'selective': a compiled block keeps what its partition chooses"),
        (Memory(block=(MemoryBlock(recompute="selective"),)), r"memory.block\[0\].recompute = 'selective'"),
        (Memory(activation_offload=0.5), "memory.activation_offload = 0.5: what a compiled block keeps stays on the device"),
    ],
)
def test_what_compiled_blocks_do_not_do_is_refused(memory: Memory, message: str) -> None:
    check_single_device(Plan(runtime=Runtime(compile=True)), compiled=True)
    with pytest.raises(InputError, match=message):
        check_single_device(Plan(memory=memory, runtime=Runtime(compile=True)), compiled=True)


def test_a_model_without_a_graph_is_refused() -> None:
    module, inputs = build("own-function")
    with pytest.raises(
        InputError, match=r"runtime.compile = True: blocks are compiled from graphs of operators, and this model has none"
    ):
        trace(module, inputs, compiled=True)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")  # torch's own, where its compiler is loaded
def test_gradients_of_compiled_blocks_are_the_eager_modules() -> None:
    try:
        get_cpp_compiler()
    except InvalidCxxCompiler:
        pytest.skip("no C++ compiler, which inductor needs on a CPU")
    session = ReplaySession(TracedModel(name="small", factory=partial(small)), compiled=True)
    workload = session.traced(BATCH).workload
    count = len(workload.blocks)
    for operations in (keep_all(count), checkpoint_blocks(count, range(count), ["all"] * count)):
        run = session.scheduled(operations, BATCH)
        (match,) = session.match([(run, BATCH)])[0]
        assert match.max_rel < ROUNDING
        predicted = static_peak_bytes(lower(workload, operations, PassPrices(unit_times)))
        assert predicted == pytest.approx(session.peak(run).allocated_bytes, rel=PEAK_TOLERANCE)
