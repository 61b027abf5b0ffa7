"""Compiled search over labels: rematerialization and activation offload of a chain."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np
from numba import njit

from search.chain_kernels import ChainArrays, Floats, Ints, row_of

SEGMENT = -1
"""Option of a step that runs stages without graphs."""


class LinkArrays(NamedTuple):
    """What the link between device and host moves beside each run."""

    out_bytes_per_s: float
    in_bytes_per_s: float
    discard_out_bytes: Floats
    """[stages], sent while a stage runs forward without a graph."""
    option_out_bytes: Floats
    """[stages, options], sent while it runs forward with one."""
    option_in_bytes: Floats
    """[stages, options], brought in while it runs backward."""
    in_busy_s: Floats
    """[stages], how long the link brings in something else while a stage runs backward."""


class SegmentTimes(NamedTuple):
    """Least times of the recompute and backward passes of every stretch of stages."""

    slot_bytes: int
    credit_slots: int
    """Slots given for free: 0 for answers, the rounding of sizes for a bound."""
    need: Ints
    """[states]"""
    times_s: Floats
    """[states, slots + 1]"""


class Task(NamedTuple):
    """All that the search is given."""

    chain: ChainArrays
    link: LinkArrays
    segments: SegmentTimes
    limit_bytes: int
    """Memory, boundary 0 included."""
    known_s: float
    """Time of a known answer; labels that cannot beat it go."""
    rounding_slots: int
    """By how many slots the table may overstate what the stages from one on need together."""
    forward_rest_s: Floats
    """[stages + 1], no less is the time of the forward passes from a stage on."""
    backward_rest_s: Floats
    """[stages + 1], likewise backward."""


class Label(NamedTuple):
    """A partial schedule that has decided upon the stages below one, and how it came about."""

    time_s: float
    bound_s: float
    """No schedule that begins so is faster."""
    score_s: float
    """A guess at the fastest that begins so."""
    kept_bytes: int
    out_bytes: float
    """Offloaded bytes that are still on the device when the forward pass has come so far."""
    in_bytes: float
    """Offloaded bytes that are on the device again when the backward pass has come so far."""
    pinned_bytes: int
    """Of these, the input of the stage that follows."""
    stage: int
    """First stage of the last step."""
    parent: int
    """Label of that stage that it extends."""
    option: int
    """Of the last step; `SEGMENT` for a run without graphs."""
    slots: int
    """Memory of a segment's recompute and backward."""
    offloaded: int
    """1 where the last step's item goes to the host."""


