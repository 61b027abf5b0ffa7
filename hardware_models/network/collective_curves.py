"""Fitted collectives: physical lines and what measurements leave beside them, one file for each software stack."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, Literal

import numpy as np
from pydantic import Field

from hardware_models.errors import InputError
from hardware_models.network.cluster import Cluster
from hardware_models.network.cluster_file import load_cluster
from hardware_models.network.collective_algorithms import Algorithm, Floats, ProtocolLine, Scope
from hardware_models.toml_file import Count, Finite, Name, NonNegative, Section, read_section, write_toml

COLLECTIVES_FOLDER = Path(__file__).parents[1] / "data" / "collectives"


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveCurve:
    """Measured over physical seconds of one collective and placement, over size.

    **Model**: ``log(seconds / physical)`` is linear in ``log2 bytes`` between knots and constant beyond them, so that the physical
    latency and bandwidth hold outside.
    """

    collective: str
    num_ranks: int
    num_domains: int
    log2_bytes: tuple[float, ...]
    """Knots, increasing."""
    log_ratio: tuple[float, ...]
    num_rows: int
    relative_standard_error: float
    """Root mean square of the held-out logarithmic residuals."""
    median_error: float
    """Median of their magnitudes."""

    @property
    def scope(self) -> Scope:
        """Inside a domain or between several."""
        return "intra" if self.num_domains == 1 else "inter"

    def ratio(self, log2_bytes: Floats) -> Floats:
        """``log(seconds / physical)`` at sizes."""
        return np.asarray(np.interp(log2_bytes, self.log2_bytes, self.log_ratio))


@dataclass(frozen=True, slots=True, kw_only=True)
class CollectiveStack:
    """Everything fitted on one machine with one version of the library."""

    name: str
    cluster: str
    """Catalogued cluster that stands for the machine."""
    nccl_version: str
    """Empty where the source does not state it."""
    automatic: tuple[Scope, ...]
    """Scopes in which clusters are priced by it unasked; not those in which the machine is odd."""
    source: str
    commit: str
    date: str
    lines: Mapping[tuple[str, Scope], tuple[ProtocolLine, ...]]
    """By collective and scope."""
    curves: tuple[CollectiveCurve, ...]

    @property
    def machine(self) -> Cluster:
        """The cluster measured."""
        return _machine(self.cluster)

    def curves_of(self, collective: str, scope: Scope) -> tuple[CollectiveCurve, ...]:
        """Curves of one collective, by domains and ranks."""
        found = [curve for curve in self.curves if curve.collective == collective and curve.scope == scope]
        return tuple(sorted(found, key=lambda curve: (curve.num_domains, curve.num_ranks)))


class _LineSection(Section):
    algorithm: Algorithm
    base_s: NonNegative
    step_s: NonNegative
    inverse_efficiency: NonNegative


class _LinesSection(Section):
    collective: Name
    scope: Scope
    line: list[_LineSection] = Field(min_length=1)


class _CurveSection(Section):
    collective: Name
    num_ranks: Annotated[int, Field(ge=2)]
    num_domains: Count
    log2_bytes: list[Finite] = Field(min_length=1)
    log_ratio: list[Finite] = Field(min_length=1)
    num_rows: Count
    relative_standard_error: NonNegative
    median_error: NonNegative


class _StackFile(Section):
    format: Literal[1]
    name: Name
    cluster: Name
    nccl_version: str
    automatic: list[Scope]
    source: Name
    commit: Name
    date: Name
    lines: list[_LinesSection]
    curve: list[_CurveSection]


def read_stack(path: Path) -> CollectiveStack:
    """The stack in a file.

    Raises:
        InputError: a key is missing or unknown, knots do not increase, or lists differ in length.
    """
    file = read_section(_StackFile, path)
    for position, curve in enumerate(file.curve):
        increasing = all(before < after for before, after in zip(curve.log2_bytes, curve.log2_bytes[1:], strict=False))
        if len(curve.log2_bytes) != len(curve.log_ratio) or not increasing:
            raise InputError(
                source=str(path), key=f"curve.{position}.log2_bytes", value=curve.log2_bytes, rule="knots increase and log_ratio has as many values",
                remedy="repeat 'python -m hardware_models.network.collective_fit'",
            )  # fmt: skip
    lines = {(one.collective, one.scope): tuple(ProtocolLine(**line.model_dump()) for line in one.line) for one in file.lines}
    curves = tuple(CollectiveCurve(**_tuples(curve.model_dump())) for curve in file.curve)
    head = file.model_dump(exclude={"format", "lines", "curve", "automatic"})
    return CollectiveStack(**head, automatic=tuple(file.automatic), lines=MappingProxyType(lines), curves=curves)


def stack_table(stack: CollectiveStack) -> dict[str, Any]:
    """The TOML table of a stack."""
    head = {
        key: _list(getattr(stack, key)) for key in ("name", "cluster", "nccl_version", "automatic", "source", "commit", "date")
    }
    lines = [
        {"collective": collective, "scope": scope, "line": [{key: getattr(line, key) for key in ProtocolLine.__slots__} for line in of_scope]}
        for (collective, scope), of_scope in stack.lines.items()
    ]  # fmt: skip
    curves = [{key: _list(getattr(curve, key)) for key in CollectiveCurve.__slots__} for curve in stack.curves]
    return {"format": 1, **head, "lines": lines, "curve": curves}


def write_stack(path: Path, stack: CollectiveStack) -> None:
    """Writes a stack, whole or not at all."""
    write_toml(path, stack_table(stack))


@lru_cache(maxsize=1)
def catalogued_stacks() -> tuple[CollectiveStack, ...]:
    """The stacks that the project knows, by name."""
    return tuple(read_stack(path) for path in sorted(COLLECTIVES_FOLDER.glob("*.toml")))


@lru_cache(maxsize=64)
def _machine(name: str) -> Cluster:
    return load_cluster(name)


def _tuples(values: dict[str, Any]) -> dict[str, Any]:
    return {key: tuple(value) if isinstance(value, list) else value for key, value in values.items()}


def _list(value: object) -> object:
    return list(value) if isinstance(value, tuple) else value
