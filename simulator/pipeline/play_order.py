"""Times and peak activations of an order alone, from times per rank: no kernels, links or bytes."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from hardware_models.errors import InputError
from simulator.pipeline.action import Order
from simulator.pipeline.check_order import stuck_error
from simulator.pipeline.order_arrays import KIND_CODES, Floats, OrderArrays, order_arrays
from simulator.pipeline.play_kernels import play_cells

WEIGHT_SHARE = 0.5
"""Part of a micro-batch's activations that the weight gradient still needs. Source: arXiv 2401.10241 table 5 is reproduced with
M_W = M_B / 2 (techniques.md, appendix A); exactly, M_W / M_B = 32 h / (34 h + 5 a s) (there, section 8.2)."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankTimes:
    """Times of one micro-batch on each rank; the chunks of a rank share them equally."""

    forward_s: tuple[float, ...]
    """Per rank, or one for all."""
    input_gradient_s: tuple[float, ...]
    """Per rank, or one for all."""
    weight_gradient_s: tuple[float, ...]
    """Per rank, or one for all."""
    comm_s: float = 0.0
    """From the end of a pass to the arrival of what it sends on another rank; occupies no device."""
    overlapped_s: tuple[float, ...] | None = None
    """Time of an overlapped forward and backward pass, per rank or one for all; None is the sum of their times."""

    def __post_init__(self) -> None:
        for key in ("forward_s", "input_gradient_s", "weight_gradient_s", "overlapped_s"):
            values = getattr(self, key)
            if values is not None and not (values and np.isfinite(values).all() and min(values) >= 0):
                rule = f"finite times >= 0 must be given, but got {values}"
                raise InputError(source="times", key=key, value=None, rule=rule, remedy="give one per rank, or one for all")
        if not (np.isfinite(self.comm_s) and self.comm_s >= 0):
            raise InputError(source="times", key="comm_s", value=self.comm_s, rule="comm_s >= 0 must hold")

    def per_rank(self, num_ranks: int) -> Floats:
        """[4 kinds and the overlapped pair, ranks], in the numbering of `KIND_CODES`.

        Raises:
            InputError: a list has neither one entry nor one per rank.
        """
        rows = {}
        for key in ("forward_s", "input_gradient_s", "weight_gradient_s", "overlapped_s"):
            values = getattr(self, key)
            if values is None:
                continue
            if len(values) not in (1, num_ranks):
                rule = f"1 or {num_ranks} entries (one per rank) must be given, but got {len(values)}"
                raise InputError(source="times", key=key, value=values, rule=rule)
            rows[key] = np.broadcast_to(np.array(values, dtype=np.float64), (num_ranks,))
        forward, gradient, weight = rows["forward_s"], rows["input_gradient_s"], rows["weight_gradient_s"]
        return np.stack((forward, gradient, weight, gradient + weight, rows.get("overlapped_s", forward + gradient + weight)))


@dataclass(frozen=True, slots=True, kw_only=True)
class PlayedOrder:
    """When everything of an order happened, and the most activations that each rank held."""

    order: Order
    """What was played."""
    start_s: tuple[Floats, ...]
    """Per rank, the start of each of its cells."""
    end_s: tuple[Floats, ...]
    """Per rank, the end of each of its cells."""
    busy_s: tuple[float, ...]
    """Per rank, the time in which it runs something."""
    peak_activations: tuple[float, ...]
    """Per rank, in the activations of one micro-batch on that whole rank (M_B)."""

    @property
    def span_s(self) -> tuple[float, ...]:
        """Per rank, from its first start to its last end."""
        pairs = zip(self.start_s, self.end_s, strict=True)
        return tuple(float(end[-1] - start[0]) if len(end) else 0.0 for start, end in pairs)

    @property
    def makespan_s(self) -> float:
        """From the first start to the last end over all ranks."""
        ends, starts = [end[-1] for end in self.end_s if len(end)], [start[0] for start in self.start_s if len(start)]
        return float(max(ends) - min(starts)) if ends else 0.0

    @property
    def bubble_ratio(self) -> float:
        """1 - busy / span of the rank with the largest span, the lowest of equals."""
        spans = self.span_s
        longest = spans.index(max(spans))
        return 1.0 - self.busy_s[longest] / spans[longest] if spans[longest] > 0 else 0.0


def play_order(order: Order, times: RankTimes, *, weight_share: float = WEIGHT_SHARE) -> PlayedOrder:
    """The order in time: each rank runs its cells in order, each when the rank is free and its inputs have arrived.

    Args:
        order: what to play.
        times: per rank and micro-batch.
        weight_share: x, the part of a micro-batch's activations that its weight gradient releases; the input gradient
            releases 1 - x.

    Raises:
        InputError: the order deadlocks (shows where), or times do not fit its ranks.

    **Model**: start = max(end of the rank's previous cell, end of the producer + comm if it is on another rank). The input gradient leaves
    at the end of B, or of BW. An overlapped pair is one cell.

    **Not modelled**: sends that wait for a free link, kernels that slow one another down, optimizer step.
    """
    if not 0.0 <= weight_share <= 1.0:
        rule = f"0 <= weight_share <= 1 must hold, but got {weight_share}"
        raise InputError(source="times", key="weight_share", value=weight_share, rule=rule)
    arrays = order_arrays(order)
    share = 1.0 / (np.array(order.chunks_of_rank) * order.microbatch_parts)
    duration = _cell_durations(arrays, times.per_rank(order.num_ranks) * share)
    start, end, done = play_cells(*arrays, duration, times.comm_s)
    if (done < np.diff(arrays.first_cell)).any():
        raise stuck_error(order, arrays, tuple(int(count) for count in done), source=order.name)
    bounds = arrays.first_cell[1:-1]
    return PlayedOrder(
        order=order,
        start_s=tuple(np.split(start, bounds)),
        end_s=tuple(np.split(end, bounds)),
        busy_s=tuple(float(part.sum()) for part in np.split(duration, bounds)),
        peak_activations=_peak_activations(arrays, share, weight_share),
    )


def _cell_durations(arrays: OrderArrays, times_s: Floats) -> Floats:
    """[cells]; an overlapped pair is the last row of ``times_s``."""
    first = arrays.first_part[:-1]
    code = np.where(np.diff(arrays.first_part) > 1, len(KIND_CODES), arrays.kind[first])
    duration: Floats = times_s[code, arrays.rank_of_part[first]]
    return duration


def _peak_activations(arrays: OrderArrays, share: Floats, weight_share: float) -> tuple[float, ...]:
    """Per rank, the most it holds; passes of an overlapped pair count forward first."""
    changes = np.array([1.0, weight_share - 1.0, -weight_share, -1.0])[arrays.kind]
    held = np.split(changes, arrays.first_part[arrays.first_cell][1:-1])
    return tuple(float(part * max(0.0, np.cumsum(row).max(initial=0.0))) for row, part in zip(held, share, strict=True))
