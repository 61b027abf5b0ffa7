"""TOML files: read into checked sections, every violation naming file, key, value, rule and remedy; written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Any, TypeVar

import tomli_w
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hardware_models.errors import InputError
from hardware_models.files import whole_file
from hardware_models.profile import Evidence
from hardware_models.text_files import text_of, toml_of

LEAST_LINK_RATE = 1e8
"""No link of a training machine moves fewer bytes in a second: a smaller value is in another unit (GB/s, Gb/s)."""
MOST_LINK_RATE = 1e14
"""No link of one device moves more: a larger value is in another unit (bits/s of a rack)."""
MOST_SECONDS = 1.0
"""No transfer or launch takes longer to start: a larger value is in another unit (us)."""
LEAST_MEMORY_BYTES = 2**20
"""No device, host or drive holds less: a smaller value is in another unit (GB, GiB)."""

Name = Annotated[str, Field(min_length=1)]
Count = Annotated[int, Field(ge=1)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, lt=MOST_SECONDS, allow_inf_nan=False)]
LinkRate = Annotated[float, Field(ge=LEAST_LINK_RATE, le=MOST_LINK_RATE, allow_inf_nan=False)]
MemoryBytes = Annotated[int, Field(ge=LEAST_MEMORY_BYTES)]

Bound = tuple[str, float]
"""Kind of a violation in pydantic's words, and the bound that a value passed."""
_Model = TypeVar("_Model", bound=BaseModel)


class Section(BaseModel):
    """A table of a file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=False)


class SourcedSection(Section):
    """A table with where its values are from."""

    evidence: Evidence
    source: Name
    date: Name


_LINK_REMEDY = "give the rate in bytes/s, not in GB/s or Gb/s"
LINK_BOUNDS: Mapping[Bound, str] = MappingProxyType(
    {
        ("greater_than_equal", LEAST_LINK_RATE): _LINK_REMEDY, ("less_than_equal", MOST_LINK_RATE): _LINK_REMEDY,
        ("less_than", MOST_SECONDS): "give seconds, not microseconds", ("greater_than_equal", LEAST_MEMORY_BYTES): "give bytes, not GB or GiB",
    }
)  # fmt: skip
"""What would do instead of a value beyond a bound."""
_REMEDIES = MappingProxyType({"finite_number": "give a finite number", "literal_error": "choose one of these"})


@dataclass(frozen=True, slots=True, kw_only=True)
class Remedies:
    """What a reader of one kind of file is told to do; the defaults are those of files that people write."""

    absent: str = "correct the path"
    broken: str = "restore the file"
    missing: str = "add it"
    bounds: Mapping[Bound, str] = field(default_factory=lambda: LINK_BOUNDS)


def read_section(model: type[_Model], path: Path, *, remedies: Remedies | None = None) -> _Model:
    """The file as the section ``model``.

    Args:
        model: of the whole file.
        path: of the file.
        remedies: what violations say to do instead; default: those of `Remedies`.

    Raises:
        InputError: no such file, not TOML, or a value that breaks a rule.
    """
    remedies = remedies or Remedies()
    values = toml_of(text_of(path, remedy=remedies.absent), source=str(path), remedy=remedies.broken)
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        raise _as_input_error(problem, path, remedies) from problem


def _as_input_error(problem: ValidationError, path: Path, remedies: Remedies) -> InputError:
    """The first violation in our words."""
    first = problem.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return InputError(source=str(path), key=key, value=None, rule="this key is required", remedy=remedies.missing)
    if kind == "extra_forbidden":
        return InputError(
            source=str(path), key=key, value=first["input"], rule="unknown key", remedy="remove it or correct its spelling"
        )
    bounds = [float(context[name]) for name in ("ge", "le", "lt") if name in context]
    remedy = _REMEDIES.get(kind, "correct the value")
    remedy = next((remedies.bounds[kind, bound] for bound in bounds if (kind, bound) in remedies.bounds), remedy)
    rule = first["msg"][0].lower() + first["msg"][1:]
    return InputError(source=str(path), key=key, value=first["input"], rule=rule, remedy=remedy)


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a TOML file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(tomli_w.dumps(values), encoding="utf-8")
