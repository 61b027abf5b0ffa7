"""Templates and the order of passes -> the Program: each pass gets its template's instructions, and what they wait for is found."""

from __future__ import annotations

from collections.abc import Iterable, Sequence

import numpy as np
from numpy.typing import NDArray

from simulator.parallel.order_blocks import OrderBlocks
from simulator.parallel.stamp_kernels import Lists, ragged_kernel, waits_kernel
from simulator.parallel.template import Issued, Link, Template
from simulator.program import Program, Transfers

Integers = NDArray[np.int64]
_OF_PASS = -2
"""Stage of an instruction that belongs to its pass."""


def stamp(
    blocks: OrderBlocks, templates: Sequence[Template], template: Integers, *, link_bytes_per_s: Sequence[float], links_per_rank: tuple[int, int],
    resident_bytes: Sequence[tuple[int, ...]], slowdown: NDArray[np.float64],
) -> Program:  # fmt: skip
    """The program of a step.

    Args:
        blocks: of the order.
        templates: distinct ones.
        template: of each block, its index among them.
        link_bytes_per_s: links between ranks (out and in of each), then each rank's links to its host.
        links_per_rank: how many of each sort a rank has.
        resident_bytes, slowdown: as in `Program`.
    """
    rows_of = [row for one in templates for row in one.instructions]
    instructions = _offsets(len(one.instructions) for one in templates)
    counts = np.diff(instructions)[template]
    base = np.concatenate([[0], np.cumsum(counts)])
    block = np.repeat(np.arange(len(template)), counts)
    rows = np.arange(base[-1]) + (instructions[template] - base[:-1])[block]
    stage = np.array([_OF_PASS if row.stage is None else row.stage for row in rows_of], np.int32)[rows]
    own = stage == _OF_PASS
    names = tuple(dict.fromkeys(row.label for row in rows_of))
    dependency_offsets, dependencies = waits_kernel(
        base, template, blocks.rank, blocks.first_block, blocks.producer, blocks.forward, instructions, np.array([one.first for one in templates], np.int64),
        _lists(row.waits for row in rows_of), _lists(one.exits for one in templates), _lists(one.delivers for one in templates),
        _lists(one.left for one in templates), _lists(one.sent for one in templates),
    )  # fmt: skip
    changes = [change for row in rows_of for change in row.memory]
    memory_offsets, event = ragged_kernel(_offsets(len(row.memory) for row in rows_of), rows)
    return Program(
        kind=np.array([row.kind for row in rows_of], np.int8)[rows], device=blocks.rank[block].astype(np.int32),
        stream=np.array([row.stream for row in rows_of], np.int8)[rows], duration_s=np.array([row.duration_s for row in rows_of], np.float64)[rows],
        micro_batch=np.where(own, blocks.micro_batch[block], -1).astype(np.int32), block=np.where(own, blocks.stage[block], stage).astype(np.int32),
        option_index=np.array([names.index(row.label) for row in rows_of], np.int16)[rows], option_names=names,
        dependency_offsets=dependency_offsets, dependencies=dependencies, memory_offsets=memory_offsets,
        memory_time_s=np.array([change[0] for change in changes], np.float64)[event], memory_bytes=np.array([change[1] for change in changes], np.int64)[event],
        memory_class=np.array([change[2] for change in changes], np.int8)[event], resident_bytes=tuple(resident_bytes), slowdown=slowdown,
        transfers=_transfers(blocks, rows_of, rows, block, np.array(link_bytes_per_s, np.float64), links_per_rank),
    )  # fmt: skip


def _transfers(
    blocks: OrderBlocks, rows_of: Sequence[Issued], rows: Integers, block: Integers, link_bytes_per_s: NDArray[np.float64], links_per_rank: tuple[int, int]
) -> Transfers:  # fmt: skip
    moved = [row.transfer or (0.0, 0.0, ()) for row in rows_of]
    moves = np.array([row.transfer is not None for row in rows_of])
    instruction = np.flatnonzero(moves[rows])
    own = rows[instruction]
    route_offsets, position = ragged_kernel(_offsets(len(one[2]) for one in moved), own)
    link = np.array([link for one in moved for link in one[2]], np.int64)[position]
    home = np.repeat(block[instruction], np.diff(route_offsets))
    between, to_host = links_per_rank
    rank, receiver = blocks.rank[home], blocks.receiver[home]
    to_host_first = between * (len(blocks.first_block) - 1)
    routes = np.where(link == Link.OUT, between * rank, between * np.where(link == Link.INTO_OWN, rank, receiver) + 1)
    routes = np.where(link >= Link.HOST, to_host_first + to_host * rank + link - Link.HOST, routes)
    return Transfers(
        instruction=instruction, size_bytes=np.array([one[0] for one in moved], np.float64)[own],
        limit_bytes_per_s=np.array([one[1] for one in moved], np.float64)[own], route_offsets=route_offsets, routes=routes, link_bytes_per_s=link_bytes_per_s,
    )  # fmt: skip


def _offsets(lengths: Iterable[int]) -> Integers:
    return np.cumsum([0, *lengths], dtype=np.int64)


def _lists(lists: Iterable[Sequence[int]]) -> Lists:
    found = list(lists)
    return Lists(_offsets(len(one) for one in found), np.array([value for one in found for value in one], np.int64))
