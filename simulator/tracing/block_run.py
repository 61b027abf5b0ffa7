"""Running blocks: forward without a graph, forward with one, backward. Tracing runs them on fakes, replay on the real thing.

What a block leaves alive between its passes is decided here and nowhere else: the graph of a block holds what autograd saved and
no more (the block's input and output are let go unless an operator saved them), because its input enters through a function that
keeps no reference to it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch.autograd.grad_mode import _force_original_view_tracking
from torch.autograd.graph import GradientEdge, Node, get_gradient_edge, saved_tensors_hooks
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from simulator.tracing.block_graph import BlockGraph
from simulator.tracing.compute_mode import compute_mode, float32_products
from simulator.tracing.live_storages import storage_of

OnSave = Callable[[torch.Tensor], None]
"""Called with a tensor over a storage that a graph keeps."""

SELECTIVE_KEEPS = frozenset(
    "mm addmm bmm baddbmm _grouped_mm _scaled_mm _int_mm convolution _fft_r2c _fft_c2r _fft_c2c "
    "_scaled_dot_product_flash_attention_for_cpu _scaled_dot_product_flash_attention _scaled_dot_product_efficient_attention "
    "_scaled_dot_product_cudnn_attention _scaled_dot_product_fused_attention_overrideable".split()
)
"""Operators below autograd whose results the option ``selective`` keeps; all others run again inside the backward pass."""


class _Boundary(torch.autograd.Function):
    """Lets a tensor enter a block's graph without the graph holding it; its gradient goes to an inbox."""

    @staticmethod
    def forward(ctx: Any, anchor: torch.Tensor, x: torch.Tensor, inbox: list[torch.Tensor]) -> torch.Tensor:  # noqa: ARG004 - see below
        """``anchor`` is a leaf without elements: it makes the result need a gradient."""
        ctx.inbox = inbox
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, *grads: torch.Tensor) -> tuple[None, None, None]:
        ctx.inbox.append(grads[0])
        return None, None, None


@dataclass(frozen=True, slots=True, kw_only=True)
class BlockTape:
    """A block that ran forward with a graph and waits for its backward pass."""

    block: BlockGraph
    edge: GradientEdge
    inbox: list[torch.Tensor]
    again: bool
    """Whether its backward pass runs operators of the forward pass again (option ``selective``)."""
    policy_calls: int = 0
    """Operators about which that option asked its policy."""


@dataclass(slots=True, kw_only=True)
class MicroBatch:
    """What the blocks of one micro-batch share while it is in flight."""

    parameters: Mapping[str, torch.Tensor]
    buffers: Mapping[str, torch.Tensor]
    inputs: Mapping[str, torch.Tensor]
    shared: frozenset[str] = frozenset()
    """Parameters that several blocks use: their gradients are summed before they meet ``.grad``, as autograd does."""
    precision: str = "fp32"
    """In which forward passes compute."""
    rerun: frozenset[str] = frozenset()
    """Names of the blocks that run forward more than once."""
    carried: dict[str, Any] = field(default_factory=dict)
    aliases: dict[str, torch.Tensor] = field(default_factory=dict)
    _random_states: dict[str, Any] = field(default_factory=dict)
    _buffer_states: dict[str, tuple[torch.Tensor, ...]] = field(default_factory=dict)

    @property
    def _device(self) -> torch.device:
        return next((value.device for value in self.parameters.values()), torch.device("cpu"))

    def arguments(self, block: BlockGraph, x: torch.Tensor | None) -> list[Any]:
        """The block's arguments in order."""
        return [x if name == "x" else self._lookup(name) for name in block.arguments]

    def _lookup(self, name: str) -> Any:
        kind, key = name.split(":", 1)
        if kind == "p" and key in self.shared:
            if key not in self.aliases:
                parameter = self.parameters[key]
                self.aliases[key] = parameter.detach().requires_grad_(parameter.requires_grad)
            return self.aliases[key]
        return {"p": self.parameters, "b": self.buffers, "i": self.inputs, "c": self.carried}[kind][key]

    def discard(self, block: BlockGraph, x: torch.Tensor | None) -> torch.Tensor:
        """Boundary after the block, without a graph."""
        with torch.no_grad(), self._same_state(block), compute_mode(self.precision, self._device):
            y, *carried = block.graph(*self.arguments(block, x))
        self._carry(block, carried)
        result: torch.Tensor = y
        return result

    def save(
        self, block: BlockGraph, x: torch.Tensor | None, option: str, on_save: OnSave | None = None
    ) -> tuple[torch.Tensor, BlockTape]:
        """Boundary after the block, cut off from the graph, and the graph.

        Args:
            block: to run.
            x: boundary before it.
            option: ``all`` keeps what autograd saves; ``selective`` keeps the results of products only.
            on_save: told of each storage of the block's own that autograd saves (see `own_storages`).
        """
        inbox: list[torch.Tensor] = []
        with torch.enable_grad(), views_replayed(), self._same_state(block):
            if x is not None:
                anchor = torch.empty(0, device=x.device, requires_grad=True)
                x = _Boundary.apply(anchor, x, inbox)  # type: ignore[no-untyped-call]
            arguments, asked = self.arguments(block, x), list[str]()
            with (
                nullcontext() if on_save is None else own_storages(arguments, on_save),
                compute_mode(self.precision, self._device),
            ):
                y, *carried = _run(block, arguments, option, asked)
            del arguments
        self._carry(block, carried)
        tape = BlockTape(block=block, edge=get_gradient_edge(y), inbox=inbox, again=option != "all", policy_calls=len(asked))
        return y.detach(), tape

    def backward(self, tape: BlockTape, grad: torch.Tensor) -> torch.Tensor | None:
        """Gradient of the boundary before the block (None for the first); parameters' gradients go to ``.grad``."""
        again = self._same_state(tape.block) if tape.again else nullcontext()
        with views_replayed(), again, float32_products(self.precision, self._device):
            torch.autograd.backward([tape.edge], [grad])
        return tape.inbox.pop() if tape.inbox else None

    def finish(self) -> None:
        """Hands the gradients of shared parameters over and forgets everything that is carried."""
        for name, alias in self.aliases.items():
            parameter = self.parameters[name]
            if alias.grad is None:
                continue
            if parameter.grad is None:
                parameter.grad = alias.grad
            else:
                parameter.grad.add_(alias.grad)
            alias.grad = None
        for states in (self.aliases, self.carried, self._random_states, self._buffer_states):
            states.clear()

    def _carry(self, block: BlockGraph, values: list[Any]) -> None:
        for name, value in zip(block.carried_out, values, strict=True):
            self.carried.setdefault(name, value)

    @contextmanager
    def _same_state(self, block: BlockGraph) -> Iterator[None]:
        """Random numbers and running statistics as in the block's first run, whichever run this is."""
        if block.name not in self.rerun:
            yield
            return
        buffers = tuple(self.buffers[name] for name in block.mutated_buffers)
        device = self._device
        first = block.name not in self._buffer_states
        if first:
            self._buffer_states[block.name] = tuple(buffer.clone() for buffer in buffers)
            if block.uses_randomness:
                self._random_states[block.name] = random_state(device)
            yield
            return
        buffers_after = tuple(buffer.clone() for buffer in buffers)
        random_after = random_state(device) if block.uses_randomness else None
        _restore(buffers, self._buffer_states[block.name])
        if block.uses_randomness:
            set_random_state(device, self._random_states[block.name])
        try:
            yield
        finally:
            _restore(buffers, buffers_after)
            if block.uses_randomness:
                set_random_state(device, random_after)


