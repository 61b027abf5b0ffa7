"""TOML files, written whole or not at all."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomli_w

from hardware_models.files import whole_file


def write_toml(path: Path, values: Mapping[str, Any]) -> None:
    """Writes a TOML file, whole or not at all."""
    with whole_file(path) as temporary:
        temporary.write_text(tomli_w.dumps(values), encoding="utf-8")
