"""Trace: module and example inputs -> Workload, and the chain of runnable blocks that it describes."""

from __future__ import annotations

import importlib
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from functools import cache
from types import ModuleType
from typing import Any

import torch
from torch.utils._pytree import tree_leaves

from hardware_models.kernel import Kernel
from simulator.tracing.block_graph import BlockGraph
from simulator.tracing.capture import LossFunction, capture, loss_of
from simulator.tracing.compute_mode import LOSS_SCALED
from simulator.tracing.cut import Chain, cut
from simulator.tracing.kernels_of import dtype_name
from simulator.tracing.record import Setting, parameter_tensors, record_block
from simulator.workload import Block, Pass, Workload


@dataclass(frozen=True, slots=True, kw_only=True)
class Traced:
    """A traced model: what to price and what to run."""

    workload: Workload
    chain: Chain
    shared: frozenset[str]
    """Parameters that several blocks use."""


def trace(
    module: torch.nn.Module, example_inputs: Mapping[str, Any], *, loss: LossFunction = loss_of, name: str = "model",
    precision: str = "fp32", compiled: bool = False,
) -> Traced:  # fmt: skip
    """The workload of one micro-batch of the size of ``example_inputs``.

    Args:
        module: real, or built by `simulator.tracing.capture.build_fake`; in the mode (train or eval) in which it will run.
        example_inputs: keyword arguments of its forward pass; tensors have samples along their first axis.
        loss: the scalar to differentiate, from the module's output.
        name: the model's name in reports.
        precision: of `simulator.tracing.compute_mode.PRECISIONS`.
        compiled: describe the blocks as ``torch.compile`` runs them; the chain is the eager one all the same (`compiled_block.compiled_chain`).

    Raises:
        InputError: the module cannot be traced (operator and line are named), or not be compiled.
    """
    chain = cut(capture(module, example_inputs, loss=loss, name=name, precision=precision))
    return trace_chain(chain, name, {}, compiled=compiled)


@cache
def compiling() -> ModuleType:
    """`simulator.tracing.compiled_block`, which loads torch's compiler: twice the time that torch itself takes, and only where something is compiled."""
    return importlib.import_module("simulator.tracing.compiled_block")


def trace_chain(chain: Chain, name: str, recorded: dict[Any, Block], *, compiled: bool = False) -> Traced:
    """The workload of a chain that is cut already.

    Args:
        chain: of a module, or of one pipeline stage of it.
        name: the model's name in reports.
        recorded: blocks of other chains of the same module, which are not recorded again; this chain's are added.
        compiled: as in `trace`.
    """
    users = Counter(parameter for block in chain.blocks for parameter in block.names("p"))
    shared = frozenset(parameter for parameter, count in users.items() if count > 1)
    blocks = _record_chain(chain, shared, recorded, compiled=compiled)
    return Traced(workload=_workload(chain, blocks, shared, name), chain=chain, shared=shared)


def _record_chain(chain: Chain, shared: frozenset[str], recorded: dict[Any, Block], *, compiled: bool) -> tuple[Block, ...]:
    """Blocks in order; those with the same graph and shapes are recorded once and are one object."""
    blocks: list[Block] = []
    running = compiling().partitioned_chain(chain) if compiled else chain
    for index in range(len(chain.blocks)):
        fresh = _fresh(chain, index, shared)
        key = _fingerprint(chain, index, shared, fresh)
        if key not in recorded:
            setting = Setting(chain=running, index=index, shared=shared, fresh_shared=fresh)
            recorded[key] = (
                compiling().compiled_block(record_block(setting, selective=False)) if compiled else record_block(setting)
            )
        blocks.append(recorded[key])
    return tuple(blocks)


def _fresh(chain: Chain, index: int, shared: frozenset[str]) -> frozenset[str]:
    """Shared parameters of a block whose gradients it makes first: no later block uses them."""
    later = {name for block in chain.blocks[index + 1 :] for name in block.names("p")}
    return frozenset(name for name in shared if name in chain.blocks[index].names("p") and name not in later)


