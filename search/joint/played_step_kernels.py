"""Compiled part of a point's refined bound: its order in time with the traffic of data parallelism, both slower beside each other."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit
from numpy.typing import NDArray

Floats = NDArray[np.float64]
Ints = NDArray[np.int64]
FORWARD, INPUT_GRADIENT, WEIGHT_GRADIENT, FULL_BACKWARD = 0, 1, 2, 3
"""As `simulator.pipeline.order_arrays.KIND_CODES`."""
AHEAD = 2
"""Chunks by which what a chunk takes from the host may come ahead; `simulator.parallel.offload.STAGED_CHUNKS`."""
_NOT_YET = -1.0


class Passes(NamedTuple):
    """Of an order, rank after rank."""

    first: Ints
    """[ranks + 1], where each rank's passes begin."""
    stage: Ints
    """[passes], as all that follow."""
    kind: Ints
    micro_batch: Ints
    sends: NDArray[np.bool_]
    """Whether another rank takes the result."""
    opens: NDArray[np.bool_]
    """Whether it is the stage's first pass on the rank."""
    closes: NDArray[np.bool_]
    """Whether no later pass of the stage on the rank makes gradients."""
    rank_of: Ints
    """[stages, micro-batches]"""


class StageSeconds(NamedTuple):
    """Of a pass through a stage; shape (stages,)."""

    forward: Floats
    forward_compute: Floats
    """Of these, compute."""
    backward: Floats
    """In full."""
    backward_compute: Floats
    weight: Floats
    """Of the backward pass's compute, weights' gradients."""
    chunks: Ints
    """Buckets of gradients."""
    gather: Floats
    """Parameters, beside the first pass that needs them; under ZeRO 3 beside every one."""
    first: Floats
    """Of these, what a pass waits for; under ZeRO 3 of a forward pass, the next one of a backward pass."""
    first_back: Floats
    reduce: Floats
    """Gradients, all buckets, behind the last pass that makes them."""
    lead: Floats
    """Of the backward pass's compute, what comes before gradients are made."""


class Staged(NamedTuple):
    """Passes in chunks, beside which copies to and from the host travel. Seconds of each chunk in the order in which the pass runs them; shape (stages, chunks)."""

    num: Ints
    """Chunks of each stage; 0: its passes are not staged. Shape (stages,)."""
    forward: Floats
    """Compute, as the next two."""
    backward: Floats
    returned: Floats
    """Of a backward pass that leaves weights' gradients to another one."""
    leave: Floats
    """Activations on their way to the host, when a chunk has run forward."""
    come: Floats
    """The same on their way back, before it runs backward."""
    fetch: Floats
    """Parameters from the host, before a chunk runs forward."""
    again: Floats
    """The same before it runs backward."""


class Played(NamedTuple):
    """What came of playing an order; of each rank, in seconds."""

    begun: Floats
    """When it begins its first pass."""
    end: Floats
    """When it has run all and its gradients are reduced; infinite where the order is stuck."""
    turned: Floats
    """When it begins its first backward pass, and what its passes take from then on."""
    spoken: Floats
    """Of these, what they wait for besides compute."""
    traffic: Floats
    """That is asked for from then on, or was not done by then."""


class Slowdown(NamedTuple):
    """Times under overlap over times alone."""

    compute: float
    """Of compute beside traffic of data parallelism."""
    traffic: float
    """Of that traffic beside compute."""

    @property
    def price(self) -> float:
        """Seconds by which compute ends later for each second (alone) of traffic beside it; at most 1, as neither takes more than half of a device."""
        return self.traffic * (1.0 - 1.0 / self.compute)


@njit(cache=True)  # type: ignore[untyped-decorator]
def _together(compute_s: float, traffic_s: float, slowdown: Slowdown) -> tuple[float, float]:
    """Seconds until compute is over that begins beside traffic, and how much of the traffic is done by then."""
    both_s = min(compute_s * slowdown.compute, traffic_s * slowdown.traffic)
    return both_s + max(0.0, compute_s - both_s / slowdown.compute), both_s / slowdown.traffic


