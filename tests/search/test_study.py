"""The study: best bound first, stopped once proven, resumed from its storage, the same in every process."""

from __future__ import annotations

import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import optuna
import pytest
from hypothesis import given
from hypothesis import strategies as st
from optuna.trial import TrialState

from hardware_models.errors import InfeasibleError
from search.study import POINT, BestBoundFirst, BoundedPoint, Outcome, StudyResult, run_study

ROOT = Path(__file__).parents[2]


def points(**bounds: float) -> list[BoundedPoint]:
    return [BoundedPoint(text=name, bound=bound) for name, bound in bounds.items()]


class Simulator:
    """Answers from a table (None: infeasible) and remembers what was asked."""

    def __init__(self, **values: float | None) -> None:
        self.values, self.asked = values, list[str]()

    def __call__(self, text: str) -> Outcome:
        """The outcome of a point."""
        self.asked.append(text)
        value = self.values[text]
        if value is None:
            raise InfeasibleError(
                limit=f"no room at {text}", smallest_change="more", needed_bytes=len(self.values) - len(self.asked)
            )
        return Outcome(value=value, bound=value, attributes={"name": text})


def study(
    space: list[BoundedPoint], simulate: Callable[[str], Outcome], storage: str | None = None, **more: float
) -> StudyResult:
    return run_study(space, simulate, request="a test", storage=storage, time_limit_s=more.get("time_limit_s"))


def test_points_are_simulated_by_their_bounds_until_the_best_is_proven() -> None:
    simulator = Simulator(a=5.0, b=2.5, c=2.0, d=9.0)
    found = study(points(a=4.0, b=2.0, c=1.0, d=2.2), simulator)
    assert simulator.asked == ["c"], "no bound is below 2"
    assert found.best.params == {POINT: "c"}
    assert found.best.user_attrs["name"] == "c"
    assert (found.lower_bound, found.gap, found.certified) == (2.0, 0.0, True)
    assert found.num_simulated == len(simulator.asked)


def test_a_bound_equal_to_the_best_ends_the_study() -> None:
    simulator = Simulator(a=2.0, b=2.0)
    assert study(points(a=1.0, b=2.0), simulator).certified
    assert simulator.asked == ["a"]


def test_points_that_bounds_do_not_exclude_are_all_simulated() -> None:
    simulator = Simulator(a=5.0, b=4.0, c=3.0)
    found = study(points(a=1.0, b=1.5, c=1.2), simulator)
    assert simulator.asked == ["a", "c", "b"]
    assert found.best.values == [3.0]


@given(st.lists(st.tuples(st.integers(1, 20), st.integers(0, 5), st.booleans()), min_size=1, max_size=6))
def test_the_answer_is_that_of_simulating_everything(table: list[tuple[int, int, bool]]) -> None:
    names = [f"p{index}" for index in range(len(table))]
    space = [
        BoundedPoint(text=name, bound=float(max(0, value - slack)))
        for name, (value, slack, _) in zip(names, table, strict=True)
    ]
    values = {name: float(value) if feasible else None for name, (value, _, feasible) in zip(names, table, strict=True)}
    feasible = [value for value in values.values() if value is not None]
    if not feasible:
        with pytest.raises(InfeasibleError):
            study(space, Simulator(**values))
        return
    found = study(space, Simulator(**values))
    assert found.best.values == [min(feasible)]
    assert found.certified


def test_a_gap_remains_where_the_inner_solver_is_not_exact() -> None:
    def simulate(text: str) -> Outcome:
        return Outcome(value=4.0, bound=3.0, attributes={"name": text})

    found = study(points(a=1.0), simulate)
    assert (found.lower_bound, found.gap, found.certified) == (3.0, 0.25, False)


def test_out_of_time_the_bound_is_that_of_what_was_not_simulated() -> None:
    simulator = Simulator(a=5.0, b=4.0)
    found = study(points(a=1.0, b=2.0), simulator, time_limit_s=0.0)
    assert simulator.asked == ["a"], "one trial at least"
    assert (found.lower_bound, found.certified) == (2.0, False)
    assert found.gap == pytest.approx(3 / 5)


def test_infeasible_points_are_pruned_and_told() -> None:
    found = study(points(a=1.0, b=2.0), Simulator(a=None, b=3.0))
    assert [str(error) for error in found.infeasible] == ["infeasible: no room at a; more"]
    assert found.certified
    assert found.num_simulated == 2


def test_nothing_feasible_repeats_the_smallest_change() -> None:
    with pytest.raises(InfeasibleError, match="no room at b; more") as caught:
        study(points(a=1.0, b=2.0), Simulator(a=None, b=None))
    assert caught.value.needed_bytes == 0


def test_a_study_goes_on_where_it_stopped(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    space = points(a=1.0, b=1.5, c=2.0)
    first = Simulator(a=9.0, b=8.0, c=7.0)
    assert not study(space, first, storage, time_limit_s=0.0).certified
    second = Simulator(a=9.0, b=8.0, c=7.0)
    found = study(space, second, storage)
    assert (first.asked, second.asked) == (["a"], ["b", "c"])
    assert found.best.params[POINT] == "c"
    third = Simulator()
    again = study(space, third, storage)
    assert third.asked == []
    assert (again.num_simulated, again.best.params, again.certified) == (0, {POINT: "c"}, True)
    (kept,) = optuna.load_study(study_name=None, storage=storage).get_trials(states=(TrialState.COMPLETE,))[:1]
    assert kept.params == {POINT: "a"}


def test_another_request_is_another_study(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"
    for request in ("one", "other"):
        simulator = Simulator(a=1.0)
        run_study(points(a=1.0), simulator, request=request, storage=storage)
        assert simulator.asked == ["a"]
    assert len(optuna.get_all_study_names(storage)) == 2


def test_a_trial_that_a_killed_process_left_running_is_tried_again(tmp_path: Path) -> None:
    storage = f"sqlite:///{tmp_path / 'study.db'}"

    def killed(_text: str) -> Outcome:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        study(points(a=1.0, b=2.0), killed, storage)
    simulator = Simulator(a=1.5, b=2.0)
    assert study(points(a=1.0, b=2.0), simulator, storage).best.params[POINT] == "a"
    assert simulator.asked == ["a"]


def test_the_sampler_refuses_other_parameters() -> None:
    sampler = BestBoundFirst(points(a=1.0))
    the_study = optuna.create_study(sampler=sampler)
    with pytest.raises(AssertionError, match="width is not a parameter of this study"):
        the_study.ask().suggest_int("width", 1, 2)


ORDER = """
from search.study import BestBoundFirst, BoundedPoint, Outcome, run_study
asked = []
def simulate(text):
    asked.append(text)
    return Outcome(value=100.0, bound=100.0, attributes={})
points = [BoundedPoint(text=f"p{n}", bound=float(n % 3)) for n in range(9)]
run_study(points, simulate, request="order")
print(asked)
"""


def test_the_order_is_the_same_in_fresh_processes() -> None:
    outputs = {
        subprocess.run(
            [sys.executable, "-c", ORDER], cwd=ROOT, env={"PYTHONHASHSEED": seed, "PYTHONPATH": str(ROOT)}, capture_output=True,
            text=True, check=True,
        ).stdout
        for seed in ("1", "2")
    }  # fmt: skip
    assert outputs == {"['p0', 'p3', 'p6', 'p1', 'p4', 'p7', 'p2', 'p5', 'p8']\n"}
