"""OffloadProblem: rematerialization of a chain whose kept activations may wait on the host, in seconds and bytes."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise

from hardware_models.errors import InputError
from search.chain_problem import ChainProblem
from search.chain_schedules import evaluate
from simulator.sequence import Operation


@dataclass(frozen=True, slots=True, kw_only=True)
class HostLink:
    """The link between a device and its host; both directions work at once and beside compute."""

    out_bytes_per_s: float
    """From the device to the host."""
    in_bytes_per_s: float
    """From the host to the device."""

    def __post_init__(self) -> None:
        for key in ("out_bytes_per_s", "in_bytes_per_s"):
            value = getattr(self, key)
            if not (value > 0 and math.isfinite(value)):
                raise InputError(source="host link", key=key, value=value, rule="0 < rate < inf must hold")


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadProblem:
    """A chain, a link, and what the link is already needed for.

    A schedule is a list of steps from stage 0 up (`OffloadStep`). A step runs one stage with a graph, and leaves the item
    ``saved_bytes``; or it runs a segment of stages without graphs, and leaves the boundary at its end; the segment is recomputed
    when the stages above have run backward, by a sequence of its own within a constant amount of memory. Each item is kept on the
    device or goes to the host and comes back.

    Model:
        Forward, K bytes are kept and D, offloaded, still wait for the link. A run that needs n bytes begins once K + D + n <= limit;
        until then the link sends. Beside a run of duration t it sends ``out_bytes_per_s * (t - out_busy_s)``, which the run's
        end releases; then the step's item joins K or D. n is what `ChainProblem` says, with held(L - 1).
        Backward is the same read from its end: E bytes of items below must have come back when a step's backward pass ends;
        K + E + n <= limit, beside it ``in_bytes_per_s * (t - in_busy_s)`` come in, the wait lies behind it; its own item, if
        offloaded, must be back before. The input of a step cannot be on its way: K + input + n <= limit.
        At the turn, what still waits is sent and brought back: D / out rate + E / in rate.

    Source:
        Beaumont, Eyraud-Dubois, Shilova, "Efficient combination of rematerialization and offloading for training DNNs" (POFO,
        NeurIPS 2021): states (stage, kept bytes, forward backlog, backward backlog), order out first in first out. Ours: several options
        a stage, both rates, the pinned input, other traffic, an exact choice of each segment's constant memory.

    Not modelled:
        Offloading inside a segment; sending an item ahead of an older one; a copy that stays on the device although the host has one;
        what copies slow down.
    """

    chain: ChainProblem
    link: HostLink
    out_busy_s: tuple[float, ...] = ()
    """Per stage, how long the link sends other things while it runs forward; empty: never."""
    in_busy_s: tuple[float, ...] = ()
    """Per stage, how long the link brings in other things while it runs backward; empty: never."""

    def __post_init__(self) -> None:
        for key in ("out_busy_s", "in_busy_s"):
            values = getattr(self, key)
            if values and len(values) != self.chain.num_stages:
                rule = f"one value per stage must be given, but got {len(values)} for {self.chain.num_stages} stages"
                raise InputError(source="offload problem", key=key, value=None, rule=rule)
            if any(not (value >= 0 and math.isfinite(value)) for value in values):
                raise InputError(source="offload problem", key=key, value=values, rule="0 <= value < inf must hold")

    def busy_s(self, direction: str) -> tuple[float, ...]:
        """Per stage, the link's other work; ``direction`` is ``out`` or ``in``."""
        values: tuple[float, ...] = self.out_busy_s if direction == "out" else self.in_busy_s
        return values or (0.0,) * self.chain.num_stages


@dataclass(frozen=True, slots=True, kw_only=True)
class OffloadStep:
    """One step of the forward pass, and how its backward pass is made."""

    first: int
    """First stage."""
    stop: int
    """Stage after the last."""
    option: str
    """Of a stage that runs with a graph; empty for a segment."""
    offloaded: bool
    """Whether the item it leaves goes to the host."""
    recompute: tuple[Operation, ...] = ()
    """A segment's sequence from its kept input to its last backward pass."""
    recompute_bytes: int = 0
    """Constant memory set aside for that, beyond its input."""


def segment_cost(problem: ChainProblem, operations: Sequence[Operation], first: int, stop: int) -> tuple[float, int]:
    """Seconds and peak bytes, beyond its input, of a segment's recompute and backward passes.

    Raises:
        InputError: the sequence does not run the stages first..stop-1.
    """
    part = stretch_of(problem, first, stop)
    moved = [Operation(kind, stage - first, option) for kind, stage, option in operations]
    time_s, peak_bytes = evaluate(part, moved)
    return time_s, peak_bytes - part.boundary_bytes[0]


