"""Orders as text and CSV, in the form that `torch.distributed.pipelining` prints, writes and reads."""

from __future__ import annotations

import csv
import io
import re
from pathlib import Path

from hardware_models.errors import InputError
from hardware_models.text_files import text_of
from simulator.pipeline.action import LETTERS, OVERLAP_WORD, Action, ActionKind, Cell, Order, Overlap, actions_of
from simulator.pipeline.check_order import check_order
from simulator.pipeline.grid import grid_of_texts

_KINDS: dict[str, ActionKind] = {letter: kind for kind, letter in LETTERS.items()}
_ACTION = re.compile(r"^(\d+)([FIWB])(\d+)$")
_OVERLAP = re.compile(rf"^\(([^;()]+);([^;()]+)\){OVERLAP_WORD}$")
_OTHER = re.compile(r"^\d+(UNSHARD|RESHARD|REDUCE_GRAD|SEND_F|RECV_F|SEND_B|RECV_B)\d*$")
_FORMS = "an action is STAGE, one of F (forward), I (input gradient), W (weight gradient), B (full backward), MICRO-BATCH"


def parse_cell(text: str) -> Cell | None:
    """The action or pair of a text; None where the text is neither."""
    pair = _OVERLAP.match(text.strip())
    if pair is not None:
        forward, backward = (parse_cell(part) for part in pair.groups())
        right = isinstance(forward, Action) and isinstance(backward, Action) and (forward.kind, backward.kind) == ("F", "BW")
        return Overlap(forward, backward) if right else None  # type: ignore[arg-type]
    match = _ACTION.match(text.strip())
    return None if match is None else Action(int(match[1]), _KINDS[match[2]], int(match[3]))


def order_texts(order: Order) -> tuple[str, ...]:
    """One line per rank, actions separated by commas: what a row of the CSV holds."""
    return tuple(",".join(map(str, cells)) for cells in order.ranks)


def order_csv(order: Order) -> str:
    """The CSV that torch's ``_dump_csv(..., format="compute_only")`` writes: a row per rank.

    Not modelled: torch places a stage on one rank only, so it cannot load orders of two directions.
    """
    out = io.StringIO(newline="")
    csv.writer(out).writerows([str(cell) for cell in cells] for cells in order.ranks)
    return out.getvalue()


def parse_order(text: str, *, source: str = "order") -> Order:
    """The checked order of a CSV: a row per rank, blank cells (idle steps) skipped.

    Raises:
        InputError: a cell is no action, or the order cannot run (shows the grid with the cell marked).
    """
    rows = list(csv.reader(io.StringIO(text)))
    ranks = []
    for rank, row in enumerate(rows):
        cells: list[Cell] = []
        for step, word in enumerate(row):
            if not word.strip():
                continue
            cell = parse_cell(word)
            if cell is None:
                raise _bad_cell(rows, rank, step, source)
            cells.append(cell)
        ranks.append(tuple(cells))
    actions = [action for cells in ranks for action in actions_of(cells)]
    if not actions:
        raise InputError(
            source=source, key="", value=None, rule="an order has at least one action, but there is none", remedy=_FORMS
        )
    order = Order(
        name=source,
        num_stages=1 + max(action.stage for action in actions),
        num_microbatches=1 + max(action.micro_batch for action in actions),
        ranks=tuple(ranks),
    )
    check_order(order, source=source)
    return order


def read_order(path: Path) -> Order:
    """The checked order of a CSV file.

    Raises:
        InputError: the file cannot be read, or `parse_order` refuses it.
    """
    return parse_order(text_of(path, remedy="name a CSV file with a row per rank"), source=str(path))


def _bad_cell(rows: list[list[str]], rank: int, step: int, source: str) -> InputError:
    word = rows[rank][step].strip()
    lowered = _OTHER.match(word) is not None
    remedy = (
        "write it with format='compute_only', without communication"
        if lowered
        else "as in 2F0,2I0,2W0,2B0,(4F0;5B0)OVERLAP_F_B"
    )
    grid = grid_of_texts(rows, marked={(rank, step)})
    rule = _FORMS if not lowered else "an order holds compute actions only"
    return InputError(source=source, key=f"row {rank}, column {step}", value=word, rule=rule, remedy=f"{remedy}\n{grid}")
