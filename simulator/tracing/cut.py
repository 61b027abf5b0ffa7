"""Cut: a captured graph -> a chain of block graphs.

A cut may lie between two operators where exactly one tensor that needs a gradient crosses. Tensors that need none (positions,
masks, rotary tables) are carried: alive from the block that makes them to the end of the micro-batch. Of the possible cuts those
are kept that leave a product (gemm, attention, convolution, fft) in every block, embeddings at the front aside: recomputing
anything smaller alone gains nothing that the block's own options do not gain.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

import torch
from torch.fx import Graph, GraphModule, Interpreter, Node
from torch.utils._pytree import tree_leaves

from simulator.tracing.block_graph import BlockGraph
from simulator.tracing.capture import Capture
from simulator.tracing.compute_mode import compute_mode
from simulator.tracing.eight_bit_linear import EIGHT_BIT_OPERATORS
from simulator.tracing.side_values import fake_activations

HEAVY_OPERATORS = frozenset(
    "linear addmm mm bmm baddbmm matmul einsum tensordot _grouped_mm scaled_dot_product_attention "
    "conv1d conv2d conv3d conv_transpose1d conv_transpose2d conv_transpose3d convolution _convolution "
    "fft_rfft fft_irfft fft_rfft2 fft_irfft2 fft_rfftn fft_irfftn fft_fft fft_ifft fft_fft2 fft_ifft2 fft_fftn fft_ifftn "
    "lstm gru multi_head_attention_forward".split()
).union(EIGHT_BIT_OPERATORS)
"""Operators above autograd that make a block worth recomputing on its own."""
EMBEDDING_OPERATORS = frozenset({"embedding", "embedding_bag"})
BATCH_STATISTICS = frozenset({"batch_norm", "native_batch_norm", "_native_batch_norm_legit", "cudnn_batch_norm"})
SET_GRADIENTS = "_set_grad_enabled"
MAX_BLOCKS = 256
"""Longer chains are thinned: the exact solver's work grows with the cube of the number of blocks."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Chain:
    """Blocks in order with what flows between them; ``boundaries[i]`` is a fake twin of what enters block ``i`` (none for 0)."""

    capture: Capture
    blocks: tuple[BlockGraph, ...]
    boundaries: tuple[torch.Tensor | None, ...]
    carried: dict[str, Any]
    notes: tuple[str, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class _Value:
    """What one node of the graph makes."""

    tensors: tuple[torch.Tensor, ...]
    single: bool

    @property
    def needs_gradient(self) -> bool:
        return any(tensor.requires_grad for tensor in self.tensors)

    @property
    def storages(self) -> frozenset[int]:
        return frozenset(tensor.untyped_storage()._cdata for tensor in self.tensors)  # noqa: SLF001 - torch's only storage identity


def operator_name(node: Node) -> str:
    """ATen name of a node's operator without namespace and overload; the plain name of a Python function."""
    target = node.target
    packet = getattr(target, "overloadpacket", None)
    return str(getattr(packet or target, "__name__", target)).split(".")[0]


class _Values(Interpreter):
    """Runs the graph on fakes and keeps every node's value, so that storages stay distinct."""

    def __init__(self, graph: GraphModule) -> None:
        super().__init__(graph, garbage_collect_values=False)
        self.values: dict[Node, Any] = {}

    def run_node(self, n: Node) -> Any:
        result = super().run_node(n)
        self.values[n] = result
        return result


def cut(capture: Capture) -> Chain:
    """The chain of blocks of a captured module.

    Returns:
        At least one block. A graph without a cut is one block, and a note says so.
    """
    if capture.graph is None:
        return _opaque_chain(capture)
    nodes = [node for node in capture.graph.graph.nodes if node.op not in {"placeholder", "get_attr", "output"}]
    interpreter = _Values(capture.graph)
    with fake_activations(capture.fake_mode), torch.enable_grad(), compute_mode(capture.precision, capture.device):
        interpreter.run([*capture.parameters.values(), *capture.buffers.values(), *capture.inputs.values()])
    values = {node: _value(interpreter.values[node]) for node in nodes}
    positions = _keep_heavy(nodes, _legal_cuts(nodes, values))
    notes = capture.notes
    if not positions:
        notes = (*notes, "one block: no single tensor crosses between its operators")
    if len(positions) >= MAX_BLOCKS:
        stride = -(-len(positions) // (MAX_BLOCKS - 1))
        notes = (*notes, f"{len(positions) + 1} blocks joined by {stride} to stay under {MAX_BLOCKS}")
        positions = positions[stride - 1 :: stride]
    return _split(capture, capture.graph, nodes, values, interpreter.values, positions, notes)


def _value(value: Any) -> _Value:
    tensors = tuple(leaf for leaf in tree_leaves(value) if isinstance(leaf, torch.Tensor))
    return _Value(tensors=tensors, single=isinstance(value, torch.Tensor))


def _last_uses(nodes: Sequence[Node]) -> dict[Node, int]:
    """Index of the last operator that reads each node's value; ``len(nodes)`` for what the graph returns."""
    index = {node: position for position, node in enumerate(nodes)}
    return {
        node: max((index.get(user, len(nodes)) for user in node.users), default=position) for node, position in index.items()
    }


def _legal_cuts(nodes: Sequence[Node], values: dict[Node, _Value]) -> list[int]:
    """Positions p such that nodes[:p] and nodes[p:] may be different blocks."""
    last = _last_uses(nodes)
    last_write = _last_writes(nodes, values)
    nesting, alive = 0, {}
    legal: list[int] = []
    start = 0
    for position, node in enumerate(nodes[:-1]):
        nesting += _nesting_change(node)
        alive[node] = last[node]
        alive = {other: until for other, until in alive.items() if until > position}
        crossing = [other for other in alive if values[other].needs_gradient]
        if nesting or len(crossing) != 1 or not values[crossing[0]].single:
            continue
        storages = frozenset().union(*(values[other].storages for other in alive))
        written_later = any(last_write.get(storage, -1) > position for storage in storages)
        made_here = any(values[other].storages == values[crossing[0]].storages and _allocates(other) for other in nodes[start:position + 1])  # fmt: skip
        if not written_later and made_here:
            legal.append(position + 1)
            start = position + 1
    return legal


def _allocates(node: Node) -> bool:
    """Whether an operator's result is new memory rather than a view or a change in place."""
    schema = getattr(node.target, "_schema", None)
    return schema is not None and all(result.alias_info is None for result in schema.returns)


def _last_writes(nodes: Sequence[Node], values: dict[Node, _Value]) -> dict[int, int]:
    """Storage -> position of the last operator that changes it in place."""
    writes: dict[int, int] = {}
    for position, node in enumerate(nodes):
        for argument in mutated_arguments(node):
            for storage in values[argument].storages if argument in values else ():
                writes[storage] = position
    return writes


def mutated_arguments(node: Node) -> Iterable[Node]:
    """Arguments that an operator changes in place."""
    schema = getattr(node.target, "_schema", None)
    if schema is None:
        return
    for position, argument in enumerate(schema.arguments):
        if argument.alias_info is None or not argument.alias_info.is_write:
            continue
        value = node.args[position] if position < len(node.args) else node.kwargs.get(argument.name)
        yield from (leaf for leaf in tree_leaves(value) if isinstance(leaf, Node))


def _nesting_change(node: Node) -> int:
    """+1 where a node opens a region (autocast, gradients switched off), -1 where it closes one."""
    name = operator_name(node)
    if name == "_enter_autocast":
        return 1
    if name == "_exit_autocast":
        return -1
    if name == SET_GRADIENTS:
        return -1 if node.args[0] else 1
    return 0


def _keep_heavy(nodes: Sequence[Node], legal: Sequence[int]) -> list[int]:
    """The cuts after which both sides hold a heavy operator (or embeddings): light stretches join the block before them."""
    kept: list[int] = []
    bounds = [0, *legal, len(nodes)]
    anything_before = False
    for begin, end in pairwise(bounds):
        operators = {operator_name(node) for node in nodes[begin:end]}
        heavy = bool(operators & HEAVY_OPERATORS)
        if heavy and anything_before:
            kept.append(begin)
        anything_before = anything_before or heavy or bool(operators & EMBEDDING_OPERATORS)
    return kept


def _split(
    capture: Capture,
    source: GraphModule,
    nodes: Sequence[Node],
    values: dict[Node, _Value],
    raw: dict[Node, Any],
    positions: Sequence[int],
    notes: tuple[str, ...],
) -> Chain:
    bounds = [0, *positions, len(nodes)]
    sections = [nodes[begin:end] for begin, end in pairwise(bounds)]
    owner = {node: index for index, section in enumerate(sections) for node in section}
    (result,) = next(node for node in source.graph.nodes if node.op == "output").all_input_nodes
    chain_out: list[Node] = []
    carried_out: list[list[Node]] = []
    for index, section in enumerate(sections):
        leaving = [node for node in section if any(owner.get(user, len(sections)) > index for user in node.users)]
        grad = [node for node in leaving if values[node].needs_gradient]
        chain_out.append(result if index == len(sections) - 1 else grad[0])
        carried_out.append([node for node in leaving if not values[node].needs_gradient and node is not chain_out[-1]])
    names = dict(zip((n for n in source.graph.nodes if n.op == "placeholder"), capture.names, strict=True))
    blocks = tuple(
        _block(source, index, section, names, chain_out[index - 1] if index else None, chain_out[index], carried_out[index])
        for index, section in enumerate(sections)
    )
    carried = {node.name: raw[node] for section in carried_out for node in section}
    boundaries = (None, *(values[node].tensors[0] for node in chain_out[:-1]))
    return Chain(capture=capture, blocks=blocks, boundaries=boundaries, carried=carried, notes=notes)


def _block(
    source: GraphModule,
    index: int,
    section: Sequence[Node],
    names: dict[Node, str],
    entering: Node | None,
    leaving: Node,
    carried_out: Sequence[Node],
) -> BlockGraph:
    """One section copied into a graph of its own."""
    graph, copies, arguments = Graph(), {}, []
    inside = set(section)
    outside = dict.fromkeys(node for member in section for node in member.all_input_nodes if node not in inside)
    if leaving not in inside:
        outside[leaving] = None
    ordered = ([entering] if entering is not None else []) + [node for node in outside if node is not entering]
    for node in ordered:
        if node.op == "get_attr":
            copies[node] = graph.node_copy(node)
            continue
        argument = "x" if node is entering else names.get(node, f"c:{node.name}")
        arguments.append(argument)
        copies[node] = graph.placeholder(f"a{len(arguments)}")
    outer = None
    if any(operator_name(node) == SET_GRADIENTS for node in section):
        outer = graph.call_function(torch.is_grad_enabled)
    for node in section:
        copies[node] = graph.node_copy(node, lambda n: copies[n])
        if operator_name(node) == SET_GRADIENTS and node.args[0]:
            copies[node].args = (outer,)  # a region that ends gives back the caller's mode, not what it was while tracing
    graph.output(tuple(copies[node] for node in (leaving, *carried_out)))
    operators = tuple(operator_name(node) for node in section)
    return BlockGraph(
        name=f"block{index}", graph=GraphModule(source, graph), arguments=tuple(arguments),
        carried_out=tuple(node.name for node in carried_out), mutated_buffers=_mutated_buffers(section, names),
        uses_randomness=any(uses_randomness(node) for node in section),
        mixes_samples=any(_uses_batch_statistics(node) for node in section), operators=operators,
    )  # fmt: skip


def _mutated_buffers(section: Sequence[Node], names: dict[Node, str]) -> tuple[str, ...]:
    """Names of the buffers that a section changes, each once."""
    changed = (names[argument] for node in section for argument in _buffers_changed(node, names))
    return tuple(dict.fromkeys(name[2:] for name in changed if name.startswith("b:")))


def uses_randomness(node: Node) -> bool:
    """Whether an operator draws random numbers; attention and dropout do so only with a probability."""
    name = operator_name(node)
    if name == "scaled_dot_product_attention":
        return bool(_argument(node, "dropout_p", 0.0) != 0.0)
    if name == "dropout":
        return bool(_argument(node, "train", False) and _argument(node, "p", 0.0) != 0.0)
    return (
        "dropout" in name
        or name in {"rrelu", "lstm", "gru"}
        or torch.Tag.nondeterministic_seeded in getattr(node.target, "tags", ())
    )


def _argument(node: Node, name: str, default: Any) -> Any:
    """An operator's argument by its name in the schema."""
    schema = node.target._schema  # type: ignore[union-attr]  # noqa: SLF001 - torch's only access to an operator's argument names
    position = next((i for i, argument in enumerate(schema.arguments) if argument.name == name), len(node.args))
    return node.args[position] if position < len(node.args) else node.kwargs.get(name, default)


def _uses_batch_statistics(node: Node) -> bool:
    """Whether a normalisation takes its statistics from the batch (training mode: the argument after the running statistics)."""
    if operator_name(node) not in BATCH_STATISTICS:
        return False
    return bool(_argument(node, "training", False) or _argument(node, "train", False))


def _buffers_changed(node: Node, names: dict[Node, str]) -> Iterable[Node]:
    """Placeholders that an operator changes; normalisation changes its running statistics without saying so in its schema."""
    yield from (argument for argument in mutated_arguments(node) if argument in names)
    if _uses_batch_statistics(node):
        yield from (argument for argument in node.all_input_nodes if argument in names)


def _opaque_chain(capture: Capture) -> Chain:
    """The whole module as one block that calls it."""

    def whole(*values: torch.Tensor) -> tuple[torch.Tensor]:
        return (capture.forward(list(values)),)

    block = BlockGraph(
        name="block0", graph=whole, arguments=capture.names, carried_out=(), mutated_buffers=tuple(capture.buffers),
        uses_randomness=True, mixes_samples=capture.has_batch_statistics, operators=("module",),
    )  # fmt: skip
    return Chain(capture=capture, blocks=(block,), boundaries=(None,), carried={}, notes=capture.notes)
