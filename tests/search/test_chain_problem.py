"""ChainProblem: the classic chain is the published recurrence; what is refused."""

import math
from collections.abc import Callable
from dataclasses import replace
from functools import cache

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InfeasibleError, InputError
from search.chain_problem import ChainProblem
from search.chain_solver import ChainTable, evaluate, store_all


def published(
    f: list[float], b: list[float], a: list[int], abar: list[int], of: list[int], ob: list[int]
) -> Callable[[int], float]:
    """Opt of the rotor paper, written from its equations."""
    stages = len(f)

    @cache
    def opt(m: int, i: int, last: int) -> float:
        if i == last:
            fits = m >= max(a[i + 1] + abar[i] + of[i], a[i] + a[i + 1] + abar[i] + ob[i])
            return f[i] + b[i] if fits else math.inf
        if m < a[last + 1] + max([a[i + 1] + of[i], *(a[j] + a[j + 1] + of[j] for j in range(i + 1, last))]):
            return math.inf
        found = [sum(f[i:j]) + opt(m - a[j], j, last) + opt(m, i, j - 1) for j in range(i + 1, last + 1) if m >= a[j]]
        if m >= abar[i]:
            found.append(opt(m, i, i) + opt(m - abar[i], i + 1, last))
        return min(found)

    return lambda m: opt(m, 0, stages - 1)


@st.composite
def classic_terms(draw: st.DrawFn) -> tuple:
    stages = draw(st.integers(1, 6))

    def numbers(length: int, low: int, high: int) -> list[int]:
        return draw(st.lists(st.integers(low, high), min_size=length, max_size=length))

    a = numbers(stages + 1, 0, 5)
    abar = [a[i + 1] + extra for i, extra in enumerate(numbers(stages, 0, 6))]
    f, b = numbers(stages, 0, 5), numbers(stages, 0, 9)
    return [float(x) for x in f], [float(x) for x in b], a, abar, numbers(stages, 0, 4), numbers(stages, 0, 4)


@settings(max_examples=60, deadline=None)
@given(classic_terms())
def test_classic_chain_is_the_published_recurrence(terms: tuple) -> None:
    opt = published(*terms)
    problem = ChainProblem.classic(*terms)
    most = evaluate(problem, store_all(problem))[1]
    table = ChainTable(problem, most, num_slots=max(most, 1))
    first = problem.boundary_bytes[0]
    for limit in range(first, most + 1):
        expected = opt(limit - first)
        if math.isinf(expected):
            with pytest.raises(InfeasibleError):
                table.solve(limit)
        else:
            assert table.solve(limit).time_s == expected


def test_classic_terms_by_hand() -> None:
    problem = ChainProblem.classic([1, 2], [3, 4], [10, 20, 30], [25, 36], [1, 2], [3, 5])
    assert problem.discard_peak_bytes == (21, 32)
    assert problem.forward_peak_bytes == ((21,), (32,))
    assert problem.backward_peak_bytes == ((25 + 20 + 13,), (36 + 30 + 25,))
    assert [problem.held_bytes(last) for last in (0, 1)] == [20, 30]


def test_temporaries_default_to_none() -> None:
    assert ChainProblem.classic([1], [1], [2, 3], [4]) == ChainProblem.classic([1], [1], [2, 3], [4], [0], [0])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"boundary_bytes": (1, 1)}, r"len\(boundary_bytes\) == stages \+ 1 boundaries must hold, but got 2 != 3"),
        (
            {"resident_bytes": (1, 2)},
            r"resident_bytes\[0\] = 1: resident_bytes\[l\] >= resident_bytes\[l \+ 1\] must hold, but got 1 < 2",
        ),
        ({"saved_bytes": ((1,), (-4,))}, r"saved_bytes\[1\]\[0\] = -4: 0 <= value < inf must hold"),
        ({"forward_s": ((1.0,), (math.nan,))}, r"forward_s\[1\]\[0\] = nan"),
        ({"forward_s": ((1.0,), ())}, r"len\(forward_s\[1\]\) == one per option must hold, but got 0 != 1"),
        ({"option_names": (("all",), ("a b",))}, r"option_names\[1\] = 'a b': an option's name is made of letters"),
        ({"option_names": (("all",), ())}, r"a stage has one or more options of distinct names"),
    ],
)
def test_refusals_name_field_value_and_rule(change: dict, message: str) -> None:
    problem = ChainProblem.classic([1, 1], [1, 1], [1, 1, 1], [1, 1])
    with pytest.raises(InputError, match=f"classic chain: .*{message}"):
        replace(problem, **change)


def test_classic_refuses_a_graph_without_its_output() -> None:
    with pytest.raises(InputError, match=r"abar\[0\] = 1: abar\[i\] >= a\[i \+ 1\] must hold, but got 1 < 2"):
        ChainProblem.classic([1], [1], [1, 2], [1])
    with pytest.raises(InputError, match=r"len\(a\) must be 2 for 1 stages, but got 1"):
        ChainProblem.classic([1], [1], [1], [1])
