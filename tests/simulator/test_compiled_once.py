"""Compiled loops in fresh processes: importing compiles nothing, and what one process compiled the next one loads."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from simulator import engine_compiled
from simulator.program import no_slowdown
from tests.simulator.test_engines_agree import two_copies

ROOT = Path(__file__).parents[2]
COUNTED = """
from numba.core import event
with event.install_recorder("numba:compile") as recorder:
    {}
print(len(recorder.buffer))
"""
AGAIN = COUNTED.format("""
    from simulator import engine_compiled
    from simulator.program import no_slowdown
    from tests.simulator.test_engines_agree import two_copies
    engine_compiled.record(two_copies(slowdown=no_slowdown()))
""")
IMPORTS = COUNTED.format("import simulator.parallel.simulate_source, simulator.simulate")


def num_compiled(script: str, **environment: str) -> int:
    """How many functions a fresh process compiles."""
    done = subprocess.run(
        [sys.executable, "-c", script], cwd=ROOT, env=os.environ | environment, capture_output=True, text=True, check=True
    )
    return int(done.stdout)


@pytest.mark.slow
def test_a_second_process_loads_what_the_first_one_compiled(tmp_path: Path) -> None:
    engine_compiled.record(two_copies(slowdown=no_slowdown()))
    assert num_compiled(AGAIN) == 0
    alone = COUNTED.format("""
    from simulator.settle_kernels import disturbing
    import numpy
    disturbing(numpy.ones((1, 1)))
""")
    assert num_compiled(alone, NUMBA_CACHE_DIR=str(tmp_path)) > 0, "what is counted is there where nothing is kept"


@pytest.mark.slow
def test_importing_compiles_nothing(tmp_path: Path) -> None:
    assert num_compiled(IMPORTS, NUMBA_CACHE_DIR=str(tmp_path)) == 0