@contextmanager
def own_storages(arguments: Sequence[Any], on_save: OnSave) -> Iterator[None]:
    """Tells of each storage that autograd saves and that the block makes, once, in the order in which they are first saved.

    Storages of the block's arguments are not its own. What is saved stays as it is.
    """
    known = {storage_of(leaf) for leaf in tree_leaves(arguments) if isinstance(leaf, torch.Tensor)}

    def pack(tensor: torch.Tensor) -> torch.Tensor:
        storage = storage_of(tensor)
        if storage not in known and tensor.untyped_storage().nbytes():
            known.add(storage)
            on_save(tensor)
        return tensor

    with saved_tensors_hooks(pack, lambda tensor: tensor):
        yield


def boundary_of(root: Node) -> Node | None:
    """The node through which a block's input entered the graph of its output; None where it has none."""
    seen, stack = {root}, [root]
    while stack:
        node = stack.pop()
        if isinstance(node, _Boundary._backward_cls):  # noqa: SLF001 - torch's only name of the class
            return node
        new = [child for child, _ in node.next_functions if child is not None and child not in seen]
        seen.update(new)
        stack.extend(new)
    return None


def views_replayed() -> AbstractContextManager[object]:
    """Views that are changed in place enter the graph as themselves, on real tensors as on fakes.

    By default only fakes do so: real ones enter as ``as_strided`` of their base, whose backward pass needs one temporary more.
    """
    return _force_original_view_tracking(True)


def _run(block: BlockGraph, arguments: list[Any], option: str, asked: list[str]) -> tuple[Any, ...]:
    """The block's results; ``asked`` gets the operators about which ``selective`` asks its policy."""
    if option == "all":
        return block.graph(*arguments)
    position = block.arguments.index("x") if "x" in block.arguments else None

    def run(x: torch.Tensor | None) -> tuple[Any, ...]:
        if position is not None:
            arguments[position] = x
        result = block.graph(*arguments)
        if position is not None:
            arguments[position] = None
        return result

    def policy(context: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
        asked.append(operator.overloadpacket.__name__)
        return selective_policy(context, operator, *args, **kwargs)

    x, contexts = (
        (None if position is None else arguments[position]),
        partial(create_selective_checkpoint_contexts, policy),
    )
    result: tuple[Any, ...] = checkpoint(
        run, x, use_reentrant=False, context_fn=contexts, preserve_rng_state=block.uses_randomness
    )
    return result


def selective_policy(_context: Any, operator: Any, *_args: Any, **_kwargs: Any) -> CheckpointPolicy:
    """What option ``selective`` does with an operator's results."""
    keeps = operator.overloadpacket.__name__ in SELECTIVE_KEEPS
    return CheckpointPolicy.MUST_SAVE if keeps else CheckpointPolicy.PREFER_RECOMPUTE


def random_state(device: torch.device) -> tuple[torch.Tensor, torch.Tensor | None]:
    """States of the host's generator and, on an accelerator, of the device's."""
    return torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None


def set_random_state(device: torch.device, state: Any) -> None:
    """Puts the generators where `random_state` found them."""
    host, accelerator = state
    torch.set_rng_state(host)
    if accelerator is not None:
        torch.cuda.set_rng_state(accelerator, device)


def _restore(buffers: tuple[torch.Tensor, ...], states: tuple[torch.Tensor, ...]) -> None:
    """Writes states back past the version counters: a graph that saved a running statistic may still read it."""
    for buffer, state in zip(buffers, states, strict=True):
        buffer.data.copy_(state)