@njit(cache=True)  # type: ignore[untyped-decorator]
def _source(passes: Passes, rank: int, n: int, there: Floats, back: Floats) -> tuple[float, bool]:
    """When what a pass takes was made, and whether that was on another rank."""
    stage, kind, batch = passes.stage[n], passes.kind[n], passes.micro_batch[n]
    if kind == FORWARD:
        if stage == 0:
            return 0.0, False
        return there[stage - 1, batch], passes.rank_of[stage - 1, batch] != rank
    if kind == WEIGHT_GRADIENT:
        return back[stage, batch], False
    if stage == passes.rank_of.shape[0] - 1:
        return there[stage, batch], False
    return back[stage + 1, batch], passes.rank_of[stage + 1, batch] != rank


@njit(cache=True)  # type: ignore[untyped-decorator]
def _durations(seconds: StageSeconds, stage: int, kind: int) -> tuple[float, float]:
    """Compute of a pass, and what it waits for besides."""
    if kind == FORWARD:
        return seconds.forward_compute[stage], seconds.forward[stage] - seconds.forward_compute[stage]
    if kind == WEIGHT_GRADIENT:
        return seconds.weight[stage], 0.0
    less = seconds.weight[stage] if kind == INPUT_GRADIENT else 0.0
    return seconds.backward_compute[stage] - less, seconds.backward[stage] - seconds.backward_compute[stage]


