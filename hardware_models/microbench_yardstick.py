"""A fixed piece of work that says how fast a machine is right now: measured between kernels while calibrating and between steps while replaying (torch only).

On a machine that others use too, clocks and shares of cores change within minutes by more than predictions are off. The ratio of the two says how much.
"""

from __future__ import annotations

import time

import torch

_PRODUCT_SIZE = 512
_ADDED_ELEMENTS = 2**22
"""48 MiB read and written: beyond the last-level cache of most processors."""
_REPEATS = 4


class Yardstick:
    """Products bound by arithmetic and sums bound by memory, about half of the time each on a CPU.

    Of a CPU; a GPU's clocks are read instead.
    """

    def __init__(self) -> None:
        self._square = torch.full((_PRODUCT_SIZE, _PRODUCT_SIZE), 1.0 / _PRODUCT_SIZE)
        self._product = torch.empty_like(self._square)
        self._long = torch.ones(_ADDED_ELEMENTS)
        self._sum = torch.empty_like(self._long)
        self.seconds()

    def seconds(self) -> float:
        """Wall time of the work, once."""
        begin = time.perf_counter()
        with torch.no_grad():
            for _ in range(_REPEATS):
                torch.mm(self._square, self._square, out=self._product)
                torch.add(self._long, self._long, out=self._sum)
        return time.perf_counter() - begin
