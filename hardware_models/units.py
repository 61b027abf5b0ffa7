"""Units: the one place where sizes and times change their scale. Inside, everything is SI (bytes, seconds)."""

from __future__ import annotations

import re
from types import MappingProxyType

from hardware_models.errors import InputError

KB, MB, GB, TB = 10**3, 10**6, 10**9, 10**12
KIB, MIB, GIB, TIB = 2**10, 2**20, 2**30, 2**40
MS_PER_S = 1e3
US_PER_S = 1e6
TFLOP = 1e12

DTYPE_BYTES = MappingProxyType(
    {
        "float64": 8, "float32": 4, "tf32": 4, "float16": 2, "bfloat16": 2, "float8_e4m3fn": 1, "float8_e5m2": 1,
        "int64": 8, "int32": 4, "int16": 2, "int8": 1, "uint8": 1, "bool": 1, "complex64": 8, "complex128": 16,
    }
)  # fmt: skip
"""Bytes of one element, by torch's name of the dtype (tf32 is stored as float32)."""

MOST_BYTES = 2**20 * TIB
"""No device, host or budget holds more; products with it stay within 64 bits."""

_SIZE_UNITS = {"": 1, "B": 1, "KB": KB, "MB": MB, "GB": GB, "TB": TB, "KIB": KIB, "MIB": MIB, "GIB": GIB, "TIB": TIB}
_SIZE = re.compile(r"^\s*(\d+(?:\.\d+)?)\s*([A-Za-z]*)\s*$")


def parse_bytes(text: str, *, source: str, key: str) -> int:
    """Bytes of a size such as ``40GiB``, ``512 MB`` or ``1000000``.

    Raises:
        InputError: no number, 0, more than `MOST_BYTES`, or a unit other than B, KB .. TB (powers of 1000) and KiB .. TiB (powers of 1024).
    """
    match = _SIZE.match(text)
    factor = _SIZE_UNITS.get(match.group(2).upper()) if match else None
    if match is None or factor is None:
        raise InputError(
            source=source, key=key, value=text, rule="a size is a number and a unit", remedy="write 40GiB, 512MB or 1e9 as 1GB"
        )
    size_bytes = int(float(match.group(1)) * factor)
    if not 0 < size_bytes <= MOST_BYTES:
        raise InputError(
            source=source, key=key, value=text, rule=f"0 < size <= {format_bytes(MOST_BYTES)} must hold", remedy="correct the number or its unit"
        )  # fmt: skip
    return size_bytes


def format_bytes(size_bytes: float) -> str:
    """Text of a size in binary units, four significant digits: ``3.214 GiB``."""
    for unit, scale in (("TiB", TIB), ("GiB", GIB), ("MiB", MIB), ("KiB", KIB)):
        if abs(size_bytes) >= scale:
            return f"{size_bytes / scale:.4g} {unit}"
    return f"{size_bytes:.0f} B"
