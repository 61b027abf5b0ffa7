"""What a rank does before its first and after its last pass -> templates: late updates, gradients that did not overlap, the optimizer's step."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from simulator.parallel.offload import HostUpdate, Offload
from simulator.parallel.offload_step import HostTraffic
from simulator.parallel.optimizer_step import GradientCheck
from simulator.parallel.pass_template import Holding
from simulator.parallel.template import Outside, Template, TemplateWriter, outside
from simulator.program import Kind, Stream

_PREVIOUS = outside(Outside.PREVIOUS)
_NO_PASS = -1
"""Stage of what belongs to the step, not to a pass."""


@dataclass(frozen=True, slots=True, kw_only=True)
class RankEnd:
    """What ends a rank's step."""

    holdings: tuple[tuple[int, Holding], ...]
    """Stages of the rank, ascending, and what it holds of each."""
    optimizer_s: float
    tied_s: float = 0.0
    """All-reduce of a table that this rank shares with others; 0: it does not."""
    tied_ranks: tuple[int, ...] = ()
    """The ranks that share it."""
    check: GradientCheck | None = None
    """What is done to gradients before the optimizer steps."""
    load_s: float = 0.0
    """Copy of the first micro-batch, which the first pass waits for."""
    rank: int = 0
    num_ranks: int = 1
    offload: Offload | None = None
    update: HostUpdate | None = None
    """Of the rank, on the host."""
    returned_bytes: float = 0.0
    """Parameters that the device updates and that live on the host."""
    sent: int = 0
    """Transfers of gradients that the rank's passes have issued."""


def beginning(end: RankEnd) -> Template:
    """The copy of the batch, and a late update with the gradients of the step before."""
    writer = TemplateWriter()
    exits: tuple[int, ...] = ()
    if end.load_s > 0.0:
        exits = (writer.issue(Kind.TRANSFER, Stream.HOST, end.load_s, label="batch", stage=_NO_PASS),)
    if end.offload and end.update:
        HostTraffic(writer, end.offload).late_update(end.update, _num_chunks(end))
    return writer.template(exits=exits)


def late_parts(end: RankEnd) -> range:
    """Which instructions of its `beginning` update parameters."""
    first = int(end.load_s > 0.0)
    return range(first, len(beginning(end).instructions))


def _num_chunks(end: RankEnd) -> int:
    return sum(held.sync.chunks for _, held in end.holdings)


def ending(end: RankEnd, *, late: range) -> Template:
    """Gradients are reduced, a tied table's too, then the optimizer steps and parameters are gathered.

    Args:
        end: of the rank.
        late: instructions of its `beginning` that update parameters.
    """
    writer = TemplateWriter()
    host = HostTraffic(writer, end.offload) if end.offload else None
    _reduce(writer, host, end.holdings)
    after: tuple[int, ...] = (_PREVIOUS,)
    if end.tied_s > 0.0:
        others = (outside(Outside.LAST_OF_RANK, rank) for rank in end.tied_ranks)
        after = (writer.issue(Kind.TRANSFER, Stream.DP, end.tied_s, after=(*after, *others), label="tied", stage=_NO_PASS),)
    elif any(held.sync.reduce_s > 0.0 for _, held in end.holdings):
        after = (*after, writer.issue(Kind.TRANSFER, Stream.DP, 0.0, after=after, label="reduced", stage=_NO_PASS))
    read, after = _check(writer, end, after)
    step = writer.issue(Kind.OPTIMIZER, Stream.COMPUTE, end.optimizer_s, after=after, stage=_NO_PASS)
    if host and end.update:
        step = host.update(end.update, after, step, late=late, sent=end.sent + len(writer.sent))
    if host:
        host.give_back(end.returned_bytes, step)
    gather_s = sum(held.sync.gather_s for _, held in end.holdings if not held.sync.gather_overlaps)
    if gather_s > 0.0:
        writer.issue(Kind.TRANSFER, Stream.DP, gather_s, after=(step,), label="gather", stage=_NO_PASS)
    return writer.template(exits=read)


def _check(writer: TemplateWriter, end: RankEnd, after: tuple[int, ...]) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Gradients are looked through, and ranks agree on what they found: the look that others wait for, and what the optimizer waits for."""
    check = end.check
    if check is None:
        return (), after
    read = writer.issue(Kind.OPTIMIZER, Stream.COMPUTE, check.read_s[end.rank], after=after, label="norm", stage=_NO_PASS)
    if check.agree_s <= 0.0:
        return (read,), (read,)
    looks = (outside(Outside.END_OF_RANK, rank) for rank in range(end.num_ranks))
    agreed = writer.issue(Kind.TRANSFER, Stream.DP, check.agree_s, after=(read, *looks), label="norm", stage=_NO_PASS)
    return (read,), (agreed,) if check.waits else (read,)


def _reduce(writer: TemplateWriter, host: HostTraffic | None, holdings: Sequence[tuple[int, Holding]]) -> None:
    """Gradients that go when the rank's last pass is over."""
    for stage, held in holdings:
        if held.sync.reduce_overlaps:
            continue
        ready = _PREVIOUS
        if held.sync.reduce_s > 0.0:
            ready = writer.issue(Kind.TRANSFER, Stream.DP, held.sync.reduce_s, after=(ready,), label="reduce", stage=stage)
        if host:
            assert not held.each_bytes, "gradients that go after every micro-batch overlap"
            host.gradients(held.each_bytes, held.down_bytes, 1, ready, ready, first=True, last=True)
