"""What a study is known by in a storage: the request, the contents of what it names, and the program that decides values.

A storage outlives the program that filled it. Values of one version of the simulator beside those of another would prove nothing, so that each has studies of its own.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping
from dataclasses import fields, is_dataclass
from functools import cache
from pathlib import Path

import numpy as np

PACKAGES = ("hardware_models", "simulator", "search")
"""Whose code and data decide the value of a plan, and which plans are looked at."""
SUFFIXES = frozenset({".py", ".toml", ".csv"})
RESULTS = "results"
"""Folder of tables that were written by the program, and are not read by it."""
ROOT = Path(__file__).resolve().parents[1]
"""Where the packages lie, in a checkout as where they are installed."""
_SHOWN = 16
"""Hexadecimal digits of a digest that are kept: 64 bits."""


def study_text(*parts: object) -> str:
    """All that decides a study's answer, as text: studies of one storage with the same text are one.

    Args:
        parts: of the request; `fingerprint` of those whose ``repr`` does not say all.

    **Not in it**: versions of Python, numpy, HiGHS and torch.
    """
    return repr((program_digest(ROOT), *parts))


@cache
def program_digest(root: Path) -> str:
    """Digest of the code and data of `PACKAGES` below a folder, the same wherever that lies."""
    digest = hashlib.sha256()
    for package in PACKAGES:
        for path in sorted((root / package).rglob("*")):
            place = path.relative_to(root)
            if path.suffix in SUFFIXES and RESULTS not in place.parts:
                digest.update(f"{place.as_posix()} {path.stat().st_size}\n".encode())
                digest.update(path.read_bytes())
    return digest.hexdigest()[:_SHOWN]


def fingerprint(value: object) -> str:
    """Digest of a value's content: numbers, text, arrays, and dataclasses, sequences and mappings of these; equal contents have equal digests in every process."""
    return _digest(value, {}).hex()[:_SHOWN]


def _digest(value: object, known: dict[int, bytes]) -> bytes:
    """The digest of one value; ``known`` holds those of objects that were seen (all are alive while the outermost one is), as blocks of a model are shared."""
    if isinstance(value, str | bytes | int | float | complex | None):
        return hashlib.sha256(f"{type(value).__name__} {value!r}".encode()).digest()
    if id(value) in known:
        return known[id(value)]
    digest = hashlib.sha256(type(value).__name__.encode())
    if isinstance(value, np.ndarray):
        digest.update(f"{value.dtype.str} {value.shape}".encode() + np.ascontiguousarray(value).tobytes())
    elif is_dataclass(value):
        for field in fields(value):
            if field.compare:
                digest.update(field.name.encode() + _digest(getattr(value, field.name), known))
    elif isinstance(value, Mapping):
        for key in sorted(value, key=repr):
            digest.update(_digest(key, known) + _digest(value[key], known))
    elif isinstance(value, tuple | list):
        for one in value:
            digest.update(_digest(one, known))
    else:
        raise TypeError(
            f"a study's key is made of numbers, text, arrays, dataclasses, sequences and mappings, not of {value!r}"
        )
    known[id(value)] = digest.digest()
    return known[id(value)]
