"""MicrobatchProblem: what each pass of a fixed pipeline order costs, by what its micro-batch keeps on its stage."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np

from hardware_models.errors import InputError
from simulator.pipeline.action import Action, Order
from simulator.pipeline.order_arrays import OrderArrays, order_arrays
from simulator.pipeline.play_kernels import play_cells

Choice = tuple[tuple[int, ...], ...]
"""Per stage and micro-batch, the number of an option."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PassOption:
    """One way to keep the activations of a micro-batch on a stage.

    A full backward pass counts as B followed by W within one: its time is the sum, its peak the higher.
    """

    name: str
    forward_s: float
    input_gradient_s: float
    """Time of B, what it recomputes included."""
    weight_gradient_s: float
    """Time of W, what it recomputes included."""
    saved_bytes: int
    """Held from the forward pass to the end of B."""
    weight_saved_bytes: int = 0
    """Held from B to the end of W."""
    forward_peak_bytes: int = 0
    """Most that the forward pass adds to what is held, what it saves included."""
    input_gradient_peak_bytes: int = 0
    """Most that B adds to what is held, which contains ``saved_bytes``."""
    weight_gradient_peak_bytes: int = 0
    """Most that W adds to what is held, which contains ``weight_saved_bytes``."""

    def __post_init__(self) -> None:
        for key in self.__slots__:
            value = getattr(self, key)
            if key != "name" and not (value >= 0 and math.isfinite(value)):
                raise InputError(source=f"option {self.name}", key=key, value=value, rule="0 <= value < inf must hold")


@dataclass(frozen=True, slots=True, kw_only=True)
class MicrobatchProblem:
    """A fixed order, the options of every stage, and the memory of every rank.

    Model:
        Start and end of every pass follow `simulator.pipeline.play_order` with the times of the options chosen. On each rank, in its
        order: F needs held + forward_peak <= budget, then held += saved; B needs held + input_gradient_peak <= budget, then
        held += weight_saved - saved; W needs held + weight_gradient_peak <= budget, then held -= weight_saved.

    Source:
        The problem of StageRemat (ELF): Aguila--Multner, Beaumont, Eyraud-Dubois, Gusak, HAL-05151601, 2025. Its options become
        time, saved and peak bytes here.

    Not modelled:
        Overlapped pairs; transfers between ranks that wait for one another.
    """

    order: Order
    options: tuple[tuple[PassOption, ...], ...]
    """Per stage."""
    budget_bytes: tuple[int, ...]
    """Per rank: memory less parameters, gradients, optimizer states and all else that lasts."""
    comm_s: float = 0.0
    """From the end of a pass to the arrival of what it sends on another rank."""

    def __post_init__(self) -> None:
        for key, length, wanted in (
            ("options", len(self.options), self.order.num_stages),
            ("budget_bytes", len(self.budget_bytes), self.order.num_ranks),
        ):
            if length != wanted:
                raise InputError(
                    source="micro-batch problem", key=key, value=None, rule=f"{wanted} entries must be given, but got {length}"
                )
        if any(not options for options in self.options):
            raise InputError(source="micro-batch problem", key="options", value=None, rule="a stage has at least one option")
        if any(not isinstance(cell, Action) for cells in self.order.ranks for cell in cells):
            rule = f"order {self.order.name} runs pairs of passes as one"
            raise InputError(
                source="micro-batch problem", key="order", value=None, rule=rule, remedy="give an order without overlap"
            )

    def passes(self, rank: int) -> Iterator[Action]:
        """What a rank runs, in its order."""
        for cell in self.order.ranks[rank]:
            assert isinstance(cell, Action)
            yield cell

    def arrays(self) -> OrderArrays:
        """The order as the kernels take it."""
        return order_arrays(self.order)


def pass_s(action: Action, option: PassOption) -> float:
    """Time of a pass under an option."""
    times = {"F": option.forward_s, "B": option.input_gradient_s, "W": option.weight_gradient_s}
    return times[action.kind] if action.kind in times else option.input_gradient_s + option.weight_gradient_s


def pass_bytes(action: Action, option: PassOption) -> tuple[int, int]:
    """Most bytes that a pass adds while it runs, and what it adds for good."""
    if action.kind == "F":
        return option.forward_peak_bytes, option.saved_bytes
    if action.kind == "B":
        return option.input_gradient_peak_bytes, option.weight_saved_bytes - option.saved_bytes
    if action.kind == "W":
        return option.weight_gradient_peak_bytes, -option.weight_saved_bytes
    after_b = option.weight_saved_bytes - option.saved_bytes + option.weight_gradient_peak_bytes
    return max(option.input_gradient_peak_bytes, after_b), -option.saved_bytes


def makespan_s(problem: MicrobatchProblem, choice: Choice, arrays: OrderArrays | None = None) -> float:
    """Time of a step, without regard to memory.

    Args:
        problem: order and options.
        choice: per stage and micro-batch.
        arrays: of the order, if they are at hand.
    """
    arrays = arrays or problem.arrays()
    duration = [
        pass_s(action, problem.options[action.stage][choice[action.stage][action.micro_batch]])
        for rank in range(problem.order.num_ranks)
        for action in problem.passes(rank)
    ]
    _, end, _ = play_cells(*arrays, np.array(duration, dtype=np.float64), float(problem.comm_s))
    return float(end.max())


def peak_bytes(problem: MicrobatchProblem, choice: Choice) -> tuple[int, ...]:
    """Per rank, the most it holds."""
    peaks = []
    for rank in range(problem.order.num_ranks):
        held = peak = 0
        for action in problem.passes(rank):
            during, after = pass_bytes(action, problem.options[action.stage][choice[action.stage][action.micro_batch]])
            peak, held = max(peak, held + during, held + after), held + after
        peaks.append(peak)
    return tuple(peaks)
