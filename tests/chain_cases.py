"""Chains for tests: small random ones whose schedules can all be listed, the lists, and long ones as models give them."""

from __future__ import annotations

import random
from collections.abc import Iterator

from hypothesis import strategies as st

from search.chain_problem import ChainProblem
from simulator.sequence import Operation

MOST_SEQUENCES = 800
SCHROEDER = (1, 1, 2, 6, 22, 90, 394)
"""Schedules of a chain of so many stages with one option."""


def all_persistent_sequences(problem: ChainProblem) -> Iterator[tuple[Operation, ...]]:
    """Every memory-persistent sequence: what is kept lies on a stack, and forward runs start at its top."""
    stages = problem.num_stages

    def grow(stack: list[tuple[str, int]], last: int, done: list[Operation]) -> Iterator[tuple[Operation, ...]]:
        if last < 0:
            yield tuple(done)
            return
        kind, stage = stack[-1]
        at = stage + 1 if kind == "graph" else stage
        if at == last + 1:
            rest = stack[:-1]
            if rest and rest[-1] == ("boundary", last):
                rest = rest[:-1]
            yield from grow(rest, last - 1, [*done, Operation("B", last)])
            return
        for name in problem.option_names[at]:
            yield from grow([*stack, ("graph", at)], last, [*done, Operation("F_all", at, name)])
        for to in range(at + 1, last + 1):
            run = [Operation("F_ck", at), *(Operation("F_e", stage) for stage in range(at + 1, to))]
            yield from grow([*stack, ("boundary", to)], last, [*done, *run])

    return grow([("boundary", 0)], stages - 1, [])


@st.composite
def chains(draw: st.DrawFn, size: int = 12, most_stages: int = 6, most_sequences: int = MOST_SEQUENCES) -> ChainProblem:
    """Chains of whole seconds and bytes whose sequences can all be listed; peaks bear no relation to the sizes."""
    stages = draw(st.integers(1, most_stages))
    counts, most = [], most_sequences // SCHROEDER[stages]
    for _ in range(stages):
        counts.append(draw(st.integers(1, min(3, max(1, most)))))
        most //= counts[-1]
    sizes, seconds = st.integers(0, size), st.integers(0, 9).map(float)

    def several(values: st.SearchStrategy, length: int) -> tuple:
        return tuple(draw(st.lists(values, min_size=length, max_size=length)))

    return ChainProblem(
        discard_s=several(seconds, stages),
        discard_peak_bytes=several(sizes, stages),
        boundary_bytes=several(sizes, stages + 1),
        boundary_gradient_bytes=several(sizes, stages + 1),
        resident_bytes=tuple(sorted(several(sizes, stages), reverse=True)),
        option_names=tuple(tuple("abc"[:count]) for count in counts),
        forward_s=tuple(several(seconds, count) for count in counts),
        backward_s=tuple(several(seconds, count) for count in counts),
        saved_bytes=tuple(several(sizes, count) for count in counts),
        forward_peak_bytes=tuple(several(sizes, count) for count in counts),
        backward_peak_bytes=tuple(several(sizes, count) for count in counts),
    )


def long_chain(stages: int, options: int, seed: int) -> ChainProblem:
    """A chain as models give them: sizes in the millions, more than a slot, options that trade time for memory."""
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    output = [draw.randint(1, 20) * 1_000_003 for _ in range(stages + 1)]
    forward = [draw.uniform(0.5, 2.0) for _ in range(stages)]
    extra = [draw.randint(1, 80) * 1_000_033 for _ in range(stages)]
    saved = [[output[i + 1] + extra[i] // (option + 1) for option in range(options)] for i in range(stages)]
    return ChainProblem(
        discard_s=tuple(forward),
        discard_peak_bytes=tuple(output[i + 1] + 777 for i in range(stages)),
        boundary_bytes=tuple(output),
        boundary_gradient_bytes=(*output[:-1], 0),
        resident_bytes=tuple((stages - 1 - i) * 100_000 for i in range(stages)),
        option_names=tuple(tuple("abc"[:options]) for _ in range(stages)),
        forward_s=tuple((time,) * options for time in forward),
        backward_s=tuple(tuple(time * (2 + 0.4 * option) for option in range(options)) for time in forward),
        saved_bytes=tuple(tuple(row) for row in saved),
        forward_peak_bytes=tuple(tuple(size + 1_234_567 for size in row) for row in saved),
        backward_peak_bytes=tuple(
            tuple(size + output[i] + output[i + 1] + 100_000 for size in row) for i, row in enumerate(saved)
        ),
    )


def layered_chain(seed: int, *, layers: int | None = None, options: int = 2) -> tuple[ChainProblem, tuple[int, ...]]:
    """A stage of like layers of two blocks each, an embedding before them or a head behind them or neither, and where its runs may begin.

    A second option keeps a third and costs a few percent of a forward pass.
    """
    draw = random.Random(seed)  # noqa: S311  # not for secrets
    count = layers or draw.randint(2, 6)
    size = draw.randint(5, 60) * 10**6
    front, back = draw.random() < 0.5, draw.random() < 0.5
    forward, graph = (draw.uniform(1, 3), draw.uniform(1, 3)), (draw.randint(2, 20) * size, draw.randint(2, 20) * size)
    rise = (draw.randint(0, 3) * size, draw.randint(0, 3) * size)
    names = ("all", "selective")[:options]
    rows: list[tuple[float, tuple[int, ...], int]] = []
    for _ in range(count):
        rows += [(forward[n], tuple(size + graph[n] // (1 + 2 * option) for option in range(options)), rise[n]) for n in (0, 1)]
    if front:
        rows.insert(0, (0.1, (size,) * options, 0))
    if back:
        rows.append((2.0, (draw.randint(2, 20) * size,) * options, size))
    stages = len(rows)
    return ChainProblem(
        discard_s=tuple(row[0] for row in rows), discard_peak_bytes=tuple(size + row[2] for row in rows),
        boundary_bytes=(0 if front else size, *((size,) * (stages - 1)), 0 if back else size), boundary_gradient_bytes=(*((size,) * stages), 0),
        resident_bytes=(0,) * stages, option_names=(names,) * stages, forward_s=tuple((row[0],) * options for row in rows),
        backward_s=tuple(tuple(row[0] * (2 + 0.05 * option) for option in range(options)) for row in rows), saved_bytes=tuple(row[1] for row in rows),
        forward_peak_bytes=tuple(tuple(own + row[2] for own in row[1]) for row in rows),
        backward_peak_bytes=tuple(tuple(row[1][0] + 2 * size + row[2] for _ in row[1]) for row in rows),
    ), (0, 1) if front else (0,)  # fmt: skip
