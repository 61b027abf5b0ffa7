"""What every test runs under: hypothesis without deadlines, the same fifty examples each time unless a test asks for more.

Each worker computes in one thread, and so do the processes that it starts: two that wait for each other on a busy core took up to four times as long.
Modules are collected without the garbage collector, which then leaves what they made alone: on the trees that pytest rewrites and on what torch imports it took three times as long as all else.
"""

from __future__ import annotations

import gc
import os

from hypothesis import settings

settings.register_profile("schedlab", deadline=None, derandomize=True, max_examples=50)
settings.load_profile("schedlab")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of numpy and torch, which are imported after this
gc.disable()


def pytest_collection_finish() -> None:
    gc.freeze()
    gc.enable()
