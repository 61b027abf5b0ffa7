"""An order with its messages: where each rank sends and where it begins to receive, so that no rank waits for ever."""

from __future__ import annotations

import csv
import io
from collections.abc import Sequence
from typing import Literal, NamedTuple

from simulator.pipeline.action import Action, Cell, Order, actions_of

MessageKind = Literal["SEND_F", "RECV_F", "SEND_B", "RECV_B"]
"""F: the boundary after a stage, B: its gradient. Sent and received are named by the stage that does it, as torch does."""


class Message(NamedTuple):
    """One end of a message. As text, in torch's form: ``2SEND_F0``, ``3RECV_F0``."""

    stage: int
    kind: MessageKind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{self.kind}{self.micro_batch}"


Step = Cell | Message


def with_messages(order: Order) -> tuple[tuple[Step, ...], ...]:
    """Per rank, what it runs with the messages between.

    **Model**: the ranks take turns; each runs its next passes if their inputs are there or on their way. A send follows its pass, and at that very moment the receiver
    begins to receive. All ends of messages thus lie on one line, so that they cannot wait for each other in a circle. Stages on one rank hand their results over without one.

    Source: the way in which ``torch.distributed.pipelining.schedules`` lowers orders (torch 2.13); the lists are equal to those of its ``_add_send_recv``.

    Args:
        order: with each stage on one rank.
    """
    home = [ranks[0] for ranks in order.ranks_of_stage]
    assert all(len(ranks) == 1 for ranks in order.ranks_of_stage), "an order of two directions has no such lists"
    steps: list[list[Step]] = [[] for _ in order.ranks]
    there: list[set[Action]] = [set() for _ in order.ranks]
    places = [0] * order.num_ranks
    while any(place < len(cells) for place, cells in zip(places, order.ranks, strict=True)):
        moved = False
        for rank, cells in enumerate(order.ranks):
            if places[rank] == len(cells) or not _ready(cells[places[rank]], there[rank], order.num_stages):
                continue
            cell = cells[places[rank]]
            places[rank], moved = places[rank] + 1, True
            steps[rank].append(cell)
            for action in cell.parts:
                there[rank].add(action)
                _exchange(action, rank, home, steps, there)
        assert moved, "check_order lets no order pass that cannot end"
    return tuple(tuple(own) for own in steps)


def messages_csv(steps: Sequence[Sequence[Step]]) -> str:
    """The CSV that torch's runtime loads with ``format="compute_comms"``: a row per rank."""
    out = io.StringIO(newline="")
    csv.writer(out).writerows([str(step) for step in own] for own in steps)
    return out.getvalue()


def sender_of(action: Action, num_stages: int) -> Action | None:
    """A pass whose result this one needs from a neighbouring stage, as a full backward pass where that is one; None: it needs none."""
    if action.kind == "F" and action.stage:
        return action._replace(stage=action.stage - 1)
    if action.kind in {"B", "BW"} and action.stage + 1 < num_stages:
        return Action(action.stage + 1, "BW", action.micro_batch)
    return None


def _ready(cell: Cell, there: set[Action], num_stages: int) -> bool:
    needed = [sender_of(action, num_stages) for action in cell.parts]
    return all(one is None or one in there or one._replace(kind="B") in there for one in needed)


def _exchange(action: Action, rank: int, home: Sequence[int], steps: list[list[Step]], there: list[set[Action]]) -> None:
    """Writes the two ends of the message that a pass sends, if it sends one."""
    target = action.stage + 1 if action.kind == "F" else action.stage - 1
    if action.kind == "W" or not 0 <= target < len(home) or home[target] == rank:
        return
    letter = "F" if action.kind == "F" else "B"
    steps[rank].append(Message(action.stage, f"SEND_{letter}", action.micro_batch))  # type: ignore[arg-type]
    steps[home[target]].append(Message(target, f"RECV_{letter}", action.micro_batch))  # type: ignore[arg-type]
    there[home[target]].add(action)


def passes_of(steps: Sequence[Step]) -> tuple[Action, ...]:
    """The passes of a rank without its messages, overlapped ones one after the other."""
    return tuple(actions_of(tuple(step for step in steps if not isinstance(step, Message))))
