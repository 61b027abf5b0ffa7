"""What a study is known by: another program, another device or another model is another study, wherever and in whichever process."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from dataclasses import dataclass, replace
from pathlib import Path
from types import MappingProxyType

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from search.study_key import PACKAGES, ROOT, fingerprint, program_digest, study_text
from simulator.model_source import model_source


def small_program(root: Path) -> Path:
    """Packages of two files each."""
    for package in PACKAGES:
        (root / package / "results").mkdir(parents=True)
        (root / package / "rule.py").write_text(f"VALUE = '{package}'\n")
        (root / package / "table.csv").write_text("1,2\n")
    return root


def changed(root: Path, name: str, text: str) -> str:
    """The digest with one file written anew, taken as another process would."""
    (root / name).write_text(text)
    program_digest.cache_clear()
    return program_digest(root)


def test_code_and_data_decide_the_digest_and_nothing_else_does(tmp_path: Path) -> None:
    root = small_program(tmp_path / "one")
    first = program_digest(root)
    assert program_digest(Path(shutil.copytree(root, tmp_path / "elsewhere"))) == first
    assert changed(root, "search/README.md", "words") == first
    assert changed(root, "search/results/gains.csv", "3,4\n") == first
    for name in ("simulator/rule.py", "hardware_models/table.csv", "search/new.toml"):
        other = changed(root, name, "5,6\n")
        assert other != first, name
        first = other


def test_bytes_that_move_from_one_file_to_the_next_are_a_change(tmp_path: Path) -> None:
    root = small_program(tmp_path)
    changed(root, "search/a.py", "12")
    before = changed(root, "search/b.py", "3")
    changed(root, "search/a.py", "1")
    assert changed(root, "search/b.py", "23") != before


def test_a_study_of_this_program_names_it() -> None:
    program_digest.cache_clear()
    assert study_text("gpt2", 8) == repr((program_digest(ROOT), "gpt2", 8))
    assert study_text("gpt2", 8) != study_text("gpt2", 9)


@dataclass(frozen=True)
class Held:
    """A dataclass around anything."""

    value: object


def test_contents_decide_a_fingerprint() -> None:
    pairs: list[tuple[object, object]] = [
        (1, 2), (1, 1.0), ("1", 1), (None, "None"), ((1, 2), (2, 1)), (((1,), 2), ((1, 2),)), ({"a": 1}, {"a": 2}),
        (np.array([1.0, 2.0]), np.array([1.0, 2.5])), (np.zeros((2, 3)), np.zeros((3, 2))), (np.zeros(2, np.int32), np.zeros(1, np.int64)),
    ]  # fmt: skip
    for one, other in pairs:
        assert fingerprint(Held(one)) != fingerprint(Held(other)), (one, other)
    assert fingerprint(MappingProxyType({"a": 1, "b": (2.5, "x")})) == fingerprint(MappingProxyType({"b": (2.5, "x"), "a": 1}))
    shared = Held((1, 2))
    assert fingerprint((shared, shared)) == fingerprint((Held((1, 2)), Held((1, 2))))
    with pytest.raises(TypeError, match="not of"):
        fingerprint(object())


def test_a_profile_with_another_value_is_another_device_even_under_its_name() -> None:
    device = load_hardware("h100-sxm")
    grid = device.grids[0]
    longer = replace(device, grids=(replace(grid, log_ratios=grid.log_ratios + 1e-9), *device.grids[1:]))
    assert fingerprint(device) == fingerprint(load_hardware("h100-sxm"))
    assert len({fingerprint(one) for one in (device, longer, replace(device, context_bytes=1))}) == 3


def test_a_fingerprint_is_the_same_in_every_process() -> None:
    program = "from search.study_key import fingerprint; print(fingerprint({'x': (1.5, 'y'), 'a': {'b': 2}}), end='')"
    other = subprocess.run(
        [sys.executable, "-c", program], capture_output=True, text=True, check=True, cwd=ROOT, env={**os.environ, "PYTHONHASHSEED": "1"}
    )  # fmt: skip
    assert other.stdout == fingerprint({"x": (1.5, "y"), "a": {"b": 2}})


def test_a_model_is_known_by_its_kernels_and_tensors() -> None:
    device = load_hardware("h100-sxm")
    one, same, other, longer = (
        fingerprint(model_source(name, device=device, seq_len=seq_len).workload(2))
        for name, seq_len in (("gpt2", 64), ("gpt2", 64), ("gpt2-medium", 64), ("gpt2", 65))
    )
    assert one == same
    assert len({one, other, longer}) == 3
