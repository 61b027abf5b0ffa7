"""Cases measured in rounds: which share a module, in which order they run, and what a failure or a limit leaves."""

from __future__ import annotations

import json
import time
import zipfile
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from math import inf
from pathlib import Path
from typing import Any

import pytest
import torch

from simulator.plan import Batch, Plan, Precision, Runtime
from simulator.tracing.live_storages import bytes_of
from simulator.tracing.traced_model import traced_model
from validation import case_rounds
from validation.bundle import BundleCase
from validation.case_rounds import CaseRounds, MeasuredCase, expected_seconds, groups_of
from validation.replay import Archive
from validation.session import ReplaySession

PLAIN = BundleCase(
    name="mlp: plain", model="tests.small_models:residual_mlp", batch=4, seq_len=None, plan=Plan(batch=Batch(global_batch=4)), kind="plain",
    predicted={}, program={},
)  # fmt: skip


class FakeSession:
    """Steps that write down their name."""

    def __init__(self) -> None:
        self.ran: list[str] = []

    def once(self, run: Any) -> AbstractContextManager[Any]:
        """As it is."""
        return nullcontext(run)

    def wait(self) -> None:
        """Nothing runs."""


class FakeRun:
    """A step of a name; every fifth of those called ``breaks`` fails."""

    def __init__(self, session: FakeSession, name: str) -> None:
        self._session, self._name = session, name

    def inside(self) -> AbstractContextManager[None]:
        """Nothing to prepare."""
        return nullcontext()

    def __call__(self) -> None:
        """Once."""
        self._session.ran.append(self._name)
        if self._name == "breaks" and self._session.ran.count("breaks") == 5:
            raise RuntimeError("out of something\nand more")


@pytest.fixture
def rounds(monkeypatch: pytest.MonkeyPatch) -> CaseRounds:
    """Five cases over a session of no module."""
    session = FakeSession()
    monkeypatch.setattr(case_rounds, "ReplaySession", lambda *_, **__: session)
    monkeypatch.setattr(case_rounds, "run_of", lambda session, case: FakeRun(session, case.name))
    names = ("a", "b", "c", "d", "breaks")
    (group,) = groups_of([replace(PLAIN, name=name) for name in names])
    return CaseRounds(group, device="cpu", yardstick=None)


def test_each_round_runs_every_case_in_another_order(rounds: CaseRounds) -> None:
    assert list(rounds.rounds(4, inf)) == [0, 1, 2, 3]
    ran: list[str] = rounds._session.ran  # type: ignore[attr-defined]
    turns = [ran[place : place + 10] for place in (0, 10)]
    assert all(turn[::2] == turn[1::2] and sorted(turn[::2]) == ["a", "b", "breaks", "c", "d"] for turn in turns), "warmed up"
    assert turns[0] != turns[1]
    assert [len(one.seconds) for one in rounds.group] == [4, 4, 4, 4, 2]
    failed = rounds.group[-1]
    assert failed.text == "RuntimeError: out of something"
    assert "FakeRun" not in failed.to_json(None)["failed"]
    assert ran.count("breaks") == 5, "a case that failed is not run again"
    times = rounds.group[0].to_json(None)["step_time_s"]
    assert times["num"] == len(times["seconds"]) == 4
    assert all(begin <= end for begin, end in rounds.group[0].intervals)


def test_one_round_at_least_whatever_the_limit(rounds: CaseRounds) -> None:
    assert list(rounds.rounds(4, time.perf_counter() - 1.0)) == [0]
    assert [len(one.seconds) for one in rounds.group] == [1] * 5


def test_cases_share_a_module_unless_it_is_another_one() -> None:
    plan = PLAIN.plan
    others = [
        PLAIN, replace(PLAIN, plan=replace(plan, runtime=Runtime(compile=True))), replace(PLAIN, plan=replace(plan, precision=Precision(compute="bf16"))),
        replace(PLAIN, kind="checkpoint"), replace(PLAIN, batch=8), replace(PLAIN, plan=replace(plan, precision=Precision(optimizer="sgd"))),
    ]  # fmt: skip
    assert [[one.number for one in group] for group in groups_of(others)] == [[0, 3], [1], [2], [4], [5]]


def test_a_model_gets_time_by_what_its_steps_take() -> None:
    plan, hand_made = replace(PLAIN, predicted={"step_time_s": 0.3}), replace(PLAIN, kind="checkpoint")
    (group,) = groups_of([plan, plan, hand_made])
    assert expected_seconds(group) == pytest.approx(0.9)
    assert expected_seconds(group[2:]) == 1.0


def test_what_was_not_timed_is_said_in_the_archive(tmp_path: Path) -> None:
    untimed, timed = (
        MeasuredCase(number=0, case=PLAIN),
        MeasuredCase(number=1, case=PLAIN, seconds=[1.0, 3.0], yardstick_s=[0.5, 0.5]),
    )
    archive = Archive(tmp_path / "all.zip")
    archive.add_cases([untimed, timed], None)
    with zipfile.ZipFile(tmp_path / "all.zip") as files:
        first, second = (json.loads(files.read(f"case-{number:03d}.json")) for number in range(2))
    assert first == {"name": "mlp: plain", "kind": "plain", "failed": "not begun: out of time"}
    assert (second["step_time_s"]["median"], second["yardstick_s"]["median"], second["state"]) == (2.0, 0.5, {})


def test_a_settled_module_is_the_same_one() -> None:
    session = ReplaySession(traced_model("tests.small_models:residual_mlp", batch=2, seq_len=None))
    held = {
        name: (parameter, parameter.detach().clone(), bytes_of(parameter))
        for name, parameter in session.module.named_parameters()
    }
    session.settle()
    for name, parameter in session.module.named_parameters():
        same, value, view = held[name]
        assert same is parameter
        assert torch.equal(parameter, value)
        assert view.untyped_storage()._cdata == parameter.untyped_storage()._cdata, "views of it stay views"


def test_states_of_a_run_go_with_it() -> None:
    session = ReplaySession(traced_model("tests.small_models:residual_mlp", batch=2, seq_len=None))
    with session.once(session.plain()) as run:
        run()
        assert session.optimizer.state_tensors
    assert not session.optimizer.state_tensors
    assert not session._runs
