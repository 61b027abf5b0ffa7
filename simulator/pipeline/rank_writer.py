"""RankWriter: writes the passes of one rank, chunk by chunk, and counts its micro-batches."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence

from simulator.pipeline.action import Action, ActionKind, Cell, Overlap


class RankWriter:
    """Appends passes of a rank's chunks; each takes the chunk's next micro-batch. Weight gradients wait in a queue.

    Args:
        stages: the stage of each chunk.
        first: per chunk, the number of its first micro-batch.
    """

    def __init__(self, stages: Sequence[int], first: Sequence[int] | None = None) -> None:
        self.cells: list[Cell] = []
        self._stages = tuple(stages)
        self._forward = list(first or [0] * len(self._stages))
        self._backward = list(self._forward)
        self._waiting: deque[Action] = deque()

    def put(self, kind: ActionKind, chunk: int) -> None:
        """Appends a forward, input gradient or full backward pass; an input gradient's weight gradient joins the queue."""
        self.cells.append(self._next(kind, chunk))

    def put_overlapped(self, forward_chunk: int, backward_chunk: int) -> None:
        """Appends a forward and a full backward pass that run as one."""
        self.cells.append(Overlap(self._next("F", forward_chunk), self._next("BW", backward_chunk)))

    def put_weight(self, chunk: int | None = None) -> None:
        """Appends the weight gradient that waits longest, of any chunk or of one; nothing if none waits."""
        due = next((action for action in self._waiting if chunk in (None, self._stages.index(action.stage))), None)
        if due is not None:
            self._waiting.remove(due)
            self.cells.append(due)

    def _next(self, kind: ActionKind, chunk: int) -> Action:
        counts = self._forward if kind == "F" else self._backward
        action = Action(self._stages[chunk], kind, counts[chunk])
        counts[chunk] += 1
        if kind == "B":
            self._waiting.append(action._replace(kind="W"))
        return action
