"""Finds profiles by name: the catalogue of data sheets, folders and files, and ``this`` machine."""

from __future__ import annotations

import os
import re
import tomllib
from dataclasses import dataclass
from pathlib import Path

from platformdirs import user_cache_path

from hardware_models.aliases import closest_device
from hardware_models.errors import InputError, UnknownNameError
from hardware_models.profile import DeviceProfile
from hardware_models.profile_file import DEVICE_FILE, load_profile

THIS = "this"
CACHE_VARIABLE = "SCHEDLAB_CACHE"
CATALOGUE_FOLDER = Path(__file__).parent / "data"


@dataclass(frozen=True, slots=True, kw_only=True)
class HardwareEntry:
    """One line of ``schedlab hardware``."""

    name: str
    kind: str
    path: Path
    provenance: str


def load_hardware(name_or_path: str | Path, *, device: str = "cpu") -> DeviceProfile:
    """The profile of a catalogue name, a profile folder, its ``device.toml``, or ``this``.

    Args:
        name_or_path: as given to ``--hardware``.
        device: which device of this machine ``this`` means, ``cpu`` or ``cuda``.

    Raises:
        UnknownNameError: neither a name in the catalogue nor a path.
        InputError: ``this`` has not been calibrated, or a file breaks a rule.
    """
    text = str(name_or_path)
    if text == THIS:
        folder = this_profile_path(device)
        if not (folder / DEVICE_FILE).exists():
            raise InputError(
                source="--hardware", key="this", value=None, rule=f"this machine's {device} has not been calibrated",
                remedy=f"run 'schedlab calibrate --device {device}'",
            )  # fmt: skip
        return load_profile(folder)
    if text in catalogue_names():
        return load_profile(CATALOGUE_FOLDER / text)
    path = Path(name_or_path)
    if path.is_dir():
        return load_profile(path)
    if path.is_file():
        if path.name != DEVICE_FILE:
            raise InputError(
                source=text,
                key="",
                value=None,
                rule=f"a device profile is a folder or its {DEVICE_FILE}",
                remedy="name the folder that holds it",
            )
        return load_profile(path.parent)
    closest = closest_device(text)
    raise UnknownNameError(
        source="--hardware", key="name", value=text, known=(*catalogue_names(), THIS),
        remedy=(f"did you mean {closest!r}? " if closest else "") + "Or give the folder of a profile: 'schedlab calibrate --device cuda --out DIR' measures one",
    )  # fmt: skip


def catalogue_names() -> tuple[str, ...]:
    """Names that the catalogue holds, sorted."""
    return tuple(sorted(path.parent.name for path in CATALOGUE_FOLDER.glob(f"*/{DEVICE_FILE}")))


def list_hardware() -> tuple[HardwareEntry, ...]:
    """The catalogue, then the calibrated devices of this machine, with what each rests on."""
    folders = [CATALOGUE_FOLDER / name for name in catalogue_names()]
    folders += sorted(path.parent for path in (cache_folder() / "hardware").glob(f"this-*/{DEVICE_FILE}"))
    entries = []
    for folder in folders:
        values = tomllib.loads((folder / DEVICE_FILE).read_text(encoding="utf-8"))
        entries.append(
            HardwareEntry(
                name=folder.name, kind=str(values.get("kind", "?")), path=folder, provenance=str(values.get("provenance", "?")),
            )
        )  # fmt: skip
    return tuple(entries)


def cache_folder() -> Path:
    """Where what is measured here is kept: the user's cache directory, or the environment variable ``SCHEDLAB_CACHE``."""
    override = os.environ.get(CACHE_VARIABLE)
    return Path(override) if override else user_cache_path("schedlab")


def this_profile_path(device: str = "cpu") -> Path:
    """The folder of this machine's profile; it depends on the processor's or GPU's model and count, not on the host's name."""
    return cache_folder() / "hardware" / f"this-{_slug(_device_model(device))}"


def _device_model(device: str) -> str:
    if device == "cpu":
        return f"cpu {_processor_model()} {os.cpu_count()}"
    if device == "cuda":
        return f"cuda {_gpu_model()}"
    raise UnknownNameError(source="--device", key="device", value=device, known=("cpu", "cuda"))


def _processor_model() -> str:
    path = Path("/proc/cpuinfo")
    lines = path.read_text(encoding="utf-8", errors="replace").splitlines() if path.exists() else []
    models = [line.split(":", 1)[1] for line in lines if line.startswith("model name")]
    return models[0] if models else os.uname().machine


def _gpu_model() -> str:
    """The first GPU as the driver names it, without torch."""
    for path in sorted(Path("/proc/driver/nvidia/gpus").glob("*/information")):
        for line in path.read_text(encoding="utf-8", errors="replace").splitlines():
            if line.startswith("Model:"):
                return line.split(":", 1)[1]
    return "gpu"


def _slug(text: str) -> str:
    return re.sub(r"[^a-z0-9]+", "-", text.lower()).strip("-")
