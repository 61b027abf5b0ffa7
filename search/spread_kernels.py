"""Compiled kernel of `search.stage_recompute`: which of its ways each stage of a rank takes, where they share the rank's memory."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
import numpy.typing as npt
from numba import njit

from search.chain_kernels import Floats, Ints


class Ways(NamedTuple):
    """Ways of each stage of a rank to run, fastest first."""

    num: Ints
    """[stages], how many are valid."""
    seconds: Floats
    """[stages, ways]"""
    kept_bytes: Floats
    """[stages, ways], by a micro-batch between its passes."""
    forward_bytes: Floats
    """[stages, ways], most that the forward pass adds."""
    backward_bytes: Floats
    """[stages, ways], most that the backward pass adds."""


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def peaks_of(ways: Ways, chosen: Ints, held: Floats, running: Ints, backward: npt.NDArray[np.bool_]) -> Floats:
    """Bytes [moments] of activations."""
    moments, stages = held.shape
    peaks = np.zeros(moments)
    for moment in range(moments):
        own = running[moment]
        rise = ways.backward_bytes[own, chosen[own]] if backward[moment] else ways.forward_bytes[own, chosen[own]]
        for stage in range(stages):
            rise += held[moment, stage] * ways.kept_bytes[stage, chosen[stage]]
        peaks[moment] = rise
    return peaks


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _cheapest_step(
    ways: Ways, chosen: Ints, held: Floats, is_running: int, is_backward: bool, excess: float
) -> tuple[int, int]:
    """Stage and slower way whose step costs the fewest seconds for each byte of an excess at one moment; -1 where none frees any."""
    best_stage, best_way, best_rate = -1, -1, np.inf
    rises = ways.backward_bytes if is_backward else ways.forward_bytes
    for stage in range(ways.num.size):
        now = chosen[stage]
        for way in range(now + 1, ways.num[stage]):
            freed = held[stage] * (ways.kept_bytes[stage, now] - ways.kept_bytes[stage, way])
            if is_running == stage:
                freed += rises[stage, now] - rises[stage, way]
            if freed > 0.0:
                rate = (ways.seconds[stage, way] - ways.seconds[stage, now]) / min(freed, excess)
                if rate < best_rate:
                    best_stage, best_way, best_rate = stage, way, rate
    return best_stage, best_way


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _change(ways: Ways, stage: int, now: int, way: int, held: float, is_running: bool, is_backward: bool) -> float:
    """Bytes that a moment has more with another way of a stage."""
    found = held * (ways.kept_bytes[stage, way] - ways.kept_bytes[stage, now])
    if is_running:
        rises = ways.backward_bytes if is_backward else ways.forward_bytes
        found += rises[stage, way] - rises[stage, now]
    return float(found)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _take(
    ways: Ways, chosen: Ints, stage: int, way: int, peaks: Floats, held: Floats, running: Ints, backward: npt.NDArray[np.bool_]
) -> None:
    """Changes a stage's way, and what the moments have by it."""
    for moment in range(peaks.size):
        peaks[moment] += _change(
            ways, stage, chosen[stage], way, held[moment, stage], running[moment] == stage, backward[moment]
        )
    chosen[stage] = way


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _best_return(
    ways: Ways, chosen: Ints, peaks: Floats, held: Floats, running: Ints, backward: npt.NDArray[np.bool_], room_bytes: float
) -> tuple[int, int]:
    """Stage and faster way that still fits and saves most; -1 where none does."""
    best_stage, best_way, best_s = -1, -1, 0.0
    for stage in range(ways.num.size):
        now = chosen[stage]
        for way in range(now):
            saved_s = ways.seconds[stage, now] - ways.seconds[stage, way]
            if saved_s <= best_s:
                continue
            fits = True
            for moment in range(peaks.size):
                more = _change(ways, stage, now, way, held[moment, stage], running[moment] == stage, backward[moment])
                if peaks[moment] + more > room_bytes:
                    fits = False
                    break
            if fits:
                best_stage, best_way, best_s = stage, way, saved_s
    return best_stage, best_way


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _fit_down(
    ways: Ways, chosen: Ints, peaks: Floats, held: Floats, running: Ints, backward: npt.NDArray[np.bool_], room_bytes: float
) -> bool:
    """Steps to slower ways until all fits; whether it does."""
    while True:
        moment = int(np.argmax(peaks))
        excess = peaks[moment] - room_bytes
        if excess <= 0.0:
            return True
        stage, way = _cheapest_step(ways, chosen, held[moment], running[moment], backward[moment], excess)
        if stage < 0:
            return False
        _take(ways, chosen, stage, way, peaks, held, running, backward)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def spread_ways(
    ways: Ways, starts: Ints, held: Floats, running: Ints, backward: npt.NDArray[np.bool_], room_bytes: float
) -> Ints:
    """Ways that fit together, those of least time that were found; -1 first where none were.

    **Model**: from each start, the step to a slower way that costs the fewest seconds a byte at the highest moment, until all moments fit; then every step to a faster way that
    still fits, the one that saves most first.

    Args:
        ways: of each stage.
        starts: [starts, stages], ways to begin with.
        held: [moments, stages], as in `search.rank_moments.Moments`, as are the next two.
        running: [moments]
        backward: [moments]
        room_bytes: for activations.
    """
    best, best_s = np.full(starts.shape[1], -1, np.int64), np.inf
    for start in range(starts.shape[0]):
        chosen = starts[start].copy()
        peaks = peaks_of(ways, chosen, held, running, backward)
        if not _fit_down(ways, chosen, peaks, held, running, backward, room_bytes):
            continue
        while True:
            stage, way = _best_return(ways, chosen, peaks, held, running, backward, room_bytes)
            if stage < 0:
                break
            _take(ways, chosen, stage, way, peaks, held, running, backward)
        seconds = 0.0
        for stage in range(chosen.size):
            seconds += ways.seconds[stage, chosen[stage]]
        if seconds < best_s:
            best, best_s = chosen, seconds
    return best
