"""Operators: in which kernels a trainer runs the parts of a layer. What is fused keeps less for the backward pass and moves fewer bytes."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True, kw_only=True)
class Operators:
    """Which parts run in one kernel instead of operator by operator as ``transformers`` writes them."""

    norm: bool = False
    """RMS norm in one kernel: keeps its input and a float32 number a row. (Layer norm is one kernel everywhere.)"""
    gated: bool = False
    """Gate and up are one product and their activation one kernel: keeps the product's result and its own."""
    rotary: bool = False
    """Rotary positions in one kernel: keeps the tables. Values leave the common product of queries, keys and values by a copy, so that this can go."""
    routed: bool = False
    """Experts weight their tokens within the activation, so that their results are not kept, and sum them in the stream's dtype; the router reads the stream in its own dtype."""
    attention_inputs: bool = False
    """Query, key and value are one product whatever the configuration says."""
    repeated_keys: bool = False
    """Keys and values that a group of heads shares are copied for each of its heads before fused attention, which then knows no groups; gradients of the copies are summed."""
    alternate: bool = False
    """``selective`` keeps every second result of a linear layer only, the first, third, ... of each half, and of layers only: head and loss run once. A layer's halves are one
    region: what lies between them is made again, or, where tensor parallelism scatters it, kept as the scattered sum."""
    unread: bool = True
    """``selective`` keeps results of products that no backward pass reads, as eager checkpointing does, which stores what its policy names."""
    gathers_once: bool = False
    """What sequence parallelism gathers before a product stays for the weights' gradient, in place of the shard that is gathered again."""
    eight_bit_inputs: bool = False
    """Linear layers of a layer keep their input in eight bits for the weights' gradient, each a copy of its own; the router and the head do not."""
    sharded_loss: bool = False
    """Cross entropy over a vocabulary split by tensor parallelism, operator by operator."""
    gathered_logits: bool = False
    """Logits are gathered over tensor parallelism, and each rank computes the whole loss and which token is most likely; they stay until the next micro-batch's."""
    loss: bool = False
    """Cross entropy in place: logits are cast to float32 once and become probabilities, and in the backward pass their gradient."""


EAGER = Operators()
"""Operator by operator."""
