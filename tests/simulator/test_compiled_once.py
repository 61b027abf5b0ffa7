"""Compiled loops in fresh processes: importing compiles nothing, and what one process compiled the next one loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
FIRST_RUN = """
from time import perf_counter
from simulator import engine_compiled
from simulator.program import no_slowdown
from tests.simulator.test_engines_agree import two_copies
program = two_copies(slowdown=no_slowdown())
begin_s = perf_counter()
engine_compiled.record(program)
print(perf_counter() - begin_s)
"""
IMPORTS = """
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    import simulator.parallel.simulate_source, simulator.simulate
print(len(recorder.buffer))
"""
LEAST_RATIO = 4.0


def printed(script: str, cache: Path) -> float:
    """What a fresh process prints that keeps compiled code in a folder."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | {"NUMBA_CACHE_DIR": str(cache)}, capture_output=True, text=True, check=True
    )  # fmt: skip
    return float(done.stdout)


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_one_compiled(tmp_path: Path) -> None:
    first_s, second_s = printed(FIRST_RUN, tmp_path), printed(FIRST_RUN, tmp_path)
    assert second_s < first_s / LEAST_RATIO


@pytest.mark.slow
def test_importing_compiles_nothing(tmp_path: Path) -> None:
    assert printed(IMPORTS, tmp_path) == 0
