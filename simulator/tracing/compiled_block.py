"""Compiled blocks: what ``torch.compile`` keeps of a block and which kernels it makes, and the compiled block itself."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch._functorch.aot_autograd import aot_module_simplified
from torch._functorch.partitioners import min_cut_rematerialization_partition
from torch._inductor import config
from torch._inductor.decomposition import select_decomp_table
from torch._subclasses.fake_tensor import FakeTensor
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._python_dispatch import _disable_current_modes

from hardware_models.errors import InputError
from simulator.parallel.compiled_kernels import LIBRARY_OPS, compiled_pass
from simulator.tracing.cut import Chain
from simulator.workload import Block, BlockOption, MemoryEvent, Pass

_GENERATED = frozenset({"pointwise", "copy", "normalization", "softmax"})
"""Classes of kernels that inductor writes itself and that make as much as they read."""
_OWN = frozenset({"transient", "internal"})
"""Memory that nothing outside the block reads."""
_DRAWN_BY_TORCH = frozenset({"native_dropout"})
"""Operators that stay calls of their own because of `SETTINGS`."""
SETTINGS = {"fallback_random": True}
"""Of inductor: random numbers are drawn as eager operators draw them, so that gradients can be held against the eager module's."""


@dataclass(slots=True)
class PartitionedGraph:
    """A block as the compiler gets it: a forward and a backward graph of basic operators, which run one by one.

    **Model**: of what the backward pass needs, the forward pass keeps the least bytes from which the rest follows without a product or another expensive operator; the rest is made again.

    **Source**: torch 2.13, torch/_functorch/partitioners.py (``min_cut_rematerialization_partition``, which inductor takes, torch/_inductor/compile_fx.py); operators are taken apart by inductor's own table.

    **Not modelled**: inductor's rewriting of patterns before the cut, and its order of products for the least peak (it makes a weight's gradient before the input's where that frees more).
    """

    graph: GraphModule
    _made: dict[bool, Callable[..., tuple[Any, ...]]] = field(default_factory=dict)

    def __call__(self, *arguments: Any) -> tuple[Any, ...]:
        """The block's results; it is cut on the first call with a graph, and on the first without."""
        trains = torch.is_grad_enabled()
        if trains not in self._made:
            with _disable_current_modes(), config.patch(SETTINGS):
                self._made[trains] = aot_module_simplified(
                    self.graph, [_twin(one) for one in arguments], fw_compiler=_one_by_one, bw_compiler=_one_by_one, inference_compiler=_one_by_one,
                    partition_fn=partial(min_cut_rematerialization_partition, compiler="inductor"), decompositions=select_decomp_table(),
                )  # fmt: skip
        return self._made[trains](*arguments)


def _twin(argument: Any) -> Any:
    """A leaf like a tensor, for the compiler, which keeps its examples; of a fake one in memory of its own."""
    if not isinstance(argument, torch.Tensor):
        return argument
    if not isinstance(argument, FakeTensor):
        return argument.detach().requires_grad_(argument.requires_grad)
    with argument.fake_mode:
        twin = torch.empty_strided(argument.shape, argument.stride(), dtype=argument.dtype, device=argument.device)
    return twin.requires_grad_(argument.requires_grad)


def _one_by_one(gm: GraphModule, example_inputs: Sequence[Any]) -> Callable[[list[Any]], Any]:  # noqa: ARG001 - torch's names
    """A "compiler" that runs a graph's operators, each where it is needed, and lets go of each value, the arguments too, after its last use."""
    _sink(gm.graph)

    def run(arguments: list[Any]) -> Any:
        return Interpreter(gm).boxed_run(arguments)

    run._boxed_call = True  # type: ignore[attr-defined]  # noqa: SLF001 - how aot_autograd knows the convention
    return run


def _sink(graph: Graph) -> None:
    """Moves what one element of a result needs no other element of down to its first use, past reductions and its like.

    **Model**: generated code makes such values inside the kernel that reads them, wherever the graph lists them; one listed before a reduction and read only behind it is never written to memory.

    **Source**: torch 2.13, torch/_inductor/ir.py (``StorageBox.realize``: pointwise values are inlined where they are read).
    """
    for node in reversed(list(graph.nodes)):
        if not _tagged(node, torch.Tag.pointwise) or not node.users:
            continue
        after = node.next
        while after not in node.users and (_tagged(after, torch.Tag.pointwise) or _tagged(after, torch.Tag.reduction)):
            after = after.next
        after.prepend(node)