class Labels(NamedTuple):
    """Labels of every stage: the fields of `Label` as arrays [stages + 1, labels]."""

    num_labels: Ints
    """[stages + 1]"""
    time_s: Floats
    bound_s: Floats
    score_s: Floats
    kept_bytes: Ints
    out_bytes: Floats
    in_bytes: Floats
    pinned_bytes: Ints
    stage: Ints
    parent: Ints
    option: Ints
    slots: Ints
    offloaded: Ints


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _room_for(stages: int, most: int) -> Labels:
    size = (stages + 1, most)
    return Labels(
        np.zeros(stages + 1, np.int64), np.empty(size), np.empty(size), np.empty(size), np.empty(size, np.int64), np.empty(size), np.empty(size),
        np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64), np.empty(size, np.int64),
        np.empty(size, np.int64), np.empty(size, np.int64),
    )  # fmt: skip


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def read_label(labels: Labels, at: int, number: int) -> Label:
    """A label of stage ``at``."""
    return Label(
        labels.time_s[at, number], labels.bound_s[at, number], labels.score_s[at, number], labels.kept_bytes[at, number], labels.out_bytes[at, number],
        labels.in_bytes[at, number], labels.pinned_bytes[at, number], labels.stage[at, number], labels.parent[at, number], labels.option[at, number],
        labels.slots[at, number], labels.offloaded[at, number],
    )  # fmt: skip


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _write(labels: Labels, at: int, number: int, label: Label) -> None:
    labels.time_s[at, number], labels.bound_s[at, number] = label.time_s, label.bound_s
    labels.score_s[at, number], labels.kept_bytes[at, number] = label.score_s, label.kept_bytes
    labels.out_bytes[at, number], labels.in_bytes[at, number] = label.out_bytes, label.in_bytes
    labels.pinned_bytes[at, number], labels.stage[at, number] = label.pinned_bytes, label.stage
    labels.parent[at, number], labels.option[at, number] = label.parent, label.option
    labels.slots[at, number], labels.offloaded[at, number] = label.slots, label.offloaded


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _as_good(link: LinkArrays, label: Label, other: Label) -> bool:
    """Whether ``label``, after waiting for its transfers where it lags behind, leads to all that ``other`` leads to."""
    if label.kept_bytes > other.kept_bytes or label.pinned_bytes > other.pinned_bytes:
        return False
    wait_s = max(0.0, label.out_bytes - other.out_bytes) / link.out_bytes_per_s
    wait_s += max(0.0, label.in_bytes - other.in_bytes) / link.in_bytes_per_s
    return bool(label.time_s + wait_s <= other.time_s)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _least_rest_s(task: Task, at: int, label: Label) -> float:
    """No less is the time of the stages from ``at`` on, among them the label's transfers.

    If X bytes more are offloaded, the stages could also keep those with X bytes more memory, and the link must move X both
    ways: rest >= min over X of max(T(limit - kept + X), max(forward, (out + X) / rate) + max(backward, (in + X) / rate)).
    """
    segments, link, stages = task.segments, task.link, task.chain.discard_s.shape[0]
    if at == stages:
        return float(label.out_bytes / link.out_bytes_per_s + label.in_bytes / link.in_bytes_per_s)
    times_s = segments.times_s[row_of(at, stages - 1, stages)]
    last = times_s.shape[0] - 1
    now = max(0, (task.limit_bytes - label.kept_bytes) // segments.slot_bytes) + 1 + task.rounding_slots
    if now >= last:
        return float(max(times_s[last], _moving_s(task, at, label, 0)))
    least, most = now, last
    while least < most:
        middle = (least + most) // 2
        if times_s[middle] <= _moving_s(task, at, label, (middle - now) * segments.slot_bytes):
            most = middle
        else:
            least = middle + 1
    moving_s = _moving_s(task, at, label, (least - now) * segments.slot_bytes)
    before_s = times_s[least - 1] if least > now else np.inf
    return float(max(times_s[last], min(moving_s, before_s)))


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _moving_s(task: Task, at: int, label: Label, more_bytes: int) -> float:
    """Least time of the rest if so many bytes more are offloaded."""
    out_s = (label.out_bytes + more_bytes) / task.link.out_bytes_per_s
    in_s = (label.in_bytes + more_bytes) / task.link.in_bytes_per_s
    return float(max(task.forward_rest_s[at], out_s) + max(task.backward_rest_s[at], in_s))


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _score(task: Task, at: int, label: Label, bound_s: float) -> float:
    """Between the bound and the time if nothing more is offloaded; where that does not fit, as if each stage ran twice."""
    segments, stages = task.segments, task.chain.discard_s.shape[0]
    if at == stages:
        return float(bound_s)
    row, last = row_of(at, stages - 1, stages), segments.times_s.shape[1] - 1
    slots = min((task.limit_bytes - label.kept_bytes) // segments.slot_bytes, last)
    twice_s = 2 * task.forward_rest_s[at] + task.backward_rest_s[at]
    alone_s = segments.times_s[row, slots] if slots >= segments.need[row] else twice_s
    moved_s = label.out_bytes / task.link.out_bytes_per_s + label.in_bytes / task.link.in_bytes_per_s
    return float((bound_s + label.time_s + max(alone_s, moved_s)) / 2)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _insert(task: Task, labels: Labels, at: int, label: Label) -> float:
    """Adds a label unless another is as good; bound of the label dropped for want of room, else inf."""
    bound_s = label.time_s + _least_rest_s(task, at, label)
    if bound_s >= task.known_s:
        return np.inf
    slot, count = 0, labels.num_labels[at]
    while slot < count:
        known = read_label(labels, at, slot)
        if _as_good(task.link, known, label):
            return np.inf
        if _as_good(task.link, label, known):
            count -= 1
            _write(labels, at, slot, read_label(labels, at, count))
        else:
            slot += 1
    labels.num_labels[at] = count
    score_s = _score(task, at, label, bound_s)
    if count < labels.time_s.shape[1]:
        _write(labels, at, count, label)
        labels.bound_s[at, count], labels.score_s[at, count] = bound_s, score_s
        labels.num_labels[at] = count + 1
        return np.inf
    worst = int(np.argmax(labels.score_s[at]))
    if labels.score_s[at, worst] <= score_s:
        return float(bound_s)
    dropped_s = labels.bound_s[at, worst]
    _write(labels, at, worst, label)
    labels.bound_s[at, worst], labels.score_s[at, worst] = bound_s, score_s
    return float(dropped_s)


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _leave(task: Task, labels: Labels, at: int, label: Label, item_bytes: int) -> float:
    """Adds both ends of a step up to stage ``at``: its item is kept, or offloaded."""
    kept = Label(
        label.time_s, 0.0, 0.0, label.kept_bytes + item_bytes, label.out_bytes, label.in_bytes, 0, label.stage, label.parent, label.option,
        label.slots, 0,
    )  # fmt: skip
    sent = Label(
        label.time_s, 0.0, 0.0, label.kept_bytes, label.out_bytes + item_bytes, label.in_bytes + item_bytes, task.chain.boundary_bytes[at],
        label.stage, label.parent, label.option, label.slots, 1,
    )  # fmt: skip
    return float(min(_insert(task, labels, at, kept), _insert(task, labels, at, sent)))


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _extend_by_graph(task: Task, labels: Labels, stage: int, number: int) -> float:
    """Runs ``stage`` with a graph under each option; least time of a dropped label."""
    chain, link, label, bound_s = task.chain, task.link, read_label(labels, stage, number), np.inf
    free_bytes = task.limit_bytes - label.kept_bytes
    for option in range(chain.num_options[stage]):
        forward_room = free_bytes - chain.held_bytes[-1] - chain.forward_peak_bytes[stage, option]
        backward_room = free_bytes - chain.backward_need_bytes[stage, option]
        if min(forward_room, backward_room) < label.pinned_bytes:
            continue
        wait_out, wait_in = max(0.0, label.out_bytes - forward_room), max(0.0, label.in_bytes - backward_room)
        time_s = label.time_s + chain.option_s[stage, option] + wait_out / link.out_bytes_per_s + wait_in / link.in_bytes_per_s
        out_bytes = max(0.0, label.out_bytes - wait_out - link.option_out_bytes[stage, option])
        in_bytes = max(0.0, label.in_bytes - wait_in - link.option_in_bytes[stage, option])
        step = Label(time_s, 0.0, 0.0, label.kept_bytes, out_bytes, in_bytes, 0, stage, number, option, 0, 0)
        bound_s = min(bound_s, _leave(task, labels, stage + 1, step, chain.saved_bytes[stage, option]))
    return bound_s


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _segment_choice(
    segments: SegmentTimes, row: int, room_bytes: int, free_bytes: int, in_bytes: float, rate: float
) -> tuple[float, float, int]:
    """Seconds of recompute and backward, bytes waited for before, and slots, of least total time; inf seconds where nothing fits.

    Args:
        segments: least times.
        row: state of the segment.
        room_bytes: most that the segment may take.
        free_bytes: memory for the segment and for what is brought in beside it.
        in_bytes: what must be there at its end.
        rate: of the link.
    """
    last = segments.times_s.shape[1] - 1
    slots = min(room_bytes // segments.slot_bytes, last)
    best_s, best_wait, best_slots = np.inf, 0.0, 0
    while slots >= 0 and slots + segments.credit_slots >= segments.need[row]:
        own_s = segments.times_s[row, min(slots + segments.credit_slots, last)]
        wait = max(0.0, in_bytes - (free_bytes - slots * segments.slot_bytes))
        if own_s + wait / rate < best_s + best_wait / rate:
            best_s, best_wait, best_slots = own_s, wait, slots
        if wait == 0.0:
            break
        slots -= 1
    return best_s, best_wait, best_slots


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def _extend_by_segments(task: Task, labels: Labels, stage: int, number: int) -> float:
    """Runs the stages from ``stage`` up to each later one without graphs; least time of a dropped label."""
    chain, link, segments, stages = task.chain, task.link, task.segments, task.chain.discard_s.shape[0]
    label, bound_s = read_label(labels, stage, number), np.inf
    free_bytes = task.limit_bytes - label.kept_bytes
    forward_s, out_bytes, busy_s = 0.0, label.out_bytes, 0.0
    for stop in range(stage + 1, stages):
        last = stop - 1
        own_input = label.pinned_bytes if last == stage else 0
        beneath = 0 if last == stage else chain.boundary_bytes[last]
        room = free_bytes - chain.held_bytes[-1] - chain.discard_peak_bytes[last] - beneath
        if room < own_input:
            break
        wait_out = max(0.0, out_bytes - room)
        forward_s += chain.discard_s[last] + wait_out / link.out_bytes_per_s
        out_bytes = max(0.0, out_bytes - wait_out - link.discard_out_bytes[last])
        busy_s += link.in_busy_s[last]
        row = row_of(stage, last, stages)
        own_s, wait_in, slots = _segment_choice(
            segments, row, free_bytes - label.pinned_bytes, free_bytes, label.in_bytes, link.in_bytes_per_s
        )
        if own_s == np.inf:
            continue
        in_bytes = max(0.0, label.in_bytes - wait_in - max(0.0, own_s - busy_s) * link.in_bytes_per_s)
        time_s = label.time_s + forward_s + own_s + wait_in / link.in_bytes_per_s
        step = Label(time_s, 0.0, 0.0, label.kept_bytes, out_bytes, in_bytes, 0, stage, number, SEGMENT, slots, 0)
        bound_s = min(bound_s, _leave(task, labels, stop, step, chain.boundary_bytes[stop]))
    return bound_s


@njit(cache=True)  # type: ignore[untyped-decorator]  # numba's decorators carry no types
def search_labels(task: Task, most: int) -> tuple[Labels, float]:
    """Labels of every stage, at most ``most`` of each, and a time that no dropped label can lead below."""
    stages, bound_s = task.chain.discard_s.shape[0], np.inf
    labels = _room_for(stages, most)
    _write(labels, 0, 0, Label(0.0, 0.0, 0.0, task.chain.boundary_bytes[0], 0.0, 0.0, 0, -1, -1, 0, 0, 0))
    labels.num_labels[0] = 1
    for stage in range(stages):
        for number in range(labels.num_labels[stage]):
            bound_s = min(bound_s, _extend_by_graph(task, labels, stage, number))
            bound_s = min(bound_s, _extend_by_segments(task, labels, stage, number))
    return labels, bound_s
