"""Sequence: the order in which one micro-batch runs a chain of blocks forward, again, and backward."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Sequence
from typing import Literal, NamedTuple

from hardware_models.errors import InputError

OperationKind = Literal["F_e", "F_ck", "F_all", "B"]

_LINE = re.compile(r"^(F_e|F_ck|B)\s+(\d+)$|^(F_all)\s+(\d+)(?::(\w+))?$")


class Operation(NamedTuple):
    """One run of one block.

    ``F_e``: forward without a graph, the block's input may go. ``F_ck``: the same, and the input stays for a later run.
    ``F_all``: forward with a graph under an option. ``B``: backward through that graph.
    """

    kind: OperationKind
    block: int
    option: str = ""

    def __str__(self) -> str:
        return f"{self.kind} {self.block}" + (f":{self.option}" if self.kind == "F_all" else "")


def format_sequence(operations: Iterable[Operation]) -> str:
    """One operation a line: ``F_ck 0``, ``F_e 1``, ``F_all 2:all``, ``B 2``."""
    return "".join(f"{operation}\n" for operation in operations)


def parse_sequence(text: str, *, source: str = "sequence") -> tuple[Operation, ...]:
    """Operations of a text as `format_sequence` writes it; blank lines and lines that begin with ``#`` are skipped.

    Raises:
        InputError: a line is none of the four forms (names the line).
    """
    operations: list[Operation] = []
    for number, line in enumerate(text.splitlines(), start=1):
        if not line.strip() or line.lstrip().startswith("#"):
            continue
        match = _LINE.match(line.strip())
        if match is None:
            raise InputError(
                source=source, key=f"line {number}", value=line, rule="an operation is F_ck i, F_e i, F_all i:option or B i",
                remedy="number blocks from 0",
            )  # fmt: skip
        kind, block, keeps, kept_block, option = match.groups()
        operations.append(Operation("F_all", int(kept_block), option or "all") if keeps else Operation(kind, int(block)))  # type: ignore[arg-type]
    return tuple(operations)


def check_sequence(operations: Sequence[Operation], num_blocks: int, *, source: str = "sequence") -> None:
    """Refuses a sequence that does not run every block backward once, in order, each on inputs that exist.

    Raises:
        InputError: names the operation and the rule that it breaks.
    """

    def refuse(position: int, rule: str) -> InputError:
        return InputError(source=source, key=f"operation {position + 1}", value=str(operations[position]), rule=rule)

    kept, taped = {0}, set[int]()
    flow, next_backward = 0, num_blocks - 1
    for position, (kind, block, _) in enumerate(operations):
        if not 0 <= block < num_blocks:
            raise refuse(position, f"0 <= block < {num_blocks} must hold")
        if kind == "B":
            if block != next_backward or block not in taped:
                raise refuse(position, f"the next backward is of block {next_backward}, after its F_all")
            taped.remove(block)
            next_backward, flow = block - 1, -1
            continue
        if block != flow and block not in kept:
            raise refuse(position, "the block's input is neither the output just made nor kept by an F_ck")
        if block > next_backward:
            raise refuse(position, f"block {block} has run backward already")
        if kind == "F_ck":
            kept.add(block)
        elif block:
            kept.discard(block)
        if kind == "F_all":
            taped.add(block)
        flow = block + 1
    if next_backward >= 0:
        raise InputError(
            source=source,
            key=f"operation {len(operations)}",
            value=None,
            rule=f"ends before the backward of block {next_backward}",
        )


def runs_twice(operations: Iterable[Operation]) -> frozenset[int]:
    """Blocks whose operators run forward more than once, be it inside their backward pass (options other than ``all``)."""
    counts = Counter[int]()
    for kind, block, option in operations:
        if kind != "B":
            counts[block] += 1 if option in {"", "all"} else 2
    return frozenset(block for block, count in counts.items() if count > 1)


def keep_all(num_blocks: int, option: str = "all") -> tuple[Operation, ...]:
    """No recompute between blocks: all forward with a graph, all backward."""
    forward = [Operation("F_all", block, option) for block in range(num_blocks)]
    return (*forward, *(Operation("B", block) for block in reversed(range(num_blocks))))


def checkpoint_blocks(num_blocks: int, checkpointed: Iterable[int], options: Sequence[str]) -> tuple[Operation, ...]:
    """Each of the ``checkpointed`` blocks keeps its input only and runs again before its backward; the others run under their option.

    The order of ``torch.utils.checkpoint`` around single blocks.
    """
    again = set(checkpointed)
    forward = [
        Operation("F_ck", block) if block in again else Operation("F_all", block, options[block]) for block in range(num_blocks)
    ]
    backward: list[Operation] = []
    for block in reversed(range(num_blocks)):
        if block in again:
            backward.append(Operation("F_all", block, options[block]))
        backward.append(Operation("B", block))
    return (*forward, *backward)
