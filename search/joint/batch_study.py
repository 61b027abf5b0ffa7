"""The joint study: trials are batches of points, best bound first, in Optuna storage that any number of workers share."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import optuna
from numpy.typing import NDArray
from optuna.distributions import BaseDistribution, IntDistribution
from optuna.samplers import BaseSampler
from optuna.storages import JournalStorage
from optuna.storages.journal import JournalFileBackend
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.joint.refusals import together
from search.study import CERTIFIED_GAP

BATCH = "batch"
"""Name of the study's only parameter: which stretch of the points, in order of their bounds."""
BATCH_POINTS = 64
"""Points of a batch: one trial is written for them together, so that storage is not the bottleneck."""
NOTHING = float("inf")
"""Value where there is no plan."""
JOURNAL = "journal:"
"""Begins a storage that is a journal file."""
_POLL_S = 0.2
"""Between looks at what other workers have finished."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BatchOutcome:
    """What a batch gave."""

    value: float | None
    """Of its best point that fits; None: none does."""
    point: int | None
    """Index of that point in the space."""
    open_bound: float
    """Bound of the first point that was not looked at, or not to its end, for lack of time; infinite: all were."""
    num_simulated: int
    least_bytes: int
    """Least memory that a point which does not fit would need; 0 where there is none."""
    attributes: Mapping[str, Any]
    """Of the best point, kept with the trial as JSON."""
    refused: Mapping[str, int]
    """Plans that the simulator refuses, by reason."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Progress:
    """Where a study stands."""

    incumbent: float
    """Best value so far; infinite before the first."""
    lower_bound: float
    num_simulated: int
    elapsed_s: float

    @property
    def gap(self) -> float:
        """(incumbent - lower bound) / incumbent; 1 before the first value."""
        return (self.incumbent - self.lower_bound) / self.incumbent if np.isfinite(self.incumbent) else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class JointStudyResult:
    """The end of a study."""

    best: FrozenTrial | None
    """None: nothing fits."""
    progress: Progress
    least_bytes: int
    """Least memory that a point which does not fit would need."""
    refused: Mapping[str, int]
    """Plans that the simulator refuses, by reason, most of them first."""

    @property
    def certified(self) -> bool:
        """Whether the best is proven optimal within the model."""
        return self.progress.gap <= CERTIFIED_GAP