def recorded_blocks(traced: Traced) -> dict[Any, Block]:
    """The blocks of a traced chain as `trace_chain` finds them again in other chains of the same module."""
    chain, shared = traced.chain, traced.shared
    return {
        _fingerprint(chain, index, shared, _fresh(chain, index, shared)): block
        for index, block in enumerate(traced.workload.blocks)
    }


def _fingerprint(chain: Chain, index: int, shared: frozenset[str], fresh: frozenset[str]) -> Any:
    """What a block's passes depend on: its code with local names, and the kind of each argument."""
    block = chain.blocks[index]
    code = getattr(block.graph, "code", None)
    if code is None:
        return index
    values = {"p": chain.capture.parameters, "b": chain.capture.buffers, "i": chain.capture.inputs, "c": chain.carried}
    arguments: list[Any] = []
    for name in block.arguments:
        value = chain.boundaries[index] if name == "x" else values[name[0]][name[2:]]
        kinds = tuple(
            (tuple(leaf.shape), leaf.stride(), leaf.dtype, leaf.requires_grad) if isinstance(leaf, torch.Tensor) else leaf
            for leaf in tree_leaves(value)
        )
        arguments.append((name[0], name[2:] in shared, name[2:] in fresh, kinds))
    return _local_names(block), tuple(arguments)


def _local_names(block: BlockGraph) -> str:
    """The block's operators and constants with its own names numbered in order."""
    numbers: dict[Any, str] = {}
    lines: list[str] = []
    for node in block.graph.graph.nodes:  # type: ignore[attr-defined]
        numbers[node] = f"v{len(numbers)}"
        arguments = torch.fx.node.map_arg((node.args, node.kwargs), lambda n: numbers[n])
        target = getattr(block.graph, node.target) if node.op == "get_attr" else node.target
        lines.append(f"{node.op} {'' if node.op == 'placeholder' else target} {arguments}")
    return "\n".join(lines)


def _workload(chain: Chain, blocks: tuple[Block, ...], shared: frozenset[str], name: str) -> Workload:
    captured = chain.capture
    trained = [value for key, value in captured.parameters.items() if key in captured.trained]
    batch = [value for value in captured.inputs.values() if value.ndim]
    samples = batch[0].shape[0] if batch else 1
    integers = [value for value in batch if not value.dtype.is_floating_point and value.ndim > 1]
    return Workload(
        model=name,
        micro_batch=samples,
        tokens=integers[0].numel() if integers else samples,
        blocks=blocks,
        parameter_elements=sum(value.numel() for value in captured.parameters.values() if value.requires_grad),
        parameter_bytes=_num_bytes(captured.parameters.values()),
        buffer_bytes=_num_bytes(captured.buffers.values()),
        gradient_bytes=_num_bytes(trained),
        shared_gradient_bytes=_num_bytes(captured.parameters[key] for key in shared & captured.trained),
        shared_accumulate=_shared_accumulate([captured.parameters[key] for key in sorted(shared & captured.trained)]),
        optimizer_tensors=tuple(value.numel() for value in trained),
        batch_bytes=_num_bytes(captured.inputs.values()),
        mixes_samples=any(block.mixes_samples for block in chain.blocks),
        shared_parameters=parameter_tensors(captured, sorted(shared)),
        notes=chain.notes,
        loss_scaled=captured.precision in LOSS_SCALED,
    )


def _num_bytes(tensors: Any) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def _shared_accumulate(parameters: list[torch.Tensor]) -> Pass:
    kernels = tuple(
        Kernel(kernel_class="pointwise", op="add_", shape=(value.numel(),), dtype=dtype_name(value.dtype), flops=0,
               read_bytes=2 * _num_bytes((value,)), written_bytes=_num_bytes((value,)))
        for value in parameters
    )  # fmt: skip
    return Pass(kernels=kernels, memory=())
