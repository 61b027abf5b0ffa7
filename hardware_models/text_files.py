"""Text files that users name, read with every mistake named: file, place, rule and remedy."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Any

from hardware_models.errors import InputError
from hardware_models.files import said

_TOML_PLACE = re.compile(r"^(?P<what>.*) \(at (?:line (?P<line>\d+), column \d+|end of document)\)$", re.DOTALL)


def text_of(path: Path, *, remedy: str = "correct the path") -> str:
    """The text of a file, without the mark of byte order that spreadsheets and editors of Windows begin with.

    Args:
        path: of the file.
        remedy: what to do where it is not there or is not text.

    Raises:
        InputError: no such file, a folder, a file that may not be read, or no UTF-8 text.
    """
    try:
        return path.read_text(encoding="utf-8-sig")
    except FileNotFoundError as error:
        raise InputError(source=str(path), key="", value=None, rule="no such file", remedy=remedy) from error
    except OSError as error:
        raise InputError(source=str(path), key="", value=None, rule=f"cannot be read: {said(error)}", remedy=remedy) from error
    except UnicodeDecodeError as error:
        raise InputError(
            source=str(path), key=f"byte {error.start}", value=None, rule="text in UTF-8 is asked for", remedy=remedy
        ) from error


def toml_of(text: str, *, source: str, remedy: str = "") -> dict[str, Any]:
    """The tables of a TOML text.

    Args:
        text: of a file.
        source: what errors call it.
        remedy: what to do where it is not TOML.

    Raises:
        InputError: it does not parse (names the line) or is nested too deeply.
    """
    try:
        return tomllib.loads(text)
    except tomllib.TOMLDecodeError as error:
        place = _TOML_PLACE.match(str(error))
        line = (place and place["line"]) or text.count("\n") + 1
        rule = f"not TOML: {place['what'] if place else error}"
        raise InputError(source=source, key=f"line {line}", value=None, rule=rule, remedy=remedy) from error
    except RecursionError as error:
        raise InputError(source=source, key="", value=None, rule="not TOML: nested too deeply", remedy=remedy) from error


def json_of(text: str, *, source: str, remedy: str = "") -> Any:
    """The value of a JSON text.

    Args:
        text: of a file.
        source: what errors call it.
        remedy: what to do where it is not JSON.

    Raises:
        InputError: it does not parse (names the place) or is nested too deeply.
    """
    try:
        return json.loads(text)
    except (json.JSONDecodeError, RecursionError) as error:
        told = "nested too deeply" if isinstance(error, RecursionError) else error
        raise InputError(source=source, key="", value=None, rule=f"is not JSON: {told}", remedy=remedy) from error
