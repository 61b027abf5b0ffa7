"""Bundle: plans to run on a machine that has only torch and numpy, each with the order of its blocks and the program that was predicted.

One JSON file, gzipped where its name ends in ``.gz``. This module runs there too: it imports nothing beyond the standard library, numpy and torch.
"""

from __future__ import annotations

import gzip
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields, replace
from pathlib import Path
from typing import Any

from hardware_models.errors import InputError
from hardware_models.files import whole_file
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.plan_sections import MemoryBlock
from simulator.sequence import Operation, format_sequence, parse_sequence

FORMAT = 1
KINDS = ("plan", "plain", "checkpoint", "save_on_cpu", "checkpoint+save_on_cpu")
"""A plan; the module as it is; the module with torch's own means: each layer checkpointed, saved tensors on the host, both."""
_SECTIONS = {"parallel": Parallel, "batch": Batch, "pipeline": Pipeline, "precision": Precision, "runtime": Runtime}


@dataclass(frozen=True, slots=True, kw_only=True)
class BundleCase:
    """One step to run."""

    name: str
    model: str
    """A name of `simulator.models.MODELS` that needs no package beyond torch, or ``package.module:function``."""
    batch: int
    """Samples per step."""
    seq_len: int | None
    plan: Plan
    kind: str = "plan"
    """One of `KINDS`; others than ``plan`` take batch, precision and optimizer from the plan."""
    operations: tuple[Operation, ...] = ()
    """Of each micro-batch; empty for other kinds than ``plan``."""
    predicted: Mapping[str, Any]
    """What ``schedlab simulate --json`` says of it; empty where nothing is predicted."""
    program: Mapping[str, Any]
    """The program's instructions: label, stream and duration of each."""

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise InputError(source=f"bundle case {self.name}", key="kind", value=self.kind, rule=f"one of {', '.join(KINDS)}")

    @property
    def micro_batch(self) -> int:
        """Samples at a time."""
        return self.plan.batch.micro_batch or self.batch


def write_bundle(cases: Sequence[BundleCase], path: Path) -> None:
    """Writes the file."""
    text = json.dumps({"format": FORMAT, "cases": [_case_to_json(case) for case in cases]})
    with whole_file(path) as temporary:
        temporary.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())


def read_bundle(path: Path) -> tuple[BundleCase, ...]:
    """The cases of a file.

    Raises:
        InputError: no such file, not a bundle, or of another format.
    """
    remedy = "write it with schedlab replay --bundle FILE or python -m validation.replay_suite bundle"
    try:
        content = path.read_bytes()
        table = json.loads(gzip.decompress(content) if path.suffix == ".gz" else content)
    except FileNotFoundError as problem:
        raise InputError(source=str(path), key="", value=None, rule="no such file", remedy=remedy) from problem
    except (ValueError, OSError, EOFError) as problem:
        raise InputError(source=str(path), key="", value=None, rule=f"not a bundle: {problem}", remedy=remedy) from problem
    if not isinstance(table, dict) or table.get("format") != FORMAT:
        found = table.get("format") if isinstance(table, dict) else None
        raise InputError(source=str(path), key="format", value=found, rule=f"this version reads format {FORMAT}", remedy=remedy)
    return tuple(_case_from_json(case) for case in table["cases"])


def _case_to_json(case: BundleCase) -> dict[str, Any]:
    rest = {field.name: getattr(case, field.name) for field in fields(BundleCase)}
    return rest | {"plan": asdict(case.plan), "operations": format_sequence(case.operations)}


def _case_from_json(table: dict[str, Any]) -> BundleCase:
    return BundleCase(**table | {"plan": plan_from_json(table["plan"]), "operations": parse_sequence(table["operations"])})


def plan_from_json(table: Mapping[str, Any]) -> Plan:
    """The plan of ``dataclasses.asdict`` after JSON made lists of its tuples."""
    sections = {name: section(**table[name]) for name, section in _SECTIONS.items()}
    partition = table["pipeline"]["partition"]
    if partition is not None:
        sections["pipeline"] = replace(sections["pipeline"], partition=tuple(partition))
    blocks = tuple(MemoryBlock(**block) for block in table["memory"]["block"])
    return Plan(memory=Memory(**{**table["memory"], "block": blocks}), **sections)
