"""What a pipeline rank holds when it begins each pass, and how high its memory then rises."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from search.chain_kernels import Floats, Ints
from simulator.pipeline.action import Order, actions_of


@dataclass(frozen=True, slots=True, kw_only=True)
class Moments:
    """What a rank holds whenever it begins a pass: rows of ``held`` are micro-batches per stage of the rank, those of running backward passes included."""

    held: Floats
    """Shape (moments, stages of the rank)."""
    running: Ints
    """Which of the rank's stages; shape (moments,)."""
    backward: npt.NDArray[np.bool_]

    def peak_bytes(self, kept: Floats, forward: Floats, backward: Floats) -> Floats:
        """Most bytes of activations; shape (choices,).

        Args:
            kept: by a micro-batch from forward to backward; shape (choices, stages of the rank).
            forward: most that the forward pass adds; same shape.
            backward: most that the backward pass adds.
        """
        rises = np.where(self.backward[:, None], backward.T[self.running], forward.T[self.running])
        peaks: Floats = (self.held @ kept.T + rises).max(axis=0)
        return peaks


def moments_of(order: Order, rank: int, *, weight_share: float) -> Moments:
    """The moments of a rank at which its memory may be highest: of one stage's forward or backward passes, those at which no other has as much of every stage; found once an order.

    Args:
        order: of the pipeline.
        rank: of it.
        weight_share: part of what a micro-batch keeps that stays from its input gradient to its weight gradient.
    """
    return order.once(f"moments of rank {rank}, {weight_share}", lambda: _moments_of(order, rank, weight_share))


def _moments_of(order: Order, rank: int, weight_share: float) -> Moments:
    stages = order.stages_of_rank[rank]
    place = {stage: n for n, stage in enumerate(stages)}
    part, held = 1.0 / order.microbatch_parts, [0.0] * len(stages)
    seen: dict[tuple[bool, int, tuple[float, ...]], None] = {}
    change = {"F": 1.0, "BW": -1.0, "B": weight_share - 1.0, "W": -weight_share}
    for action in actions_of(order.ranks[rank]):
        own = place[action.stage]
        if action.kind != "W":
            seen.setdefault((action.kind != "F", own, tuple(round(one, 9) for one in held)))
        held[own] += change[action.kind] * part
    passes: dict[tuple[bool, int], list[tuple[float, ...]]] = {}
    for backward, own, row in seen:
        passes.setdefault((backward, own), []).append(row)
    kept = [(key, row) for key, rows in passes.items() for row in _highest(np.array(rows, np.float64))]
    return Moments(
        held=np.array([row for _, row in kept], np.float64), running=np.array([key[1] for key, _ in kept], np.int64),
        backward=np.array([key[0] for key, _ in kept], np.bool_),
    )  # fmt: skip


def _highest(rows: Floats) -> Floats:
    """Rows that no other equals or exceeds in every column."""
    kept: list[Floats] = []
    for row in rows[np.argsort(-rows.sum(axis=1), kind="stable")]:
        if not any((other >= row).all() for other in kept):
            kept.append(row)
    return np.array(kept, np.float64)
