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
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from search.gap import CERTIFIED_GAP, relative_gap
from search.joint.refusals import together
from search.storage import close, storage_of

BATCH = "batch"
"""Name of the study's only parameter: which stretch of the points, in order of their bounds."""
OUTCOME = "outcome"
"""Name of the attribute that says what a batch gave, but for its best plan."""
BATCH_POINTS = 64
"""Points of a batch: one trial is written for them together, so that storage is not the bottleneck."""
NOTHING = float("inf")
"""Value where there is no plan."""
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

    def joined(self, later: BatchOutcome) -> BatchOutcome:
        """Of both."""
        best = self if later.value is None or (self.value is not None and self.value <= later.value) else later
        return BatchOutcome(
            value=best.value, point=best.point, attributes=best.attributes, open_bound=min(self.open_bound, later.open_bound),
            num_simulated=self.num_simulated + later.num_simulated, refused=together([self.refused, later.refused]),
            least_bytes=min(self.least_bytes or later.least_bytes, later.least_bytes or self.least_bytes),
        )  # fmt: skip


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
        return relative_gap(self.incumbent, self.lower_bound)


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


@dataclass(frozen=True, slots=True, kw_only=True)
class Look:
    """The trials of a study at one moment, read once: a database takes its time to answer."""

    finished: tuple[FrozenTrial, ...]
    looked_at: frozenset[int]
    """Batches that were simulated to their end."""
    at_work: frozenset[int]
    """Batches that a worker simulates, or that a killed one has left."""

    @property
    def best(self) -> float:
        """The best value; infinite where there is none."""
        return min((value_of(trial) for trial in self.finished), default=NOTHING)


def look_at(study: Study) -> Look:
    """How a study stands now."""
    trials = study.get_trials(deepcopy=False)
    finished = tuple(trial for trial in trials if trial.state.is_finished() and OUTCOME in trial.user_attrs)
    running = (trial for trial in trials if trial.state is TrialState.RUNNING and BATCH in trial.params)
    closed = (trial for trial in finished if trial.user_attrs[OUTCOME]["open_bound"] is None)
    return Look(
        finished=finished, looked_at=frozenset(trial.params[BATCH] for trial in closed), at_work=frozenset(trial.params[BATCH] for trial in running)
    )  # fmt: skip


def value_of(trial: FrozenTrial) -> float:
    """The value of a finished trial; infinite where nothing in its batch fits or is better."""
    return float(trial.values[0]) if trial.state is TrialState.COMPLETE else NOTHING


class BatchesBestBoundFirst(BaseSampler):
    """Proposes the batch with the least bound that nobody has tried or is trying; a deterministic sampler.

    Args:
        bounds: of all points.
        known: value of a plan that is known already.
    """

    def __init__(self, bounds: NDArray[np.float64], known: float = NOTHING) -> None:
        self.known = known
        self.num_batches = max(1, -(-len(bounds) // BATCH_POINTS))
        self.distribution = IntDistribution(0, self.num_batches - 1)
        self._least = (
            np.minimum.reduceat(bounds, np.arange(0, len(bounds), BATCH_POINTS)) if len(bounds) else np.array([NOTHING])
        )
        self._order = np.argsort(self._least, kind="stable").tolist()

    def first_bound(self, batch: int) -> float:
        """Least bound of a batch."""
        return float(self._least[batch])

    def next_batch(self, look: Look, *, retake: bool = False) -> int | None:
        """The batch with the least bound that is not finished; without ``retake`` one that nobody works on."""
        taken = look.looked_at if retake else look.looked_at | look.at_work
        return next((batch for batch in self._order if batch not in taken), None)

    def useful(self, batch: int | None, look: Look) -> bool:
        """Whether a batch could hold something better than the best value so far."""
        return batch is not None and self.first_bound(batch) < min(look.best, self.known)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002 - Optuna's interface
        """The one parameter."""
        return {BATCH: self.distribution}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:  # noqa: ARG002
        """The next batch; a retaken one where all others are finished."""
        look = look_at(study)
        batch = self.next_batch(look)
        if not self.useful(batch, look):
            batch = self.next_batch(look, retake=True)
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
        bounds: of all points, in an order that all workers of a storage share.
        evaluate: the outcome of a stretch of the points, given the best value so far and the moment (`time.monotonic`) at which it must come to an end.
        request: text of everything that decides the answer; studies of one request in a storage are one.
        known: value of a plan that is known already, an expert's; points that cannot beat it are not simulated.
        storage: where workers meet (`search.storage.storage_of`); None keeps the study in memory.
        time_limit_s: stop then; the batch that is at work stays open, and is taken again when the study goes on. None: no limit.
        on_progress: called before the first batch and after each one.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = BatchesBestBoundFirst(bounds, known)
    name = "schedlab-" + hashlib.sha256(request.encode()).hexdigest()[:16]
    kept = storage_of(storage)
    study = optuna.create_study(study_name=name, storage=kept, sampler=sampler, load_if_exists=True)
    study.set_user_attr("request", request)
    started, ran = time.monotonic(), False
    end = started + time_limit_s if time_limit_s is not None else NOTHING
    while True:
        look = look_at(study)
        progress = _progress(look, sampler, time.monotonic() - started)
        if on_progress is not None:
            on_progress(progress)
        if (ran and time.monotonic() > end) or not sampler.useful(sampler.next_batch(look, retake=True), look):
            break
        if not sampler.useful(sampler.next_batch(look), look):
            time.sleep(_POLL_S)  # another worker has the last useful batch: it may end, or be dead
            look = look_at(study)
            if not sampler.useful(sampler.next_batch(look, retake=True), look):
                continue
        trial = study.ask({BATCH: sampler.distribution})
        first = int(trial.params[BATCH]) * BATCH_POINTS
        outcome = evaluate(range(first, min(first + BATCH_POINTS, len(bounds))), progress.incumbent, end)
        _tell(study, trial, outcome)
        ran = True
    best = min(
        (one for one in look.finished if one.state is TrialState.COMPLETE),
        key=lambda one: (value_of(one), _outcome(one)["point"]),
        default=None,
    )
    needs = [int(_outcome(one)["least_bytes"]) for one in look.finished if _outcome(one)["least_bytes"]]
    refused = together(_outcome(one)["refused"] for one in look.finished)
    close(kept)
    return JointStudyResult(best=best, progress=progress, least_bytes=min(needs, default=0), refused=refused)


def _tell(study: Study, trial: optuna.Trial, outcome: BatchOutcome) -> None:
    open_bound = None if outcome.open_bound == NOTHING else outcome.open_bound
    known = {name: getattr(outcome, name) for name in ("point", "num_simulated", "least_bytes")}
    trial.set_user_attr(OUTCOME, known | {"open_bound": open_bound, "refused": dict(outcome.refused)})
    for key, value in outcome.attributes.items():
        trial.set_user_attr(key, value)
    if outcome.value is None:
        study.tell(trial, state=TrialState.PRUNED)
    else:
        study.tell(trial, outcome.value)


def _outcome(trial: FrozenTrial) -> Mapping[str, Any]:
    found: Mapping[str, Any] = trial.user_attrs[OUTCOME]
    return found


def _progress(look: Look, sampler: BatchesBestBoundFirst, elapsed_s: float) -> Progress:
    incumbent, following = min(look.best, sampler.known), sampler.next_batch(look, retake=True)
    bound = incumbent if following is None else min(incumbent, sampler.first_bound(following))
    count = sum(int(_outcome(trial)["num_simulated"]) for trial in look.finished)
    return Progress(incumbent=incumbent, lower_bound=bound, num_simulated=count, elapsed_s=elapsed_s)
