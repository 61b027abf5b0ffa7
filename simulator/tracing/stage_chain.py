"""Pipeline stages of a traced model: each a chain of its own, with its own parameters, buffers and inputs."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from itertools import accumulate, pairwise
from typing import Any, TypeVar

from torch.fx import Graph, GraphModule, Node

from hardware_models.errors import InputError
from simulator.tracing.block_graph import BlockGraph
from simulator.tracing.cut import Chain, mutated_arguments, uses_randomness
from simulator.tracing.record import Setting, record_split
from simulator.tracing.trace import Traced, recorded_blocks, trace_chain
from simulator.workload import SplitBackward

_Derived = TypeVar("_Derived")


@dataclass(slots=True, kw_only=True)
class StageLibrary:
    """Stages of one traced model, each stretch of blocks traced once: plans that a search compares share them."""

    whole: Traced
    _known: dict[Hashable, Any] = field(default_factory=dict)

    def once(self, key: Hashable, derive: Callable[[], _Derived]) -> _Derived:
        """What ``derive`` makes of the model, made on the first call under a key."""
        if key not in self._known:
            self._known[key] = derive()
        found: _Derived = self._known[key]
        return found

    def stretch(self, first: int, end: int) -> Traced:
        """The blocks from ``first`` up to ``end`` as a stage (`stage_traces`)."""
        chain, name = self.whole.chain, self.whole.workload.model
        recorded = self.once("recorded", lambda: recorded_blocks(self.whole))
        return self.once(("stretch", first, end), lambda: trace_chain(_stage_chain(chain, first, end), name, recorded))

    def split(self, first: int, end: int) -> tuple[SplitBackward, ...]:
        """Backward passes in two of such a stage's blocks."""
        made: dict[int, SplitBackward] = self.once("halves", dict)
        return self.once(("split", first, end), lambda: split_passes(self.stretch(first, end), made))


def stage_traces(whole: Traced, partition: Sequence[int], *, library: StageLibrary | None = None) -> tuple[Traced, ...]:
    """The traced stages of a model.

    **Model**: a stage gets the boundary from the stage before. Tensors without a gradient that earlier blocks make (positions, masks, rotary tables) it makes again from
    the batch, in its first block.

    Args:
        whole: the traced model.
        partition: blocks of each stage, all at least 1.
        library: of the model, where several cuts are asked for.

    Raises:
        InputError: such a tensor depends on parameters or random numbers.
    """
    known = library or StageLibrary(whole=whole)
    return tuple(known.stretch(first, end) for first, end in pairwise((0, *accumulate(partition))))


def split_passes(traced: Traced, known: dict[int, SplitBackward] | None = None) -> tuple[SplitBackward, ...]:
    """Backward passes in two of a stage's blocks; the stage is not the model's first.

    Args:
        traced: the stage.
        known: what is known of blocks of the same module, by their ids; more is added. None: nothing is.
    """
    made: dict[int, SplitBackward] = {} if known is None else known
    found = []
    for index, block in enumerate(traced.workload.blocks):
        if id(block) not in made:
            later = {name for graph in traced.chain.blocks[index + 1 :] for name in graph.names("p")}
            names = traced.chain.blocks[index].names("p")
            fresh = frozenset(name for name in traced.shared if name in names and name not in later)
            made[id(block)] = record_split(Setting(chain=traced.chain, index=index, shared=traced.shared, fresh_shared=fresh))
        found.append(made[id(block)])
    return tuple(found)


