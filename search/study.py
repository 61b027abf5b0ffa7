"""The outer search: an Optuna study whose sampler proposes the point with the best bound first, until no bound is below the best."""

from __future__ import annotations

import hashlib
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import optuna
from optuna.distributions import BaseDistribution, CategoricalDistribution
from optuna.samplers import BaseSampler
from optuna.study import Study
from optuna.trial import FrozenTrial, TrialState

from hardware_models.errors import InfeasibleError
from search.gap import CERTIFIED_GAP, relative_gap
from search.storage import close, storage_of

POINT = "point"
"""Name of the study's only parameter: the text of a point."""


@dataclass(frozen=True, slots=True, kw_only=True)
class BoundedPoint:
    """A point of the outer space and a value that no plan there can be below."""

    text: str
    """Names the point in the study's storage, for example ``micro_batch=2``."""
    bound: float


@dataclass(frozen=True, slots=True, kw_only=True)
class Outcome:
    """What simulating a point gave."""

    value: float
    bound: float
    """Sharper than the point's first bound; equal to ``value`` where the inner solver was exact."""
    attributes: Mapping[str, Any]
    """Kept with the trial (plan, time, memory), as JSON."""


@dataclass(frozen=True, slots=True, kw_only=True)
class StudyResult:
    """The end of a study."""

    best: FrozenTrial
    lower_bound: float
    num_simulated: int
    infeasible: tuple[InfeasibleError, ...]
    """What each infeasible point answered."""

    @property
    def gap(self) -> float:
        """(best - lower bound) / best."""
        return relative_gap(float(self.best.values[0]), self.lower_bound)

    @property
    def certified(self) -> bool:
        """Whether the best is proven optimal within the model."""
        return self.gap <= CERTIFIED_GAP


class BestBoundFirst(BaseSampler):
    """Proposes the untried point with the lowest bound; a deterministic sampler.

    Args:
        points: the outer space.
    """

    def __init__(self, points: Sequence[BoundedPoint]) -> None:
        self._ordered = sorted(points, key=lambda point: (point.bound, point.text))
        self._distribution = CategoricalDistribution([point.text for point in points])

    @property
    def distribution(self) -> CategoricalDistribution:
        """Of the study's parameter."""
        return self._distribution

    def next_point(self, study: Study) -> BoundedPoint | None:
        """The untried point with the lowest bound; a trial that a killed process left running does not count as tried."""
        tried = {
            trial.params[POINT]
            for trial in study.get_trials(deepcopy=False, states=(TrialState.COMPLETE, TrialState.PRUNED))
            if POINT in trial.params
        }
        return next((point for point in self._ordered if point.text not in tried), None)

    def infer_relative_search_space(self, study: Study, trial: FrozenTrial) -> dict[str, BaseDistribution]:  # noqa: ARG002 - Optuna's interface
        """The one parameter."""
        return {POINT: self._distribution}

    def sample_relative(self, study: Study, trial: FrozenTrial, search_space: dict[str, BaseDistribution]) -> dict[str, Any]:  # noqa: ARG002
        """The next point's text."""
        point = self.next_point(study)
        return {POINT: (point or self._ordered[0]).text}

    def sample_independent(
        self,
        study: Study,  # noqa: ARG002 - Optuna's interface
        trial: FrozenTrial,  # noqa: ARG002
        param_name: str,
        param_distribution: BaseDistribution,  # noqa: ARG002
    ) -> Any:
        """Never needed: the space is known from the start."""
        raise AssertionError(f"{param_name} is not a parameter of this study")


def run_study(
    points: Sequence[BoundedPoint],
    simulate: Callable[[str], Outcome],
    *,
    request: str,
    storage: str | None = None,
    time_limit_s: float | None = None,
    on_trial: Callable[[Study, FrozenTrial], None] | None = None,
) -> StudyResult:
    """Simulates points, best bound first, until the best is proven or the time is up.

    Args:
        points: the outer space, at least one point.
        simulate: the best outcome at a point; raises InfeasibleError where none fits.
        request: text of everything that decides the answer; a study of the same request in the storage is gone on with.
        storage: see `search.storage.storage_of`; None keeps the study in memory.
        time_limit_s: stop after the trial that runs over it; None: no limit.
        on_trial: called after each trial.

    Raises:
        InfeasibleError: no point holds a plan that fits; repeats the answer of the point that needs the smallest change.
    """
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    sampler = BestBoundFirst(points)
    name = "schedlab-" + hashlib.sha256(request.encode()).hexdigest()[:16]
    kept = storage_of(storage)
    study = optuna.create_study(study_name=name, storage=kept, sampler=sampler, load_if_exists=True)
    study.set_user_attr("request", request)
    started = time.monotonic()
    num_simulated = 0
    while not _settled(study, sampler):
        if time_limit_s is not None and num_simulated and time.monotonic() - started > time_limit_s:
            break
        trial = study.ask({POINT: sampler.distribution})
        try:
            outcome = simulate(trial.params[POINT])
        except InfeasibleError as error:
            answer = {"limit": error.limit, "smallest_change": error.smallest_change, "needed_bytes": error.needed_bytes}
            trial.set_user_attr("infeasible", answer)
            frozen = study.tell(trial, state=TrialState.PRUNED)
        else:
            for key, value in outcome.attributes.items():
                trial.set_user_attr(key, value)
            trial.set_user_attr("bound", outcome.bound)
            frozen = study.tell(trial, outcome.value)
        num_simulated += 1
        if on_trial is not None:
            on_trial(study, frozen)
    found = _result(study, sampler, num_simulated)
    close(kept)
    return found


def _completed(study: Study) -> list[FrozenTrial]:
    return study.get_trials(deepcopy=False, states=(TrialState.COMPLETE,))


def _settled(study: Study, sampler: BestBoundFirst) -> bool:
    """Whether no untried point can be better than the best."""
    following = sampler.next_point(study)
    completed = _completed(study)
    if following is None:
        return True
    return bool(completed) and min(float(trial.values[0]) for trial in completed) <= following.bound


def _result(study: Study, sampler: BestBoundFirst, num_simulated: int) -> StudyResult:
    completed = _completed(study)
    infeasible = tuple(
        InfeasibleError(**trial.user_attrs["infeasible"])
        for trial in study.get_trials(deepcopy=False, states=(TrialState.PRUNED,))
        if "infeasible" in trial.user_attrs
    )
    if not completed:
        raise min(infeasible, key=lambda error: error.needed_bytes)
    best = min(completed, key=lambda trial: (float(trial.values[0]), trial.params[POINT]))
    value = float(best.values[0])
    following = sampler.next_point(study)
    bounds = [value, *(float(trial.user_attrs["bound"]) for trial in completed)]
    if following is not None:
        bounds.append(following.bound)
    return StudyResult(best=best, lower_bound=min(bounds), num_simulated=num_simulated, infeasible=infeasible)
