"""Plans as TOML: read with every mistake named (file, key, value, rule), written whole or not at all."""

from __future__ import annotations

import json
import re
from collections.abc import Mapping
from dataclasses import asdict, fields
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any, cast, get_type_hints

import tomli_w
from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.files import whole_file
from hardware_models.text_files import text_of, toml_of
from simulator.plan import FILE_PREFIX, MemoryBlock, Plan


def read_plan(path: Path) -> Plan:
    """The plan of a TOML file.

    Raises:
        InputError: no such file, TOML that does not parse (names the line), or a key or value that breaks a rule.
    """
    return parse_plan(text_of(path, remedy="give the path of a plan file"), source=str(path))


def parse_plan(text: str, *, source: str = "plan") -> Plan:
    """The plan of a TOML text; ``source`` is what errors call it.

    Raises:
        InputError: as `read_plan`.
    """
    return plan_from_dict(toml_of(text, source=source), source=source)


def plan_from_dict(table: Mapping[str, Any], *, source: str = "plan") -> Plan:
    """The plan of nested tables, as TOML or JSON hold it.

    Raises:
        InputError: as `read_plan`.
    """
    if "serving" in table:
        rule = "serving is not yet supported: plans describe training"
        raise InputError(source=source, key="serving", value=None, rule=rule, remedy="remove the section")
    _check_keys(table, source)
    try:
        # In strict JSON a list stands for a tuple and a table for a section; any other conversion is a mistake.
        return _adapter().validate_json(json.dumps(table, default=str), strict=True)
    except ValidationError as error:
        raise _as_input_error(error, table, source) from error


def plan_to_dict(plan: Plan) -> dict[str, Any]:
    """Nested tables of a plan: every key whose value is not the model's, the solver's or the framework's own."""
    return {name: section for name, section in _without_none(asdict(plan)).items() if section}


def format_plan(plan: Plan) -> str:
    """TOML of a plan; `parse_plan` gives the plan back."""
    return tomli_w.dumps(plan_to_dict(plan))


def write_plan(plan: Plan, path: Path) -> None:
    """Writes a plan's TOML: a reader sees the old file or the whole new one."""
    with whole_file(path) as temporary:
        temporary.write_text(format_plan(plan), encoding="utf-8")


def referenced_path(value: str, *, plan_path: Path) -> Path:
    """The file that a value such as ``file:SEQ`` names; a relative one starts at the plan's folder."""
    return plan_path.parent / value.removeprefix(FILE_PREFIX)


@cache
def _adapter() -> TypeAdapter[Plan]:
    return TypeAdapter(Plan)


def _without_none(value: Any) -> Any:
    if isinstance(value, dict):
        return {key: _without_none(one) for key, one in value.items() if one is not None and one != ()}
    if isinstance(value, tuple):
        return [_without_none(one) for one in value]
    return value


def _check_keys(table: Mapping[str, Any], source: str) -> None:
    """Refuses unknown sections and keys, naming the nearest known one (pydantic ignores them in a plain dataclass)."""
    sections = get_type_hints(Plan)
    _check_names(table, tuple(sections), prefix="", source=source)
    for name, section in table.items():
        if isinstance(section, Mapping):
            _check_names(section, _names(sections[name]), prefix=f"{name}.", source=source)
    exceptions = table.get("memory", {}).get("block", ()) if isinstance(table.get("memory"), Mapping) else ()
    for position, exception in enumerate(exceptions if isinstance(exceptions, list) else ()):
        if isinstance(exception, Mapping):
            _check_names(exception, _names(MemoryBlock), prefix=f"memory.block[{position}].", source=source)


def _names(section: type) -> tuple[str, ...]:
    return tuple(one.name for one in fields(section))


def _check_names(table: Mapping[str, Any], known: tuple[str, ...], *, prefix: str, source: str) -> None:
    for name in table:
        if name not in known:
            near = get_close_matches(name, known, n=1)
            rule = "unknown key" if near else f"unknown key; known are {', '.join(known)}"
            remedy = f"did you mean {prefix}{near[0]}?" if near else ""
            raise InputError(source=source, key=f"{prefix}{name}", value=table[name], rule=rule, remedy=remedy)


def _as_input_error(error: ValidationError, table: Mapping[str, Any], source: str) -> InputError:
    """The first mistake, in the words of the rule that it breaks."""
    details = error.errors(include_url=False)
    first = details[0]
    path, value = _locate(first, table)
    cause = first.get("ctx", {}).get("error")
    if isinstance(cause, InputError):
        key = re.sub(r"^memory\.block(?=\.)", path, cause.key) if path.startswith("memory.block[") else cause.key
        if isinstance(cause, UnknownNameError):
            return UnknownNameError(source=source, key=key, value=cause.value, known=cause.known)
        return InputError(source=source, key=key, value=cause.value, rule=cause.rule, remedy=cause.remedy)
    wanted = [
        one["msg"].removeprefix("Input should be ").replace("an object", "a table")
        for one in details
        if _locate(one, table)[0] == path
    ]
    return InputError(source=source, key=path, value=value, rule=f"must be {' or '.join(dict.fromkeys(wanted))}")


def _locate(detail: ErrorDetails, table: Mapping[str, Any]) -> tuple[str, Any]:
    """Dotted key and value of a mistake. Its location ends with names of union members, which are no keys: the walk stops there."""
    path, value = "", cast("Any", table)
    for step in detail["loc"]:
        inside = isinstance(value, Mapping) if isinstance(step, str) else isinstance(value, list)
        if not inside:
            break
        path = (f"{path}.{step}" if path else str(step)) if isinstance(step, str) else f"{path}[{step}]"
        value = value[step]
    return path, value
