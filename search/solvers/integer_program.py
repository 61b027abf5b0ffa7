"""IntegerProgram: a mixed-integer linear program row by row, solved by HiGHS."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace

import numpy as np
import numpy.typing as npt

Floats = npt.NDArray[np.float64]
Terms = Mapping[int, float]
"""Coefficient of each variable, by its number."""
TOLERANCE = 1e-6
"""Of rows and integers in HiGHS: what differs by less is equal to it."""
_OPTIMAL, _LIMIT, _INFEASIBLE = 0, 1, 2
"""Statuses that `scipy.optimize.milp` returns and that can happen here."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ProgramAnswer:
    """Values of the best solution found, none of which has to exist when time ran out, and the proven bound."""

    values: Floats | None
    objective: float
    bound: float
    is_infeasible: bool

    def bound_for(self, objective: float) -> float:
        """The bound, or an objective that exceeds it by no more than what the solver takes for equal."""
        return objective if objective - self.bound <= TOLERANCE * abs(objective) else self.bound

    def times(self, unit: float) -> ProgramAnswer:
        """The answer to a program that was stated in multiples of ``unit``."""
        return replace(self, objective=self.objective * unit, bound=self.bound * unit)


class IntegerProgram:
    """Minimises a linear objective; variables are numbered in the order in which they were made.

    State quantities in units in which they are about 1: the solver's `TOLERANCE` is absolute.
    """

    def __init__(self) -> None:
        self._costs: list[float] = []
        self._most: list[float] = []
        self._integral: list[int] = []
        self._entries: list[tuple[int, int, float]] = []
        self._bounds: list[float] = []

    def variable(self, *, cost: float = 0.0, most: float = np.inf, integral: bool = False) -> int:
        """A new variable between 0 and ``most``."""
        self._costs.append(cost)
        self._most.append(most)
        self._integral.append(int(integral))
        return len(self._costs) - 1

    def choice(self, *, cost: float = 0.0) -> int:
        """A new variable that is 0 or 1."""
        return self.variable(cost=cost, most=1.0, integral=True)

    def at_most(self, terms: Terms, bound: float) -> None:
        """Asks for sum(terms) <= bound."""
        row = len(self._bounds)
        self._entries += [(row, column, value) for column, value in terms.items() if value]
        self._bounds.append(bound)

    def at_least(self, terms: Terms, bound: float) -> None:
        """Asks for sum(terms) >= bound."""
        self.at_most({column: -value for column, value in terms.items()}, -bound)

    def exactly_one(self, columns: list[int]) -> None:
        """Asks for one of the choices."""
        self.at_most(dict.fromkeys(columns, 1.0), 1.0)
        self.at_least(dict.fromkeys(columns, 1.0), 1.0)

    def solve(self, *, time_limit_s: float | None = None, relaxed: bool = False) -> ProgramAnswer:
        """The optimum, or what is known at the time limit.

        Args:
            time_limit_s: None: as long as it takes.
            relaxed: integers may be fractions: the objective is a bound.
        """
        from scipy.optimize import Bounds, LinearConstraint, milp  # noqa: PLC0415 - slow to import, needed where a program is solved
        from scipy.sparse import csr_array  # noqa: PLC0415 - as above

        if not self._costs:
            feasible = all(bound >= 0 for bound in self._bounds)
            return ProgramAnswer(values=np.zeros(0) if feasible else None, objective=0.0, bound=0.0, is_infeasible=not feasible)
        rows, columns = (np.array([entry[place] for entry in self._entries], np.int64) for place in (0, 1))
        values = np.array([value for _, _, value in self._entries], np.float64)
        matrix = csr_array((values, (rows, columns)), shape=(len(self._bounds), len(self._costs)))
        options = {"mip_rel_gap": 0.0, "presolve": True} | ({} if time_limit_s is None else {"time_limit": time_limit_s})
        found = milp(
            np.array(self._costs),
            integrality=np.zeros(len(self._costs)) if relaxed else np.array(self._integral),
            bounds=Bounds(np.zeros(len(self._costs)), np.array(self._most)),
            constraints=LinearConstraint(matrix, -np.inf, np.array(self._bounds)),
            options=options,
        )
        assert found.status in {_OPTIMAL, _LIMIT, _INFEASIBLE}, found.message
        objective = np.inf if found.x is None else float(found.fun)
        known = getattr(found, "mip_dual_bound", None)
        bound = objective if found.status == _OPTIMAL and (relaxed or known is None) else known
        return ProgramAnswer(
            values=found.x,
            objective=objective,
            bound=-np.inf if bound is None else float(bound),
            is_infeasible=found.status == _INFEASIBLE,
        )
