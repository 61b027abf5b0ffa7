"""Action and Order: what the ranks of a pipeline do, one after the other."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import chain
from typing import Any, Literal, NamedTuple, TypeVar

_Derived = TypeVar("_Derived")

ActionKind = Literal["F", "B", "W", "BW"]
"""F forward, B gradient of the input, W gradient of the weights, BW both at once (full backward)."""


LETTERS: dict[ActionKind, str] = {"F": "F", "B": "I", "W": "W", "BW": "B"}
"""Letter of each kind in torch's text: ``I`` is the input gradient alone, ``B`` the full backward."""
OVERLAP_WORD = "OVERLAP_F_B"
"""What torch's text has after a pair that runs as one."""


class Action(NamedTuple):
    """One pass of one micro-batch through one stage. As text, in torch's form: ``2F0``, ``2I0``, ``2W0``, ``2B0``."""

    stage: int
    kind: ActionKind
    micro_batch: int

    def __str__(self) -> str:
        return f"{self.stage}{LETTERS[self.kind]}{self.micro_batch}"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The passes that it consists of: itself."""
        return (self,)


class Overlap(NamedTuple):
    """A forward and a full backward pass that a rank runs as one: both begin when both have their inputs, both end together.

    As text, in torch's form: ``(4F0;5B0)OVERLAP_F_B``.
    """

    forward: Action
    backward: Action

    def __str__(self) -> str:
        return f"({self.forward};{self.backward}){OVERLAP_WORD}"

    @property
    def parts(self) -> tuple[Action, ...]:
        """The forward and the backward pass."""
        return (self.forward, self.backward)


Cell = Action | Overlap


@dataclass(frozen=True, slots=True, kw_only=True)
class Order:
    """What each rank of a pipeline runs, in its order; untimed.

    Stages are numbered along the way of a micro-batch. A stage is usually on one rank; an order of two directions keeps it on
    two, each for its own micro-batches, so that (stage, micro-batch) always names one rank.
    """

    name: str
    """The schedule that made it, or the file it came from."""
    num_stages: int
    """Stages that a micro-batch passes."""
    num_microbatches: int
    """Micro-batches of a step, in the numbering of the actions."""
    ranks: tuple[tuple[Cell, ...], ...]
    """Per rank, what it runs."""
    microbatch_parts: int = 1
    """Parts that the caller's micro-batch is cut into: actions count parts, each taking that fraction of time and memory."""
    weight_versions: int = 1
    """Versions of its weights that a rank holds (2 where a step begins before the last one's gradients are applied)."""
    derived: dict[str, Any] = field(init=False, compare=False, repr=False, default_factory=dict)
    """What has been derived from the passes, by name: one order serves thousands of plans (`once`)."""

    def once(self, name: str, derive: Callable[[], _Derived]) -> _Derived:
        """What ``derive`` makes of the order, made on the first call under a name."""
        if name not in self.derived:
            self.derived[name] = derive()
        found: _Derived = self.derived[name]
        return found

    @property
    def num_ranks(self) -> int:
        """Pipeline ranks."""
        return len(self.ranks)

    @property
    def weight_copies(self) -> float:
        """Stages that all ranks hold together, over the stages of the model: 1, or 2 for orders of two directions."""
        return sum(len(stages) for stages in self.stages_of_rank) / self.num_stages

    @property
    def stages_of_rank(self) -> tuple[tuple[int, ...], ...]:
        """Per rank, the stages that it holds, ascending."""
        return self.once(
            "stages", lambda: tuple(tuple(sorted({action.stage for action in actions_of(cells)})) for cells in self.ranks)
        )

    @property
    def ranks_of_stage(self) -> tuple[tuple[int, ...], ...]:
        """Per stage, the ranks that hold it, ascending."""
        held = self.stages_of_rank
        return self.once(
            "ranks",
            lambda: tuple(
                tuple(rank for rank, stages in enumerate(held) if stage in stages) for stage in range(self.num_stages)
            ),
        )

    @property
    def chunks_of_rank(self) -> tuple[float, ...]:
        """Per rank, the stages that one micro-batch passes on it: the parts that share the rank's times and its M_B."""
        chunks = []
        for cells in self.ranks:
            forwards = Counter(action.micro_batch for action in actions_of(cells) if action.kind == "F")
            chunks.append(forwards.total() / len(forwards) if forwards else 1.0)
        return tuple(chunks)


def actions_of(cells: tuple[Cell, ...]) -> Iterator[Action]:
    """The passes of a rank in its order, overlapped ones one after the other."""
    return chain.from_iterable(cell.parts for cell in cells)
