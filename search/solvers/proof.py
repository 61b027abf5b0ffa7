"""Proof: what a solver found, and the value that no answer to its problem can be below."""

from __future__ import annotations

from dataclasses import dataclass

from hardware_models.errors import InputError
from search.gap import relative_gap

EXACT_GAP = 1e-9
"""Relative gap up to which an answer counts as exact: rounding of sums, and of the integer program's bound."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Proof:
    """An objective to minimise and its proven lower bound, both in seconds."""

    objective_s: float
    """Value of the answer."""
    lower_bound_s: float
    """No answer to the stated problem is below."""

    def __post_init__(self) -> None:
        if not 0 <= self.lower_bound_s <= self.objective_s:
            rule = f"0 <= lower_bound_s <= objective_s must hold, but got {self.lower_bound_s} and {self.objective_s}"
            raise InputError(source="Proof", key="lower_bound_s", value=self.lower_bound_s, rule=rule)

    @classmethod
    def of(cls, objective_s: float, bound_s: float) -> Proof:
        """The proof of an objective and a bound that rounding may have put above it or below zero."""
        return cls(objective_s=objective_s, lower_bound_s=max(0.0, min(objective_s, bound_s)))

    @property
    def gap(self) -> float:
        """(objective - lower bound) / objective; 0 where the objective is 0."""
        return relative_gap(self.objective_s, self.lower_bound_s)

    @property
    def is_exact(self) -> bool:
        """Whether nothing better exists within the stated problem."""
        return self.gap <= EXACT_GAP

    @property
    def status(self) -> str:
        """``exact``, or ``bound`` where the lower bound is all that is proven."""
        return "exact" if self.is_exact else "bound"
