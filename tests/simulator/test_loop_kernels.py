"""Parts of compiled loops: what they may not do is refused when they are compiled."""

from __future__ import annotations

import numpy as np
import pytest
from numba.core.errors import TypingError

from simulator.loop_kernels import part_of_loop


def test_a_part_that_makes_an_array_is_refused() -> None:
    """It could not be freed: nothing counts who uses it."""
    part = part_of_loop(_makes_an_array)
    with pytest.raises(TypingError, match="No implementation of function"):
        part(3)


def _makes_an_array(size: int) -> float:
    return float(np.zeros(size)[0])
