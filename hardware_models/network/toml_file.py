"""Reads a TOML file into a checked section; every violation names file, key, value, rule and remedy."""

from __future__ import annotations

import tomllib
from pathlib import Path
from typing import Annotated, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from hardware_models.errors import InputError

LEAST_BYTES_PER_S = 1e8
"""No link of a training machine moves less in a second: a smaller value is in another unit (GB/s, Gb/s)."""
MOST_BYTES_PER_S = 1e14
"""No link of one device moves more: a larger value is in another unit (bits/s of a rack)."""
MOST_SECONDS = 1.0
"""No transfer takes longer to start: a larger value is in another unit (us)."""
LEAST_MEMORY_BYTES = 2**20
"""No host or drive holds less: a smaller value is in another unit (GiB)."""

Rate = Annotated[float, Field(ge=LEAST_BYTES_PER_S, le=MOST_BYTES_PER_S, allow_inf_nan=False)]
Seconds = Annotated[float, Field(ge=0, lt=MOST_SECONDS, allow_inf_nan=False)]
Fraction = Annotated[float, Field(gt=0, le=1, allow_inf_nan=False)]
NonNegative = Annotated[float, Field(ge=0, allow_inf_nan=False)]
Positive = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Finite = Annotated[float, Field(allow_inf_nan=False)]
Count = Annotated[int, Field(ge=1)]
Name = Annotated[str, Field(min_length=1)]

_Model = TypeVar("_Model", bound=BaseModel)


class Section(BaseModel):
    """A table of a TOML file: unknown keys are errors."""

    model_config = ConfigDict(extra="forbid", strict=False)


class SourcedSection(Section):
    """A value with where it is from."""

    evidence: Literal["measured", "published", "datasheet"]
    source: Name
    date: Name


def read_section(model: type[_Model], path: Path) -> _Model:
    """The file as the section ``model``.

    Raises:
        InputError: no such file, not TOML, or a value that breaks a rule.
    """
    try:
        values = tomllib.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as problem:
        raise InputError(source=str(path), key="", value=None, rule="no such file", remedy="correct the path") from problem
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as problem:
        raise InputError(
            source=str(path), key="", value=None, rule=f"not whole or not TOML: {problem}", remedy="restore the file"
        ) from problem
    try:
        return model.model_validate(values)
    except ValidationError as problem:
        raise _as_input_error(problem, path) from problem


def _as_input_error(problem: ValidationError, path: Path) -> InputError:
    """The first violation in our words."""
    first = problem.errors()[0]
    key = ".".join(str(part) for part in first["loc"])
    kind, context = first["type"], first.get("ctx", {})
    if kind == "missing":
        return InputError(source=str(path), key=key, value=None, rule="this key is required", remedy="add it")
    if kind == "extra_forbidden":
        remedy = "remove it or correct its spelling"
        return InputError(source=str(path), key=key, value=first["input"], rule="unknown key", remedy=remedy)
    remedy = {"finite_number": "give a finite number", "literal_error": "choose one of these"}.get(kind, "correct the value")
    if LEAST_BYTES_PER_S in context.values() or MOST_BYTES_PER_S in context.values():
        remedy = "give the rate in bytes/s, not in GB/s or Gb/s"
    if kind == "less_than" and context.get("lt") == MOST_SECONDS:
        remedy = "give seconds, not microseconds"
    if LEAST_MEMORY_BYTES in context.values():
        remedy = "give bytes, not GB or GiB"
    rule = first["msg"][0].lower() + first["msg"][1:]
    return InputError(source=str(path), key=key, value=first["input"], rule=rule, remedy=remedy)
