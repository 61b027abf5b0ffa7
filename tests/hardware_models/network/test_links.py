"""Links: the catalogue, its arithmetic and its refusals."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.network.links import LINKS_FILE, Link, catalogued_links, find_link, read_links


@pytest.mark.parametrize("link", catalogued_links().values(), ids=lambda link: link.name)
def test_every_link_is_possible(link: Link) -> None:
    theoretical = link.theoretical_bytes_per_s.value
    assert 0.1 * theoretical < link.achieved_bytes_per_s.value <= theoretical
    assert 0.1 * theoretical < link.achieved_back_bytes_per_s.value <= theoretical
    if link.pageable_bytes_per_s is not None:
        assert link.pageable_bytes_per_s.value <= link.achieved_bytes_per_s.value
    values = (link.theoretical_bytes_per_s, link.achieved_bytes_per_s, link.latency_s, link.duplex_efficiency)
    assert all(value.source and value.date and value.evidence for value in values)


def test_the_catalogue_holds_every_kind_asked_for() -> None:
    kinds = {(link.kind, link.generation) for link in catalogued_links().values()}
    assert {("pcie", n) for n in (3, 4, 5)} | {("nvlink", n) for n in range(1, 6)} | {("nic", n) for n in (1, 2, 3)} <= kinds
    assert {"c2c", "dram", "nvme"} <= {kind for kind, _ in kinds}


@pytest.mark.parametrize(
    ("size_bytes", "published_gb_per_s"), [(65536, 1.77), (1048576, 9.25), (16777216, 12.11), (67108864, 12.29), (2**30, 12.35)]
)
def test_pcie3_copies_agree_with_published_rates(size_bytes: int, published_gb_per_s: float) -> None:
    """te42kyfo/gpu-benches README.md @1c36d509ee."""
    rate = size_bytes / float(find_link("pcie-gen3-x16").seconds(size_bytes)) / 1e9
    assert rate == pytest.approx(published_gb_per_s, rel=0.06)


def test_seconds_are_latency_plus_bytes_over_rate() -> None:
    link = find_link("pcie-gen4-x16")
    assert link.seconds(np.array([0.0, 26e9])) == pytest.approx([3e-5, 1.00003])
    assert link.seconds(12e9, pageable=True) == pytest.approx(1.00003)


def test_both_directions_reach_the_published_rate_together() -> None:
    """NVIDIA/nvbandwidth README.md: 18.75 GB/s each while the other direction is busy."""
    assert find_link("pcie-gen4-x16").duplex_capacity_bytes_per_s == pytest.approx(2 * 18.75e9)


def test_an_unknown_link_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match=r"unknown name; known are pcie-gen3-x16, pcie-gen4-x16") as caught:
        find_link("nvlink9", source="my.toml", key="intra_node.link")
    assert str(caught.value).startswith("my.toml: intra_node.link = 'nvlink9'")


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("value = 15754000000.0", "value = 15.754", "give the rate in bytes/s"),
        ("value = 12350000000.0", "value = -12350000000.0", r"link\.0\.achieved_bytes_per_s\.value.*greater than or equal"),
        ("value = 3e-05", "value = 30.0", "give seconds, not microseconds"),
        ("value = 12350000000.0", "value = nan", "give a finite number|greater than or equal"),
        ('kind = "pcie"', 'kind = "isa"', "choose one of these"),
        ('kind = "pcie"', "", r"link\.0\.kind: this key is required; add it"),
        ('kind = "pcie"', 'kind = "pcie"\ncolour = 1', r"link\.0\.colour = 1: unknown key"),
        ("format = 1", "format = [", "not TOML"),
    ],
)
def test_bad_files_are_refused_with_key_and_rule(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = LINKS_FILE.read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "links.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_links(path)
    assert str(path) in str(caught.value)


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"absent\.toml: no such file"):
        read_links(tmp_path / "absent.toml")
