"""An order as a text picture: a row per rank, a column per step or per slot of time."""

from __future__ import annotations

from collections.abc import Collection, Sequence

COLUMNS_AROUND = 8
"""Columns shown on either side of a marked cell."""
MARK = ("[", "]")
"""What surrounds a marked cell."""


def grid_of_texts(rows: Sequence[Sequence[str]], *, marked: Collection[tuple[int, int]] = ()) -> str:
    """A row per rank, a column per step; cells of ``marked`` (rank, step) in brackets, columns far from all of them left out.

    A marked step past the end of its row shows an empty cell in brackets.
    """
    last = max([len(row) for row in rows] + [step + 1 for _, step in marked], default=0)
    steps = [step for step in range(last) if not marked or any(abs(step - at) <= COLUMNS_AROUND for _, at in marked)]
    table = [["", *(f"step {step}" for step in steps)]]
    for rank, row in enumerate(rows):
        line = [f"rank {rank}"]
        for step in steps:
            word = row[step].strip() if step < len(row) else ""
            line.append(f"{MARK[0]}{word}{MARK[1]}" if (rank, step) in marked else word)
        table.append(line)
    widths = [max(len(line[column]) for line in table) for column in range(len(table[0]))]
    return "\n".join(" ".join(word.ljust(width) for word, width in zip(line, widths, strict=True)).rstrip() for line in table)


def grid_of_spans(
    cells: Sequence[Sequence[str]], starts: Sequence[Sequence[float]], ends: Sequence[Sequence[float]], *, width: int
) -> str:
    """A row per rank on one time axis of ``width`` characters: each cell's text at its start, dots to its end, blanks when idle.

    Args:
        cells: per rank, the text of each cell.
        starts, ends: per rank, the times of each cell, in one unit.
        width: characters for the time from the first start to the last end.
    """
    first = min((row[0] for row in starts if len(row)), default=0.0)
    span = max((row[-1] for row in ends if len(row)), default=0.0) - first
    scale = width / span if span > 0 else 0.0
    label = len(f"rank {len(cells) - 1} ")
    lines = []
    for rank, words in enumerate(cells):
        canvas = [" "] * width
        for word, start, end in zip(words, starts[rank], ends[rank], strict=True):
            left, right = round((start - first) * scale), round((end - first) * scale)
            canvas[left:right] = list(word[: right - left].ljust(right - left, "."))
        lines.append(f"rank {rank} ".ljust(label) + "".join(canvas).rstrip())
    return "\n".join(lines)