@njit(cache=True)  # type: ignore[untyped-decorator]
def play_step(  # noqa: C901, PLR0912, PLR0915 - one loop over shared state; parts of it would pass ten arrays on
    passes: Passes, seconds: StageSeconds, staged: Staged, message_s: float, waits: bool, every: bool, each: bool, slowdown: Slowdown
) -> Played:  # fmt: skip
    """An order in time.

    **Model**: a pass begins when the rank is free and its input is there; one that gathers parameters also when the first of them have come, and it ends no sooner than the last ones have. Traffic of data
    parallelism goes one after the other on a rank; beside compute both are slower, beside what else a pass waits for and while the rank is idle it is as fast as alone. A bucket of gradients goes when it is made.
    Copies to the host go one after the other, and so do copies from there. A chunk that runs forward waits until all that has left the rank but for the last copy is on the host; what a chunk takes from the host comes at most
    two chunks ahead and not before the rank could begin the pass before this one, activations not before they have left.

    Args:
        passes: of the order.
        seconds: of passes; of staged ones what they wait for besides compute, and traffic.
        staged: passes in chunks.
        message_s: from the end of a pass to the arrival of its result on another rank.
        waits: whether a rank waits for its messages.
        every: ZeRO 3: each pass gathers parameters and each backward pass reduces gradients, in turn; else parameters are asked for at the step's start.
        each: gradients go bucket by bucket in every backward pass that reduces them, not only in the last one of a stage.
        slowdown: of compute and traffic beside each other.
    """
    ranks = len(passes.first) - 1
    stages, batches = passes.rank_of.shape
    done, free, begun = passes.first[:-1].copy(), np.zeros(ranks), np.zeros(ranks)
    clock, asked, came, wanted = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    # traffic of a rank in seconds alone: asked for, done by the time of the rank's clock, gathered for the passes so far
    left, left_before, arrived, called = np.zeros(ranks), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    # copies of a rank: when all have left, all but the last one; when all have come; when it could begin the pass before
    turned, worked, spoken, traffic = np.full(ranks, _NOT_YET), np.zeros(ranks), np.zeros(ranks), np.zeros(ranks)
    ran = np.zeros(staged.forward.shape[1])
    gone = np.zeros((stages, batches if staged.num.any() else 0, staged.forward.shape[1]))
    there, back = np.full((stages, batches), _NOT_YET), np.full((stages, batches), _NOT_YET)
    if not every:
        for rank in range(ranks):
            for n in range(passes.first[rank], passes.first[rank + 1]):
                if passes.opens[n]:
                    asked[rank] += seconds.gather[passes.stage[n]]
    moved = True
    while moved:
        moved = False
        for rank in range(ranks):
            while done[rank] < passes.first[rank + 1]:
                n = done[rank]
                stage, kind, batch = passes.stage[n], passes.kind[n], passes.micro_batch[n]
                source, other = _source(passes, rank, n, there, back)
                if source == _NOT_YET:
                    break
                begin = max(free[rank], source + (message_s if other else 0.0))
                called_before, called[rank] = called[rank], begin
                compute, waited = _durations(seconds, stage, kind)
                target = 0.0
                if (every and kind != WEIGHT_GRADIENT) or (not every and passes.opens[n] and seconds.gather[stage] > 0.0):
                    if every:  # asked for when the rank is free
                        came[rank] = min(asked[rank], came[rank] + free[rank] - clock[rank])
                        clock[rank] = free[rank]
                        wanted[rank] = asked[rank]
                        asked[rank] += seconds.gather[stage]
                        traffic[rank] += seconds.gather[stage]
                    ahead = wanted[rank] + (seconds.first[stage] if kind == FORWARD else seconds.first_back[stage])
                    wanted[rank] += seconds.gather[stage]
                    target = wanted[rank]
                    begin = max(begin, clock[rank] + max(0.0, ahead - came[rank]))
                if n == passes.first[rank]:
                    begun[rank] = begin
                turns = kind != FORWARD and turned[rank] == _NOT_YET
                if turns:
                    spoken[rank] = 0.0
                closes = passes.closes[n] and kind != FORWARD
                reduced = seconds.reduce[stage] if closes or (every and kind >= WEIGHT_GRADIENT) else 0.0
                buckets = seconds.chunks[stage] if kind == FULL_BACKWARD and (closes or each) else 1
                chunks = staged.num[stage] if kind != WEIGHT_GRADIENT else 0
                if chunks == 0:
                    came[rank] = min(asked[rank], came[rank] + begin - clock[rank])
                    clock[rank] = begin
                    if turns:
                        turned[rank], worked[rank], traffic[rank] = begin, 0.0, asked[rank] - came[rank]
                    worked[rank] += compute
                    lead = seconds.lead[stage] if kind == FULL_BACKWARD else 0.0
                    for part in range(buckets):
                        own = (compute - lead) / buckets + (lead if part == 0 else 0.0)
                        took, beside = _together(own, asked[rank] - came[rank], slowdown)
                        clock[rank] += took
                        came[rank] += beside
                        asked[rank] += reduced / buckets
                buckets = min(buckets, chunks)
                for turn in range(chunks):
                    sooner = called_before if turn < AHEAD else ran[turn - AHEAD]
                    if kind == FORWARD:
                        own, fetch = staged.forward[stage, turn], staged.fetch[stage, turn]
                        begin = max(begin, left_before[rank])
                    else:
                        own = staged.backward[stage, turn] if kind == FULL_BACKWARD else staged.returned[stage, turn]
                        fetch = staged.again[stage, turn]
                    if fetch > 0.0:
                        arrived[rank] = max(arrived[rank], sooner) + fetch
                        begin = max(begin, arrived[rank])
                    if kind != FORWARD and staged.come[stage, turn] > 0.0:
                        sooner = max(sooner, gone[stage, batch, chunks - 1 - turn])
                        arrived[rank] = max(arrived[rank], sooner) + staged.come[stage, turn]
                        begin = max(begin, arrived[rank])
                    begin = max(begin, clock[rank])
                    came[rank] = min(asked[rank], came[rank] + begin - clock[rank])
                    if turns and turn == 0:
                        turned[rank], worked[rank], traffic[rank] = begin, 0.0, asked[rank] - came[rank]
                    worked[rank] += own
                    took, beside = _together(own, asked[rank] - came[rank], slowdown)
                    clock[rank] = ran[turn] = begin + took
                    came[rank] += beside
                    if turn >= chunks - buckets:
                        asked[rank] += reduced / buckets
                    if kind == FORWARD and staged.leave[stage, turn] > 0.0:
                        left_before[rank] = left[rank]
                        left[rank] = gone[stage, batch, turn] = max(left[rank], clock[rank]) + staged.leave[stage, turn]
                worked[rank] += waited
                spoken[rank] += waited
                traffic[rank] += reduced
                made = clock[rank] + waited  # what another rank gets does not wait for gathered parameters
                end = max(made, clock[rank] + target - came[rank])
                came[rank] = min(asked[rank], came[rank] + end - clock[rank])
                clock[rank] = end
                free[rank] = end + (message_s if waits and passes.sends[n] else 0.0)
                if kind == FORWARD:
                    there[stage, batch] = made if passes.sends[n] else end
                elif kind != WEIGHT_GRADIENT:
                    back[stage, batch] = made if passes.sends[n] else end
                done[rank] += 1
                moved = True
    for rank in range(ranks):
        if done[rank] < passes.first[rank + 1]:
            free[rank] = np.inf
    return Played(begun, np.maximum(free, clock + asked - came), turned + worked, spoken, traffic)
