"""Whether an order can run: every pass once, on one rank, in a legal order, without deadlock."""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Iterator

import numpy as np

from hardware_models.errors import InputError
from simulator.pipeline.action import Action, ActionKind, Order
from simulator.pipeline.grid import grid_of_texts
from simulator.pipeline.order_arrays import KIND_CODES, OrderArrays, order_arrays
from simulator.pipeline.play_kernels import play_cells

_NEEDED: dict[ActionKind, ActionKind | None] = {"F": None, "B": "F", "BW": "F", "W": "B"}
"""What the same rank must have run on the same stage and micro-batch before each kind."""
_NOWHERE = -1
_Place = tuple[int, int]


def check_order(order: Order, *, source: str = "") -> None:
    """Refuses an order that cannot run, with the grid and the failing cells marked.

    Every (stage, micro-batch) has one forward pass and either one full backward pass or one input gradient and one weight
    gradient, all on one rank, forward first and weight gradient last; every rank comes to its end. A stage may be on several
    ranks, each for its own micro-batches (orders of two directions).

    Raises:
        InputError: says which action breaks which rule.
    """
    name = source or order.name
    if not _each_once(order):
        _check_passes(order, name)
        _check_complete(order, name)
    arrays = order_arrays(order)
    zero = np.zeros(arrays.first_cell[-1])
    done = play_cells(*arrays, zero, 0.0)[2]
    if (done < np.diff(arrays.first_cell)).any():
        raise stuck_error(order, arrays, tuple(int(count) for count in done), source=name)


def stuck_error(order: Order, arrays: OrderArrays, done: tuple[int, ...], *, source: str) -> InputError:
    """The error of an order whose ranks stop after ``done`` cells each: every rank that waits is marked."""
    lengths = np.diff(arrays.first_cell)
    stuck = {(rank, count) for rank, count in enumerate(done) if count < lengths[rank]}
    waiting = ", ".join(f"rank {rank} at {order.ranks[rank][step]}" for rank, step in sorted(stuck))
    rule = f"an order must run to its end, but it deadlocks: {waiting}"
    return _refusal(order, source, rule, "run first what these wait for", stuck)


def _each_once(order: Order) -> bool:
    """Whether all that `_check_passes` and `_check_complete` look for is right: a quick answer for orders that come from generators."""
    arrays = order_arrays(order)
    stage, micro_batch, kind, rank = arrays.stage, arrays.micro_batch, arrays.kind, arrays.rank_of_part
    inside = (stage >= 0) & (stage < order.num_stages) & (micro_batch >= 0) & (micro_batch < order.num_microbatches)
    if not inside.all():
        return False
    place = np.full((len(KIND_CODES), order.num_stages, order.num_microbatches), _NOWHERE)
    place[kind, stage, micro_batch] = np.arange(len(stage))
    count = np.zeros_like(place)
    np.add.at(count, (kind, stage, micro_batch), 1)
    forward, inputs, weights, full = (place[KIND_CODES[name]] for name in ("F", "B", "W", "BW"))
    split = inputs != _NOWHERE
    return bool(
        count.max(initial=0) == 1 and (forward != _NOWHERE).all() and (split == (weights != _NOWHERE)).all() and (split != (full != _NOWHERE)).all()
        and (forward < np.where(split, inputs, full)).all() and (~split | (inputs < weights)).all()
        and (rank[forward] == rank[np.where(split, inputs, full)]).all() and (~split | (rank[inputs] == rank[weights])).all()
    )  # fmt: skip


def _check_passes(order: Order, source: str) -> None:
    where: dict[Action, _Place] = {}
    home: dict[tuple[int, int], int] = {}
    for rank, step, action in _placed_actions(order):
        here, pair = {(rank, step)}, (action.stage, action.micro_batch)
        if not (0 <= action.stage < order.num_stages and 0 <= action.micro_batch < order.num_microbatches):
            rule = f"stages < {order.num_stages} and micro-batches < {order.num_microbatches} must hold, but got {action}"
            raise _refusal(order, source, rule, "renumber it", here)
        if action in where:
            rule = f"every pass runs once, but {action} runs twice"
            raise _refusal(order, source, rule, "take one away", here | {where[action]})
        if home.setdefault(pair, rank) != rank:
            rule = (
                f"a micro-batch meets a stage on one rank, but {action} is on rank {rank} and others are on rank {home[pair]}"
            )
            raise _refusal(order, source, rule, "move it", here)
        needed = _NEEDED[action.kind]
        if needed is not None and action._replace(kind=needed) not in where:
            rule = f"{action} must come after {action._replace(kind=needed)}"
            raise _refusal(order, source, rule, "move it back", here)
        where[action] = (rank, step)


def _check_complete(order: Order, source: str) -> None:
    """Order of the passes has been checked: what is left to check is that none is missing and none done in both ways."""
    kinds = Counter(((action.stage, action.micro_batch), action.kind) for _, _, action in _placed_actions(order))
    for stage in range(order.num_stages):
        for micro_batch in range(order.num_microbatches):
            has = {kind for kind in _NEEDED if kinds[(stage, micro_batch), kind]}
            if has not in ({"F", "BW"}, {"F", "B", "W"}):
                shown = ", ".join(str(Action(stage, kind, micro_batch)) for kind in _NEEDED if kind in has) or "nothing"
                rule = f"stage {stage} and micro-batch {micro_batch} need F and B, or F, I and W, but there is {shown}"
                last = {(rank, step) for rank, step, action in _placed_actions(order) if action[::2] == (stage, micro_batch)}
                raise _refusal(order, source, rule, "add what is missing, take away what is twice", last)


def _placed_actions(order: Order) -> Iterator[tuple[int, int, Action]]:
    """Rank, step and action of every pass."""
    for rank, cells in enumerate(order.ranks):
        for step, cell in enumerate(cells):
            for action in cell.parts:
                yield rank, step, action


def _refusal(order: Order, source: str, rule: str, remedy: str, marked: Collection[_Place]) -> InputError:
    rows = [[str(cell) for cell in cells] for cells in order.ranks]
    grid = grid_of_texts(rows, marked=marked)
    return InputError(source=source, key="order", value=None, rule=rule, remedy=f"{remedy}\n{grid}")
