"""WeightProblem: which blocks' weights live on the host, and when they come in, in seconds and bytes."""

from __future__ import annotations

import math
from dataclasses import dataclass
from enum import IntEnum

from hardware_models.errors import InputError
from search.solvers.offload_problem import HostLink


class Residency(IntEnum):
    """Where a block's weights are between its passes."""

    RESIDENT = 0
    """On the device, always."""
    TWICE = 1
    """On the host; come in before the forward pass and again before the backward pass."""
    OVER_TURN = 2
    """Come in before the forward pass and stay until the backward pass is done."""
    OVER_STEP = 3
    """Come in before the backward pass and stay until the next step's forward pass is done."""


@dataclass(frozen=True, slots=True, kw_only=True)
class WeightProblem:
    """One step of a chain of L blocks, repeated for ever: forward 0..L-1, backward L-1..0.

    Model:
        Pass s = 0..2L-1 is of block s or 2L-1-s; after each pass lies a gap in which the link may be waited for. Weights that are not on the
        device come in, in the order of their use, before the pass that needs them. By the end of phase q (passes and gaps in turn) G(q)
        bytes have come and those needed by passes up to then are D(q): G(q) >= D(q + 1), G(q) - G(q - 1) <= in_bytes_per_s * t(q).
        A backward pass whose weights are not resident leaves ``gradient_bytes``, which go out during the next pass and are there until
        its end. t(q) >= compute time, t(q) >= bytes going out / out_bytes_per_s, and 0 for a gap. At phase q the device holds weights in use
        or kept, G(q) - D(q) that came early, and gradients on their way: at most room_bytes. Minimised is the sum of t over a step
        that begins as it ends.

    Source:
        The problem of Beaumont, Eyraud-Dubois, Shilova, Zhao, "Weight offloading strategies for training large DNN models" (HAL-03580767,
        2022), which is strongly NP-complete. The four ways to keep weights, fluid transfers in order of use, and gradients are ours.

    Not modelled:
        Part of a block's weights on the host; latencies; other traffic on the link; the host's optimizer step.
    """

    forward_s: tuple[float, ...]
    """Per block."""
    backward_s: tuple[float, ...]
    """Per block."""
    weight_bytes: tuple[int, ...]
    """Per block."""
    gradient_bytes: tuple[int, ...]
    """Per block, what goes to the host after its backward pass if its weights are not resident."""
    room_bytes: tuple[int, ...]
    """Per pass (2 L): memory for weights and such gradients."""
    link: HostLink

    def __post_init__(self) -> None:
        blocks = self.num_blocks
        if not blocks:
            raise InputError(source="weight problem", key="forward_s", value=None, rule="there are one or more blocks")
        for key in ("backward_s", "weight_bytes", "gradient_bytes", "room_bytes"):
            wanted = 2 * blocks if key == "room_bytes" else blocks
            if len(getattr(self, key)) != wanted:
                rule = f"{wanted} entries must be given, but got {len(getattr(self, key))}"
                raise InputError(source="weight problem", key=key, value=None, rule=rule)
        for key in ("forward_s", "backward_s", "weight_bytes", "gradient_bytes"):
            if any(not (value >= 0 and math.isfinite(value)) for value in getattr(self, key)):
                raise InputError(source="weight problem", key=key, value=None, rule="0 <= value < inf must hold")

    @property
    def num_blocks(self) -> int:
        """L."""
        return len(self.forward_s)

    @property
    def num_passes(self) -> int:
        """2 L."""
        return 2 * self.num_blocks

    @property
    def pass_s(self) -> tuple[float, ...]:
        """Per pass, its compute time."""
        return (*self.forward_s, *reversed(self.backward_s))

    def block_of(self, index: int) -> int:
        """The block of a pass."""
        return index if index < self.num_blocks else self.num_passes - 1 - index