class BatchesBestBoundFirst(BaseSampler):
    """Proposes the first batch that nobody has tried or is trying; a deterministic sampler.

    Args:
        bounds: of all points, ascending.
        known: value of a plan that is known already.
    """

    def __init__(self, bounds: NDArray[np.float64], known: float = NOTHING) -> None:
        self.bounds, self.known = bounds, known
        self.num_batches = max(1, -(-len(bounds) // BATCH_POINTS))
        self.distribution = IntDistribution(0, self.num_batches - 1)

    def first_bound(self, batch: int) -> float:
        """Least bound of a batch; infinite beyond the last one."""
        return float(self.bounds[batch * BATCH_POINTS]) if batch < self.num_batches and len(self.bounds) else NOTHING

    def next_batch(self, study: Study, *, retake: bool = False) -> int | None:
        """The first batch that is not finished; without ``retake`` one that nobody works on."""
        taken = {trial.params[BATCH] for trial in _finished(study) if trial.user_attrs["open_bound"] is None}
        if not retake:
            running = study.get_trials(deepcopy=False, states=(TrialState.RUNNING,))
            taken |= {trial.params[BATCH] for trial in running if BATCH in trial.params}
        return next((batch for batch in range(self.num_batches) if batch not in taken), None)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002 - Optuna's interface
        """The one parameter."""
        return {BATCH: self.distribution}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:  # noqa: ARG002
        """The next batch; a retaken one where all others are finished."""
        batch = self.next_batch(study)
        if batch is None or not _useful(study, self, batch):
            batch = self.next_batch(study, retake=True)
        return {BATCH: batch or 0}

    def sample_independent(
        self,
        study: Study,  # noqa: ARG002 - Optuna's interface
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:
        """Never needed: the space is known from the start."""
        raise AssertionError(f"{param_name} is not a parameter of this study")


def run_batches(
    bounds: NDArray[np.float64],
    evaluate: Callable[[range, float, float], BatchOutcome],
    *,
    request: str,
    known: float = NOTHING,
    storage: str | None = None,
    time_limit_s: float | None = None,
    on_progress: Callable[[Progress], None] | None = None,
) -> JointStudyResult:
    """Simulates batches of points, best bound first, until no bound is below the best value or the time is up.

    A worker that is killed loses its running batch, which another worker takes again once nothing else is left.

    Args:
        bounds: of all points, ascending.
        evaluate: the outcome of a stretch of the points, given the best value so far and the moment (`time.monotonic`) at which it must come to an end.
        request: text of everything that decides the answer; studies of one request in a storage are one.
        known: value of a plan that is known already, an expert's; points that cannot beat it are not simulated.
        storage: where workers meet (`storage_of`); None keeps the study in memory.
        time_limit_s: stop then; the batch that is at work stays open, and is taken again when the study goes on. None: no limit.
        on_progress: called before the first batch and after each one.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = BatchesBestBoundFirst(bounds, known)
    name = "schedlab-" + hashlib.sha256(request.encode()).hexdigest()[:16]
    study = optuna.create_study(study_name=name, storage=storage_of(storage), sampler=sampler, load_if_exists=True)
    study.set_user_attr("request", request)
    started, ran = time.monotonic(), False
    end = started + time_limit_s if time_limit_s is not None else NOTHING
    while True:
        progress = _progress(study, sampler, time.monotonic() - started)
        if on_progress is not None:
            on_progress(progress)
        if (ran and time.monotonic() > end) or not _open(study, sampler):
            break
        batch = sampler.next_batch(study)
        if batch is None or not _useful(study, sampler, batch):
            time.sleep(_POLL_S)  # another worker has the last useful batch: it may end, or be dead
            if not _open(study, sampler):
                continue
        trial = study.ask({BATCH: sampler.distribution})
        first = int(trial.params[BATCH]) * BATCH_POINTS
        outcome = evaluate(range(first, min(first + BATCH_POINTS, len(bounds))), _incumbent(study, sampler), end)
        _tell(study, trial, outcome)
        ran = True
    best = min(_completed(study), key=lambda one: (float(one.values[0]), int(one.user_attrs["point"])), default=None)
    needs = [int(one.user_attrs["least_bytes"]) for one in _finished(study) if one.user_attrs.get("least_bytes")]
    refused = together(one.user_attrs["refused"] for one in _finished(study))
    return JointStudyResult(best=best, progress=progress, least_bytes=min(needs, default=0), refused=refused)


def storage_of(text: str | None) -> str | JournalStorage | None:
    """Optuna's storage of a text: a database URL, ``journal:PATH``, or None for memory."""
    if text is None or not text.startswith(JOURNAL):
        return text
    return JournalStorage(JournalFileBackend(text.removeprefix(JOURNAL)))


def _tell(study: Study, trial: optuna.Trial, outcome: BatchOutcome) -> None:
    for key in ("point", "open_bound", "num_simulated", "least_bytes", "refused"):
        value = getattr(outcome, key)
        trial.set_user_attr(key, None if value == NOTHING else value)
    for key, value in outcome.attributes.items():
        trial.set_user_attr(key, value)
    if outcome.value is None:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, outcome.value)


def _completed(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _finished(study: Study) -> list[FrozenTrial]:
    trials = study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
    return [trial for trial in trials if "num_simulated" in trial.user_attrs]


def _incumbent(study: Study, sampler: BatchesBestBoundFirst) -> float:
    return min((float(trial.values[0]) for trial in _completed(study)), default=sampler.known)


def _useful(study: Study, sampler: BatchesBestBoundFirst, batch: int) -> bool:
    return sampler.first_bound(batch) < _incumbent(study, sampler)


def _open(study: Study, sampler: BatchesBestBoundFirst) -> bool:
    """Whether an unfinished batch could hold something better."""
    batch = sampler.next_batch(study, retake=True)
    return batch is not None and _useful(study, sampler, batch)


def _progress(study: Study, sampler: BatchesBestBoundFirst, elapsed_s: float) -> Progress:
    finished, incumbent = _finished(study), _incumbent(study, sampler)
    following = sampler.next_batch(study, retake=True)
    bounds = [incumbent] if following is None else [incumbent, sampler.first_bound(following)]
    return Progress(
        incumbent=incumbent, lower_bound=min(bounds), num_simulated=sum(int(trial.user_attrs["num_simulated"]) for trial in finished), elapsed_s=elapsed_s
    )  # fmt: skip
