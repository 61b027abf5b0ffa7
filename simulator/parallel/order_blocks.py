"""A pipeline order as arrays of blocks: of each rank its beginning, its passes in their order, its end; and which block gives to which."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from simulator.pipeline.action import ActionKind, Order
from simulator.pipeline.order_arrays import KIND_CODES, OrderArrays, order_arrays

Integers = NDArray[np.int64]
Flags = NDArray[np.bool_]

NOTHING = -1
KINDS: tuple[ActionKind, ...] = tuple(KIND_CODES)
"""Kinds by their number."""
_W, _F = KIND_CODES["W"], KIND_CODES["F"]


class OrderBlocks(NamedTuple):
    """Rank after rank; all but ``first_block`` by block."""

    first_block: Integers
    """[ranks + 1], where each rank's blocks begin."""
    rank: Integers
    stage: Integers
    """`NOTHING` for beginnings and ends, like the rest."""
    micro_batch: Integers
    kind: Integers
    receiver: Integers
    """Rank of the pass that takes the result."""
    producer: Integers
    """Block whose result a pass takes."""
    forward: Integers
    """Block of the same stage's and micro-batch's forward pass."""
    last: Flags
    """Whether no later pass of the stage on the rank makes gradients."""
    first: Flags
    """Whether it is the stage's first pass on the rank."""
    first_gradients: Flags
    """Whether no earlier pass of the stage on the rank makes parameters' gradients."""


def order_blocks(order: Order) -> OrderBlocks:
    """The blocks of an order, made once an order."""
    return order.once("blocks", lambda: _made(order, order_arrays(order)))


def _made(order: Order, arrays: OrderArrays) -> OrderBlocks:
    rank_of_pass = arrays.rank_of_part
    block_of_pass = np.arange(len(rank_of_pass)) + 2 * rank_of_pass + 1
    num = len(rank_of_pass) + 2 * order.num_ranks
    first_block = np.concatenate([[0], np.cumsum(np.bincount(rank_of_pass, minlength=order.num_ranks) + 2)])

    def spread(values: Integers, fill: int = NOTHING) -> Integers:
        """Values of passes, by block."""
        whole = np.full(num, fill, dtype=np.int64)
        whole[block_of_pass] = values
        return whole

    taker = _taker(order, arrays)
    takes = taker != NOTHING
    producer = np.full(len(taker), NOTHING, dtype=np.int64)
    producer[taker[takes]] = block_of_pass[takes]
    place = _place(order, arrays)
    pair = rank_of_pass * order.num_stages + arrays.stage
    gradients, parameters = arrays.kind != _F, (arrays.kind == _W) | (arrays.kind == KIND_CODES["BW"])
    return OrderBlocks(
        first_block=first_block, rank=np.repeat(np.arange(order.num_ranks), np.diff(first_block)), stage=spread(arrays.stage),
        micro_batch=spread(arrays.micro_batch), kind=spread(arrays.kind), receiver=spread(np.where(takes, rank_of_pass[taker], NOTHING)),
        producer=spread(producer), forward=spread(block_of_pass[place[0, arrays.stage, arrays.micro_batch]]),
        last=_marked(_first_where(pair[::-1], gradients[::-1])[::-1], block_of_pass, num),
        first=_marked(_first_where(pair, arrays.kind != _W), block_of_pass, num),
        first_gradients=_marked(_first_where(pair, parameters), block_of_pass, num),
    )  # fmt: skip


def _place(order: Order, arrays: OrderArrays) -> Integers:
    """The forward and the backward pass (with the input's gradient) of each stage and micro-batch; shape (2, stages, micro-batches)."""
    place = np.full((2, order.num_stages, order.num_microbatches), NOTHING, dtype=np.int64)
    passes = np.flatnonzero(arrays.kind != _W)
    place[(arrays.kind[passes] != _F).astype(np.int64), arrays.stage[passes], arrays.micro_batch[passes]] = passes
    return place


def _taker(order: Order, arrays: OrderArrays) -> Integers:
    """Of each pass the one that takes its result: the next stage's forward pass, or the backward pass of the stage before."""
    place, forward = _place(order, arrays), arrays.kind == _F
    target = np.where(forward, arrays.stage + 1, arrays.stage - 1)
    exists = (target >= 0) & (target < order.num_stages) & (arrays.kind != _W)
    found = place[np.where(forward, 0, 1), np.where(exists, target, 0), arrays.micro_batch]
    return np.where(exists, found, NOTHING)


def _first_where(pair: Integers, wanted: Flags) -> Flags:
    """Marks the first wanted pass of each pair."""
    places = np.flatnonzero(wanted)
    _, first = np.unique(pair[places], return_index=True)
    marks = np.zeros(len(pair), dtype=np.bool_)
    marks[places[first]] = True
    return marks


def _marked(marks: Flags, block_of_pass: Integers, num: int) -> Flags:
    whole = np.zeros(num, dtype=np.bool_)
    whole[block_of_pass] = marks
    return whole
