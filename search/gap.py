"""How far an answer is from what is proven: one formula for all searches and solvers."""

from __future__ import annotations

import math

CERTIFIED_GAP = 1e-9
"""Gap up to which an answer counts as proven optimal: what rounding leaves."""


def relative_gap(value: float, lower_bound: float) -> float:
    """(value - lower bound) / value; 0 where the value is 0, 1 where it is infinite (nothing is known yet)."""
    if math.isinf(value):
        return 1.0
    return (value - lower_bound) / value if value else 0.0
