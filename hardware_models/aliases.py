"""Names of devices in the wild (driver, papers, measurement files) to names of the catalogue."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Mapping
from difflib import get_close_matches
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType

from hardware_models.errors import InputError, UnknownNameError

ALIASES_FILE = Path(__file__).parent / "data" / "aliases.toml"
_VENDOR = re.compile(r"^(nvidia|tesla|geforce)+")
_CLOSE = 0.6
"""Least similarity (`difflib.SequenceMatcher.ratio`) of a name that is offered as what was meant."""


def device_named(text: str, *, memory_gb: float | None = None, source: str = "device") -> str:
    """The catalogue's name of a device.

    Args:
        text: a name as the driver, a paper or a measurement file gives it; case and punctuation do not matter.
        memory_gb: size of its memory as the vendor counts, where a table has it beside a name that stands for boards of several sizes.
        source: the file or flag that holds the name, for the message.

    Raises:
        UnknownNameError: no catalogued device has that name; lists the known ones and the closest.
        InputError: no board of that name has that much memory.
    """
    names, sizes = _table()
    key = _key(text)
    if memory_gb is not None and key in sizes:
        found = sizes[key].get(round(memory_gb))
        if found is None:
            raise InputError(
                source=source, key="memory_gb", value=memory_gb, rule=f"{text!r} has {' or '.join(str(size) for size in sizes[key])} GB",
                remedy="correct the size, or name the device as the catalogue does",
            )  # fmt: skip
        return found
    if key in names:
        return names[key]
    raise UnknownNameError(source=source, key="name", value=text, known=known_devices(), remedy=_remedy(key))


def known_devices() -> tuple[str, ...]:
    """Names of the catalogue, sorted."""
    return tuple(sorted(set(_table()[0].values())))


def closest_device(text: str) -> str | None:
    """The catalogue's name of the device whose name or alias is most like ``text``; None where none is."""
    names, _sizes = _table()
    close = get_close_matches(_key(text), names, n=1, cutoff=_CLOSE)
    return names[close[0]] if close else None


def _remedy(key: str) -> str:
    closest = closest_device(key)
    meant = f"did you mean {closest!r}? " if closest else ""
    return f"{meant}A device that is not catalogued is measured by 'schedlab calibrate --device cuda --out DIR' and named by its folder"


def _key(text: str) -> str:
    """Letters and digits only, without the vendor's prefix."""
    plain = re.sub(r"[^a-z0-9]+", "", text.lower())
    return _VENDOR.sub("", plain) or plain


@lru_cache(maxsize=1)
def _table() -> tuple[Mapping[str, str], Mapping[str, Mapping[int, str]]]:
    """Device by key, and device by key and memory size."""
    return read_aliases(ALIASES_FILE)


def read_aliases(path: Path) -> tuple[Mapping[str, str], Mapping[str, Mapping[int, str]]]:
    """Device by plain name, and by plain name and memory size.

    Raises:
        InputError: one name stands for two devices.
    """
    values = tomllib.loads(path.read_text(encoding="utf-8"))
    names: dict[str, str] = {}
    for device, aliases in values["names"].items():
        for alias in (device, *aliases):
            other = names.setdefault(_key(alias), device)
            if other != device:
                raise InputError(
                    source=str(path), key=f"names.{device}", value=alias, rule=f"a name stands for one device, but this one is {other!r} too",
                    remedy="remove one of them",
                )  # fmt: skip
    sizes = {
        _key(name): MappingProxyType({int(size): device for size, device in by_size.items()})
        for name, by_size in values["by_memory"].items()
    }
    return MappingProxyType(names), MappingProxyType(sizes)
