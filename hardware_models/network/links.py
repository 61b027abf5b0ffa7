"""Links by name: bandwidth per direction, latency and what two directions cost each other."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from hardware_models.errors import UnknownNameError
from hardware_models.profile import Sourced
from hardware_models.toml_file import Count, Fraction, LinkRate, Name, Seconds, Section, SourcedSection, read_section

Floats = NDArray[np.float64]
LinkKind = Literal["pcie", "nvlink", "c2c", "nic", "dram", "nvme"]
LINKS_FILE = Path(__file__).parents[1] / "data" / "links.toml"


@dataclass(frozen=True, slots=True, kw_only=True)
class Link:
    """One link of a device, a socket or a node; every value with kind, source and date.

    ``nvlink`` counts all lanes of one device together, ``nic`` one adapter, ``dram`` one socket, ``nvme`` one drive.

    **Model**: ``seconds = latency_s + bytes / achieved`` alone in one direction; both directions together move at most
    ``duplex_efficiency * 2 * achieved``.
    """

    name: str
    kind: LinkKind
    generation: int
    theoretical_bytes_per_s: Sourced
    """Per direction."""
    achieved_bytes_per_s: Sourced
    """Largest rate of one direction alone; pinned memory where the host takes part. Towards the device where directions differ."""
    achieved_back_bytes_per_s: Sourced
    """The other direction alone (towards the host)."""
    pageable_bytes_per_s: Sourced | None
    """From pageable host memory; None where the host takes no part."""
    latency_s: Sourced
    duplex_efficiency: Sourced
    """Rate of both directions together over the sum of the rates alone, in (0, 1]."""

    def seconds(self, sizes_bytes: Floats | float, *, pageable: bool = False) -> Floats:
        """Seconds of transfers that have the link to themselves, in the shape of ``sizes_bytes``."""
        rate = self.pageable_bytes_per_s if pageable and self.pageable_bytes_per_s else self.achieved_bytes_per_s
        return np.asarray(self.latency_s.value + np.asarray(sizes_bytes, dtype=np.float64) / rate.value)

    @property
    def duplex_capacity_bytes_per_s(self) -> float:
        """Most that both directions move together."""
        return self.duplex_efficiency.value * (self.achieved_bytes_per_s.value + self.achieved_back_bytes_per_s.value)


class _RateSection(SourcedSection):
    value: LinkRate


class _SecondsSection(SourcedSection):
    value: Seconds


class _FractionSection(SourcedSection):
    value: Fraction


class _LinkSection(Section):
    name: Name
    kind: LinkKind
    generation: Count
    theoretical_bytes_per_s: _RateSection
    achieved_bytes_per_s: _RateSection
    achieved_back_bytes_per_s: _RateSection | None = None
    pageable_bytes_per_s: _RateSection | None = None
    latency_s: _SecondsSection
    duplex_efficiency: _FractionSection


class _LinksFile(Section):
    format: Literal[1]
    link: list[_LinkSection]


def read_links(path: Path) -> Mapping[str, Link]:
    """Links of a TOML file by name; a missing ``achieved_back_bytes_per_s`` is that of the other direction.

    Raises:
        InputError: a key is missing or unknown, or a value breaks a rule.
    """
    return MappingProxyType({section.name: _link(section) for section in read_section(_LinksFile, path).link})


@lru_cache(maxsize=1)
def catalogued_links() -> Mapping[str, Link]:
    """The links that the project knows."""
    return read_links(LINKS_FILE)


def find_link(name: str, *, source: str = "links", key: str = "link") -> Link:
    """The catalogued link of this name.

    Raises:
        UnknownNameError: lists the known ones.
    """
    known = catalogued_links()
    if name not in known:
        raise UnknownNameError(source=source, key=key, value=name, known=tuple(known), remedy="choose one of these")
    return known[name]


def _link(section: _LinkSection) -> Link:
    back = section.achieved_back_bytes_per_s or section.achieved_bytes_per_s
    pageable = section.pageable_bytes_per_s
    return Link(
        name=section.name, kind=section.kind, generation=section.generation,
        theoretical_bytes_per_s=_sourced(section.theoretical_bytes_per_s), achieved_bytes_per_s=_sourced(section.achieved_bytes_per_s),
        achieved_back_bytes_per_s=_sourced(back), pageable_bytes_per_s=None if pageable is None else _sourced(pageable),
        latency_s=_sourced(section.latency_s), duplex_efficiency=_sourced(section.duplex_efficiency),
    )  # fmt: skip


def _sourced(section: _RateSection | _SecondsSection | _FractionSection) -> Sourced:
    return Sourced(value=section.value, evidence=section.evidence, source=section.source, date=section.date)
