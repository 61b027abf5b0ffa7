"""A block's backward pass in two: the gradient of its input first, those of its parameters later (zero-bubble pipelines)."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from torch.autograd.graph import GradientEdge, Node

from simulator.tracing.block_run import BlockTape, boundary_of, views_replayed

Grads = tuple[torch.Tensor | None, ...]


@dataclass(slots=True, kw_only=True)
class _Group:
    """Parameters that hang on the same nodes of the way from the block's output to its input."""

    nodes: list[Node]
    leaves: list[torch.Tensor]


@dataclass(slots=True, kw_only=True)
class WeightTape:
    """What the input's gradient leaves for the parameters' ones: nodes from which parameters branch off, and what arrived there."""

    groups: list[_Group]
    arrived: dict[Node, Grads]


def input_gradient(tape: BlockTape, grad: torch.Tensor) -> tuple[torch.Tensor | None, WeightTape]:
    """Gradient of the boundary before the block, and what `weight_gradients` needs.

    **Model**: operators that lead to the input run once; where a parameter branches off, the gradient that arrives is kept. The graph
    stays whole until the parameters' gradients are made, as in ``torch.distributed.pipelining``.

    Args:
        tape: of a block that has an input; nothing else may hold its edge.
        grad: of the boundary after the block.
    """
    entering = boundary_of(tape.edge.node)
    assert entering is not None, "a block without an input has no gradient of one"
    groups = _groups(tape.edge.node, entering)
    arrived: dict[Node, Grads] = {}
    nodes = [node for group in groups for node in group.nodes]
    handles = [node.register_prehook(partial(_keep, arrived, node)) for node in nodes]
    try:
        with views_replayed():
            (result,) = torch.autograd.grad(
                [tape.edge], [GradientEdge(entering, 0)], [grad], retain_graph=True, allow_unused=True
            )
    finally:
        for handle in handles:
            handle.remove()
    return result, WeightTape(groups=groups, arrived=arrived)


def weight_gradients(tape: WeightTape) -> None:
    """Adds the gradients of the block's parameters to their ``.grad``; the tape is used up."""
    while tape.groups:
        group = tape.groups.pop(0)
        roots = [
            (GradientEdge(node, n), grad)
            for node in group.nodes
            for n, grad in enumerate(tape.arrived[node])
            if grad is not None
        ]
        handles = []
        if len(group.nodes) > 1:  # one node leads to another: what arrives there is known and must not count twice
            handles = [node.register_prehook(partial(_replace, tape.arrived[node])) for node in group.nodes]
        try:
            if roots:
                edges, grads = zip(*roots, strict=True)
                with views_replayed():
                    torch.autograd.backward(edges, grads, inputs=group.leaves)
                del edges, grads
        finally:
            for handle in handles:
                handle.remove()
        for node in group.nodes:
            del tape.arrived[node]
        del roots, group


def _keep(arrived: dict[Node, Grads], node: Node, grads: Grads) -> None:
    arrived[node] = grads


def _replace(known: Grads, _grads: Grads) -> Grads:
    return known


def _groups(root: Node, entering: Node) -> list[_Group]:
    """Groups from the output's side to the input's."""
    order = _forward_order(root)
    on_the_way = {entering}
    for node in order:
        if any(child in on_the_way for child in _children(node)):
            on_the_way.add(node)
    found: dict[Node, _Group] = {}
    for node in reversed(order):
        if node not in on_the_way or node is entering:
            continue
        leaves = _leaves((child for child in _children(node) if child not in on_the_way), on_the_way)
        for leaf in leaves:
            group = found.setdefault(leaf, _Group(nodes=[], leaves=[leaf.variable]))  # type: ignore[attr-defined]
            if node not in group.nodes:
                group.nodes.append(node)
    return _merged(list(found.values()))


def _merged(groups: Sequence[_Group]) -> list[_Group]:
    """Groups that share a node are one."""
    merged: list[_Group] = []
    for group in groups:
        touching = [other for other in merged if any(node in other.nodes for node in group.nodes)]
        nodes = list(dict.fromkeys([node for other in touching for node in other.nodes] + group.nodes))
        leaves = [leaf for other in touching for leaf in other.leaves] + group.leaves
        merged = [other for other in merged if all(other is not one for one in touching)] + [_Group(nodes=nodes, leaves=leaves)]
    return merged


def _leaves(starts: Iterable[Node], barrier: set[Node]) -> list[Node]:
    """Nodes that hold a leaf tensor and are reached without crossing the barrier, each once."""
    seen: dict[Node, None] = {}
    stack = list(starts)
    while stack:
        node = stack.pop()
        if node in seen or node in barrier:
            continue
        seen[node] = None
        stack.extend(_children(node))
    return [node for node in seen if isinstance(getattr(node, "variable", None), torch.Tensor)]


def _children(node: Node) -> list[Node]:
    return [child for child, _ in node.next_functions if child is not None]


def _forward_order(root: Node) -> list[Node]:
    """Nodes such that each comes after those that it leads to."""
    order: list[Node] = []
    seen: set[Node] = set()
    stack: list[tuple[Node, Any]] = [(root, iter(_children(root)))]
    seen.add(root)
    while stack:
        node, children = stack[-1]
        child = next(children, None)
        if child is None:
            order.append(node)
            stack.pop()
        elif child not in seen:
            seen.add(child)
            stack.append((child, iter(_children(child))))
    return order
