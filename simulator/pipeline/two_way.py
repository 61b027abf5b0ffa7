"""Orders in which micro-batches go two ways: Chimera, DualPipe and its V."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Literal

from simulator.pipeline.action import Action, Cell, Order, Overlap
from simulator.pipeline.rank_writer import RankWriter
from simulator.pipeline.sizes import check_sizes

ChimeraMode = Literal["direct", "doubling", "halving"]
HALVES = 2
"""Micro-batches that go forward together in Chimera's doubling; halves of a micro-batch that go backward apart in its halving."""


def chimera(num_ranks: int, num_microbatches: int, *, mode: ChimeraMode = "direct") -> Order:
    """Two 1F1B pipelines in opposite directions on the same ranks, each with half of the micro-batches; weights twice.

    Stage s of the micro-batches that go down is on rank s, of those that go up on rank p - 1 - s. More than p micro-batches come in units of
    p one after the other (``direct``), or forward passes run for two micro-batches at once, so that they take as long as a backward pass
    (``doubling``; holds twice the activations, or recomputes), or backward passes run for half a micro-batch (``halving``).

    **Model** (``direct``): m = p: m F + (m + p - 2) B, each rank holds p / 2 + 1 (the ends) to p (the middle) micro-batches; m = k p and
    B = 2 F: 5 p - 4 + (k - 1)(4 p - 2) times F.

    **Source**: arXiv 2107.06925, sections 3.1 and 3.5. The slots of ``doubling`` and ``halving`` are ours.

    **Not modelled**: recomputation; the lower speed of half a micro-batch.

    Raises:
        InputError: p is odd.
    """
    check_sizes("chimera", num_ranks=num_ranks, num_microbatches=num_microbatches)
    parts = HALVES if mode == "halving" else 1
    return Order(
        name="chimera",
        num_stages=num_ranks,
        num_microbatches=parts * num_microbatches,
        ranks=_in_slots(num_ranks, parts * num_microbatches, 1 if mode == "direct" else HALVES),
        microbatch_parts=parts,
    )


def _in_slots(num_ranks: int, num_microbatches: int, together: int) -> tuple[tuple[Cell, ...], ...]:
    """Each rank's passes sorted by slot, in units where ``together`` forward passes take one slot and a backward pass takes one.

    Slots never meet: on rank r passes down begin at slots of r's parity forward and of the other backward, passes up the other way round,
    and where parities agree one has ended before the other begins. The next unit is p slots forward and p x together backward later.
    """
    size = num_ranks * together
    rows = []
    for rank in range(num_ranks):
        placed = []
        for batch in range(num_microbatches):
            unit, place = divmod(batch, size)
            up, turn = divmod(place, (min(size, num_microbatches - unit * size) + 1) // 2)
            stage = num_ranks - 1 - rank if up else rank
            begin = (num_ranks + size) * unit
            placed.append((begin + stage + 2 * (turn // together), Action(stage, "F", batch)))
            placed.append((begin + 2 * num_ranks - 1 - stage + 2 * turn, Action(stage, "BW", batch)))
        rows.append(tuple(action for _, action in sorted(placed)))
    return tuple(rows)


def dualpipe_v(num_ranks: int, num_microbatches: int) -> Order:
    """DualPipe cut in half: two chunks a rank, stages r and 2 p - 1 - r, forward and backward passes of different chunks as one.

    **Model**: with stages of times F, B (full), W and F&B of an overlapped pair: bubble (p - 1)(F&B + B - 3 W); 2 p + 1 activations of a
    stage at most.

    **Source**: github.com/deepseek-ai/DualPipe, README; "cut-in-half", hackmd.io/@ufotalent/r1lVXsa9Jg.

    Raises:
        InputError: m < 2 p.
    """
    check_sizes("dualpipe-v", num_ranks=num_ranks, num_microbatches=num_microbatches)
    ranks = tuple(tuple(_dualpipe_rank(rank, num_ranks, num_microbatches).cells) for rank in range(num_ranks))
    return Order(name="dualpipe-v", num_stages=2 * num_ranks, num_microbatches=num_microbatches, ranks=ranks)


def dualpipe(num_ranks: int, num_microbatches: int) -> Order:
    """Two directions on the same ranks, each with half of the micro-batches: ranks r and p - 1 - r both do what rank r of the V does.

    **Model**: bubble (p / 2 - 1)(F&B + B - 3 W), B the full backward pass; p + 1 activations of a stage; weights twice.

    **Source**: DeepSeek-V3, arXiv 2412.19437, section 3.2.1; github.com/deepseek-ai/DualPipe.

    Raises:
        InputError: p or m is odd, or m < 2 p.
    """
    check_sizes("dualpipe", num_ranks=num_ranks, num_microbatches=num_microbatches)
    half, lane = num_ranks // 2, num_microbatches // 2
    ranks = []
    for rank in range(num_ranks):
        place = min(rank, num_ranks - 1 - rank)
        shift = {place: 0, num_ranks - 1 - place: lane} if rank < half else {place: lane, num_ranks - 1 - place: 0}
        ranks.append(tuple(_renumbered(cell, shift) for cell in _dualpipe_rank(place, half, lane).cells))
    return Order(name="dualpipe", num_stages=num_ranks, num_microbatches=num_microbatches, ranks=tuple(ranks))


def _renumbered(cell: Cell, shift: Mapping[int, int]) -> Cell:
    """The cell with each stage's micro-batches counted from ``shift`` of that stage."""
    moved = [action._replace(micro_batch=action.micro_batch + shift[action.stage]) for action in cell.parts]
    return Overlap(*moved) if isinstance(cell, Overlap) else moved[0]


def _dualpipe_rank(rank: int, num_ranks: int, num_microbatches: int) -> RankWriter:
    """The eight phases of the authors' schedule, on chunks 0 (way there) and 1 (way back)."""
    out, hops = RankWriter((rank, 2 * num_ranks - 1 - rank)), num_ranks - 1 - rank
    for _ in range(2 * hops):
        out.put("F", 0)
    for _ in range(rank + 1):
        out.put("F", 0)
        out.put("F", 1)
    for _ in range(hops):
        out.put("B", 1)
        out.put_weight()
        out.put("F", 1)
    for index in range(num_microbatches - 2 * num_ranks + rank + 1):
        if (
            index == 0 and hops == 0
        ):  # the rank at the turn does not overlap the first two: their neighbours wait for the forward pass
            out.put("F", 0)
            out.put("BW", 1)
        else:
            out.put_overlapped(0, 1)
        out.put_overlapped(1, 0)
    for _ in range(hops):
        out.put("BW", 1)
        out.put_overlapped(1, 0)
    for index in range(2 * (rank + 1)):  # from the middle on, weight gradients wait: they fill what follows
        out.put("B" if index > rank else "BW", 1 - index % 2)
    for _ in range(hops):
        out.put_weight()
        out.put("B", 0)
    for _ in range(rank + 1):
        out.put_weight()
    return out