def _stage_chain(chain: Chain, first: int, end: int) -> Chain:
    blocks = list(chain.blocks[first:end])
    made = {name for block in blocks for name in block.carried_out}
    missing = list(dict.fromkeys(name for block in blocks for name in block.names("c") if name not in made))
    if missing:
        blocks[0] = _with_prologue(chain, blocks[0], missing)
        made.update(missing)
    used = {kind: {name for block in blocks for name in block.names(kind)} for kind in "pbi"}
    capture = chain.capture
    own = replace(
        capture,
        parameters={name: value for name, value in capture.parameters.items() if name in used["p"]},
        buffers={name: value for name, value in capture.buffers.items() if name in used["b"]},
        inputs={name: value for name, value in capture.inputs.items() if name in used["i"]},
        trained=capture.trained & used["p"],
    )
    carried = {name: value for name, value in chain.carried.items() if name in made}
    return replace(chain, capture=own, blocks=tuple(blocks), boundaries=chain.boundaries[first:end], carried=carried)


@dataclass(slots=True, kw_only=True)
class _Draft:
    """A block's graph while it is put together."""

    graph: Graph
    arguments: list[str]
    copies: dict[Node, Node]


def _with_prologue(chain: Chain, block: BlockGraph, missing: Sequence[str]) -> BlockGraph:
    """The block, which first makes the carried values that it and later blocks of its stage read."""
    source = chain.capture.graph
    assert source is not None, "a module that is one block has one stage"
    assert isinstance(block.graph, GraphModule)
    names = dict(zip((n for n in source.graph.nodes if n.op == "placeholder"), chain.capture.names, strict=True))
    prologue = _prologue(source, names, missing)
    draft = _Draft(graph=Graph(), arguments=[], copies={})
    placeholders: dict[str, Node] = {}

    def argument(name: str) -> Node:
        if name not in placeholders:
            draft.arguments.append(name)
            placeholders[name] = draft.graph.placeholder(f"a{len(draft.arguments)}")
        return placeholders[name]

    entering = [name for name in block.arguments if name[2:] not in missing or not name.startswith("c:")]
    for name in (*entering, *(names[node] for node in prologue if node in names)):
        argument(name)
    for node in prologue:
        draft.copies[node] = (
            placeholders[names[node]] if node in names else draft.graph.node_copy(node, lambda n: draft.copies[n])
        )
    values = {node.name: draft.copies[node] for node in prologue if node not in names}
    inner = dict(zip((n for n in block.graph.graph.nodes if n.op == "placeholder"), block.arguments, strict=True))
    leaving: tuple[Any, ...] = ()
    for node in block.graph.graph.nodes:
        if node.op == "output":
            leaving = tuple(draft.copies[one] for one in node.args[0])
        elif node in inner:
            name = inner[node]
            draft.copies[node] = values[name[2:]] if name.startswith("c:") and name[2:] in missing else placeholders[name]
        else:
            draft.copies[node] = draft.graph.node_copy(node, lambda n: draft.copies[n])
    draft.graph.output((*leaving, *(values[name] for name in missing)))
    return replace(
        block,
        graph=GraphModule(source, draft.graph),
        arguments=tuple(draft.arguments),
        carried_out=(*block.carried_out, *missing),
    )


def _prologue(source: GraphModule, names: dict[Node, str], missing: Sequence[str]) -> list[Node]:
    """Nodes that the missing values follow from, in order.

    Raises:
        InputError: a parameter or a random number is among them.
    """
    order = {node: place for place, node in enumerate(source.graph.nodes)}
    by_name = {node.name: node for node in source.graph.nodes}
    needed: set[Node] = set()
    stack = [by_name[name] for name in missing]
    while stack:
        node = stack.pop()
        if node in needed:
            continue
        needed.add(node)
        changes = [user for user in node.users if node in set(mutated_arguments(user))]
        stack.extend([*node.all_input_nodes, *changes])
    for node in needed:
        if names.get(node, "").startswith("p:") or (node.op == "call_function" and uses_randomness(node)):
            what = names[node][2:] if node in names else node.name
            raise InputError(
                source="plan", key="pipeline.partition", value=None, rule=f"a tensor without gradient that crosses a stage's boundary ({', '.join(missing)}) depends on {what}",
                remedy="cut elsewhere, or make it from the batch and from buffers",
            )  # fmt: skip
    return sorted(needed, key=lambda node: order[node])