def _tagged(node: Node, tag: torch.Tag) -> bool:
    """Whether an operator says so of itself; views count as pointwise."""
    operator = node.target
    if not isinstance(operator, torch._ops.OpOverload):  # noqa: SLF001 - has no public name
        return False
    return tag in operator.tags or (tag is torch.Tag.pointwise and operator.is_view)


def partitioned_chain(chain: Chain) -> Chain:
    """The chain with every block cut as the compiler cuts it, to be recorded.

    Raises:
        InputError: the model has autograd functions of its own.
    """
    return replace(
        chain, blocks=tuple(replace(block, graph=PartitionedGraph(_graph_of(chain, block.graph))) for block in chain.blocks)
    )


def compiled_block(block: Block) -> Block:
    """A block that was recorded in its partition, with the kernels that the compiler fuses as one (`compiled_pass`), in place where they can be."""
    return replace(block, discard=_compiled(block.discard), options=tuple(_compiled_option(option) for option in block.options))


def _compiled_option(option: BlockOption) -> BlockOption:
    return replace(
        option, forward=_compiled(option.forward), backward=_compiled(option.backward), backward_accumulate=_compiled(option.backward_accumulate)
    )  # fmt: skip


def _compiled(run: Pass) -> Pass:
    return in_place(compiled_pass(run, library=LIBRARY_OPS | _DRAWN_BY_TORCH))


def in_place(run: Pass) -> Pass:
    """The pass whose generated kernels write where they read.

    **Model**: what a generated kernel makes takes the memory of what it reads last, where that is of the same size and the block's own; kernels of libraries do not.

    **Source**: torch 2.13, torch/_inductor/scheduler.py (``decide_inplace_update``); saved tensors are the backward graph's to write on (``donated_buffer``, torch/_functorch/config.py).
    """
    memory = list(run.memory)
    for number, kernel in enumerate(run.kernels):
        if kernel.kernel_class not in _GENERATED:
            continue
        ended = [one for one in memory if one.kernel == number + 1 and one.delta_bytes < 0 and one.buffer in _OWN]
        for made in [one for one in memory if one.kernel == number and one.delta_bytes > 0]:
            taken = next((one for one in ended if one.delta_bytes == -made.delta_bytes), None)
            if taken is not None:
                ended.remove(taken)
                del memory[_place(memory, taken)]
                memory.insert(_place(memory, made), replace(taken, kernel=number))
    return Pass(kernels=run.kernels, memory=tuple(memory))


def _place(memory: Sequence[MemoryEvent], event: MemoryEvent) -> int:
    return next(place for place, one in enumerate(memory) if one is event)


def compiled_chain(chain: Chain, alike: Sequence[object], *, backend: str = "inductor") -> Chain:
    """The chain with every block compiled; what is alike is compiled once, on its first call.

    Args:
        chain: to run.
        alike: per block an object that blocks of one code and one kind of arguments share (those of `Workload.blocks` do).
        backend: of ``torch.compile``.

    Raises:
        InputError: the model has autograd functions of its own.
    """
    made: dict[int, Any] = {}
    options: Any = SETTINGS if backend == "inductor" else None
    blocks = []
    for block, key in zip(chain.blocks, alike, strict=True):
        graph = _graph_of(chain, block.graph)
        if id(key) not in made:
            made[id(key)] = torch.compile(graph, fullgraph=True, dynamic=False, backend=backend, options=options)
        blocks.append(replace(block, graph=made[id(key)]))
    return replace(chain, blocks=tuple(blocks))


def _graph_of(chain: Chain, graph: Callable[..., Any]) -> GraphModule:
    if not isinstance(graph, GraphModule):
        rule = f"blocks are compiled from graphs of operators, and this model has none ({'; '.join(chain.notes)})"
        raise InputError(source="plan", key="runtime.compile", value=True, rule=rule, remedy="set runtime.compile = false")
    return graph
