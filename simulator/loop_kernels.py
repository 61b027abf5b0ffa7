"""Compiled: how functions become parts of the loop that calls them."""

from __future__ import annotations

from numba import njit

part_of_loop = njit(cache=True, forceinline=True, _nrt=False)
"""Decorator of a function that makes no arrays: it becomes part of its caller, and counts no references to the arrays that it is given.

Counting is an atomic operation for each array, before and behind each call. In the engines' loop that cost more than all the rest: without it, the loop is twice
to four times as fast. Numba refuses a function that makes an array under this decorator.
"""
