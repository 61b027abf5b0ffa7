"""Which fractions of parameters and optimizer states live on the host: cells of fractions, and the bytes that follow from them at least or at most."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise, product
from typing import Literal

from hardware_models.errors import InputError
from simulator.host_schedule import HostShares
from simulator.optimizer_states import OPTIMIZER_STATES, STEP_COUNT_BYTES
from simulator.workload import Workload

Technique = Literal["recompute", "activations", "weights", "optimizer"]
TECHNIQUES: tuple[Technique, ...] = ("recompute", "activations", "weights", "optimizer")
"""What saves memory on one device beside smaller micro-batches: computing again, and three classes of bytes that live on the host."""
FRACTION_STEPS = (0.0, 0.5, 1.0)
"""Ends of the cells: nothing, then above one end and up to the next."""


@dataclass(frozen=True, slots=True, kw_only=True, order=True)
class HostCell:
    """Plans whose fraction of parameters' bytes on the host lies in (weights_low, weights_high], or is 0, and likewise of optimizer states."""

    weights_low: float = 0.0
    weights_high: float = 0.0
    optimizer_low: float = 0.0
    optimizer_high: float = 0.0

    def __post_init__(self) -> None:
        for low, high in ((self.weights_low, self.weights_high), (self.optimizer_low, self.optimizer_high)):
            if not 0.0 <= low <= high <= 1.0:
                raise InputError(source="host cell", key="fractions", value=(low, high), rule="0 <= low <= high <= 1 must hold")

    @property
    def text(self) -> str:
        """Names the cell in a study's storage."""
        return f"weights<={self.weights_high:g},optimizer<={self.optimizer_high:g}"


def host_cells(techniques: tuple[Technique, ...]) -> tuple[HostCell, ...]:
    """All cells that techniques allow."""
    weights, optimizer = (_stretches(name in techniques) for name in ("weights", "optimizer"))
    return tuple(
        HostCell(weights_low=w[0], weights_high=w[1], optimizer_low=o[0], optimizer_high=o[1])
        for w, o in product(weights, optimizer)
    )


FINER_STEPS = (0.25, 0.125)
"""By which fractions are changed around the best of the cells' ends."""


def neighbours(weights: float, optimizer: float, step: float, techniques: tuple[Technique, ...]) -> Iterator[HostCell]:
    """Cells of one pair of fractions each, a step away from a pair."""
    for name, sign in product(("weights", "optimizer"), (-1.0, 1.0)):
        tried = (weights + sign * step, optimizer) if name == "weights" else (weights, optimizer + sign * step)
        if name in techniques and all(0.0 <= one <= 1.0 for one in tried):
            yield HostCell(weights_low=tried[0], weights_high=tried[0], optimizer_low=tried[1], optimizer_high=tried[1])


def _stretches(allowed: bool) -> tuple[tuple[float, float], ...]:
    return ((0.0, 0.0), *(pairwise(FRACTION_STEPS) if allowed else ()))


@dataclass(frozen=True, slots=True, kw_only=True)
class HostTraffic:
    """Least bytes that cross the link in a step for parameters and gradients, whatever the plan in a cell."""

    in_bytes: int
    out_bytes: int
    updated_bytes: int
    """Least bytes that the host reads and writes for its part of the optimizer's step."""


class HostBytes:
    """Bytes of a workload by what may live on the host.

    **Model**: whole tensors go, never more than the fraction and less by at most one tensor (`simulator.host_planner`). A parameter on the host comes at least twice a
    micro-batch, save for the blocks at both ends, whose two runs in a row share one coming. What the host does not update comes once more and goes back.
    """

    def __init__(self, workload: Workload, *, num_microbatches: int, optimizer: str) -> None:
        self.num_microbatches, self._states = num_microbatches, OPTIMIZER_STATES[optimizer]
        groups = [block.parameters for block in workload.blocks]
        sizes = [tensor.size_bytes for group in groups for tensor in group]
        trained = [tensor.size_bytes for group in [*groups, workload.shared_parameters] for tensor in group if tensor.trained]
        self.weight_bytes, self.trained_bytes = sum(sizes), sum(trained)
        self._largest_weight, self._largest_trained = max(sizes, default=0), max(trained, default=0)
        self._frozen_bytes = sum(tensor.size_bytes for group in groups for tensor in group if not tensor.trained)
        self._step_count_bytes = STEP_COUNT_BYTES[optimizer] * len(trained)
        self._block_bytes = [sum(tensor.size_bytes for tensor in group) for group in groups]
        self._largest_block = max(self._block_bytes, default=0)

    def most_freed_bytes(self, cell: HostCell) -> int:
        """Most bytes that a cell's plans keep off the device all the time: parameters, and states of what the host updates."""
        states = cell.optimizer_high * self._states * self.trained_bytes + (
            self._step_count_bytes if cell.optimizer_high else 0
        )
        return int(cell.weights_high * self.weight_bytes + states)

    def most_gradients_freed_bytes(self, cell: HostCell) -> int:
        """Most bytes of gradients that have left while the last micro-batch runs; others hold all of them between the first and the last micro-batch."""
        return int(cell.optimizer_high * self.trained_bytes) if self.num_microbatches <= 2 else 0  # noqa: PLR2004 - a first and a last

    def weight_fraction(self, weights: Sequence[float]) -> float:
        """Of all blocks' parameters' bytes, what fractions of each block's come to."""
        return sum(share * size for share, size in zip(weights, self._block_bytes, strict=True)) / max(
            1, sum(self._block_bytes)
        )

    def least_traffic(self, cell: HostCell) -> HostTraffic:
        """Least traffic of a cell's plans, activations left out."""
        away = _whole(cell.weights_low, self.weight_bytes, self._largest_weight)
        updated = _whole(cell.optimizer_low, self.trained_bytes, self._largest_trained)
        returning = max(0, away - self._frozen_bytes - int(cell.optimizer_high * self.trained_bytes))
        comings = max(0, 2 * away - 2 * self._largest_block)
        sent_up = max(0, updated - int(cell.weights_high * self.weight_bytes))
        return HostTraffic(
            in_bytes=self.num_microbatches * comings + returning + sent_up, out_bytes=updated + returning,
            updated_bytes=updated * (2 + self._states + 1 + self._states),
        )  # fmt: skip


def _whole(fraction: float, total_bytes: int, largest_bytes: int) -> int:
    """Least bytes of whole tensors that stand for a fraction."""
    return max(0, int(fraction * total_bytes) - largest_bytes)


def uniform_shares(num_blocks: int, *, activations: float, weights: float, optimizer: float) -> HostShares:
    """The same fractions in every block."""
    return HostShares(activations=(activations,) * num_blocks, weights=(weights,) * num_blocks, optimizer=optimizer)