def stretch_of(problem: ChainProblem, first: int, stop: int) -> ChainProblem:
    """The chain of the stages first..stop-1 alone, with the lasting bytes and gradients of the whole."""
    return ChainProblem(
        discard_s=problem.discard_s[first:stop],
        discard_peak_bytes=problem.discard_peak_bytes[first:stop],
        boundary_bytes=problem.boundary_bytes[first : stop + 1],
        boundary_gradient_bytes=problem.boundary_gradient_bytes[first : stop + 1],
        resident_bytes=problem.resident_bytes[first:stop],
        option_names=problem.option_names[first:stop],
        forward_s=problem.forward_s[first:stop],
        backward_s=problem.backward_s[first:stop],
        saved_bytes=problem.saved_bytes[first:stop],
        forward_peak_bytes=problem.forward_peak_bytes[first:stop],
        backward_peak_bytes=problem.backward_peak_bytes[first:stop],
        source=problem.source,
    )


@dataclass(frozen=True, slots=True, kw_only=True)
class _Run:
    """A run of the compute stream during which the link works in one direction."""

    duration_s: float
    need_bytes: int
    busy_s: float
    pinned_bytes: int


def evaluate_offload(problem: OffloadProblem, steps: Sequence[OffloadStep], limit_bytes: int) -> float:
    """Time of a schedule within a limit; inf where it does not fit.

    Args:
        problem: chain and link.
        steps: from stage 0 to the last.
        limit_bytes: memory, boundary 0 included.

    Raises:
        InputError: steps do not follow one another from stage 0 to the end.
    """
    ends = [0, *(step.stop for step in steps)]
    if (
        [step.first for step in steps] != ends[:-1]
        or ends[-1] != problem.chain.num_stages
        or any(a >= b for a, b in pairwise(ends))
    ):
        rule = f"steps must follow one another from stage 0 to {problem.chain.num_stages}, but end at {ends[1:]}"
        raise InputError(source="offload schedule", key="steps", value=None, rule=rule)
    forward = _one_way(problem, steps, limit_bytes, problem.link.out_bytes_per_s, [_forward_runs(problem, s) for s in steps])
    backward = _one_way(problem, steps, limit_bytes, problem.link.in_bytes_per_s, [_backward_runs(problem, s) for s in steps])
    return forward + backward


def _one_way(
    problem: OffloadProblem, steps: Sequence[OffloadStep], limit_bytes: int, rate: float, runs: Sequence[Sequence[_Run]]
) -> float:
    """Time of the forward pass, or of the backward pass from its end to its begin."""
    kept, waiting, pinned, seconds = problem.chain.boundary_bytes[0], 0.0, 0, [0.0]
    for step, own in zip(steps, runs, strict=True):
        for run in own:
            room = limit_bytes - kept - run.need_bytes
            if room < (pinned if run.pinned_bytes else 0):
                return math.inf
            wait = max(0.0, waiting - room)
            waiting = max(0.0, waiting - wait - max(0.0, run.duration_s - run.busy_s) * rate)
            seconds += [run.duration_s, wait / rate]
        item = problem.chain.boundary_bytes[step.stop] if not step.option else _saved(problem.chain, step)
        kept, waiting = (kept, waiting + item) if step.offloaded else (kept + item, waiting)
        pinned = problem.chain.boundary_bytes[step.stop] if step.offloaded else 0
    return math.fsum([*seconds, waiting / rate])


def _saved(chain: ChainProblem, step: OffloadStep) -> int:
    return chain.saved_bytes[step.first][chain.option_names[step.first].index(step.option)]


def _forward_runs(problem: OffloadProblem, step: OffloadStep) -> list[_Run]:
    chain, held, busy = problem.chain, problem.chain.held_bytes(problem.chain.num_stages - 1), problem.busy_s("out")
    if step.option:
        option = chain.option_names[step.first].index(step.option)
        need = held + chain.forward_peak_bytes[step.first][option]
        return [_Run(duration_s=chain.forward_s[step.first][option], need_bytes=need, busy_s=busy[step.first], pinned_bytes=1)]
    runs = []
    for stage in range(step.first, step.stop):
        beneath = chain.boundary_bytes[stage] if stage > step.first else 0
        need = held + beneath + chain.discard_peak_bytes[stage]
        own_input = int(stage == step.first)
        runs.append(_Run(duration_s=chain.discard_s[stage], need_bytes=need, busy_s=busy[stage], pinned_bytes=own_input))
    return runs


def _backward_runs(problem: OffloadProblem, step: OffloadStep) -> list[_Run]:
    chain, busy = problem.chain, math.fsum(problem.busy_s("in")[step.first : step.stop])
    if step.option:
        option = chain.option_names[step.first].index(step.option)
        need = chain.resident_bytes[step.first] + chain.backward_peak_bytes[step.first][option]
        return [_Run(duration_s=chain.backward_s[step.first][option], need_bytes=need, busy_s=busy, pinned_bytes=1)]
    time_s, peak_bytes = segment_cost(chain, step.recompute, step.first, step.stop)
    need = max(peak_bytes, step.recompute_bytes)
    return [_Run(duration_s=time_s, need_bytes=need, busy_s=busy, pinned_bytes=1)]
