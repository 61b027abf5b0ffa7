"""Reading and writing TOML: every violation names file, key, value, rule and what would do."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import pytest
from pydantic import Field

from hardware_models.errors import InputError
from hardware_models.toml_file import (
    Count,
    Finite,
    Fraction,
    LinkRate,
    MemoryBytes,
    Remedies,
    Seconds,
    Section,
    SourcedSection,
    read_section,
    write_toml,
)


class _Inner(Section):
    rate: LinkRate = 1e9
    start_s: Seconds = 0.0
    size_bytes: MemoryBytes = 2**30


class _File(SourcedSection):
    number: Finite = 0.0
    share: Fraction = 1.0
    count: Count = 1
    kind: Literal["a", "b"] = "a"
    clock_hz: Annotated[float, Field(ge=1e8)] = 1e9
    inner: list[_Inner] = Field(default_factory=list)


HEAD = 'evidence = "measured"\nsource = "test"\ndate = "2026-01-01"\n'


def _read(path: Path, text: str, remedies: Remedies | None = None) -> _File:
    path.write_text(text, encoding="utf-8")
    return read_section(_File, path, remedies=remedies)


def test_a_written_file_reads_back(tmp_path: Path) -> None:
    values = {"evidence": "measured", "source": "test", "date": "2026-01-01", "number": 2.5, "inner": [{"rate": 2e9}]}
    write_toml(tmp_path / "a.toml", values)
    found = read_section(_File, tmp_path / "a.toml")
    assert (found.number, found.inner[0].rate, found.source) == (2.5, 2e9, "test")
    assert [path.name for path in tmp_path.iterdir()] == ["a.toml"]


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("number = nan", r"a\.toml: number = nan: .*; give a finite number"),
        ("share = 1.5", r"share = 1\.5: input should be less than or equal to 1; correct the value"),
        ("count = 0", r"count = 0: input should be greater than or equal to 1; correct the value"),
        ('kind = "c"', r"kind = 'c': .*; choose one of these"),
        ("colour = 1", r"colour = 1: unknown key; remove it or correct its spelling"),
        ("[[inner]]\nrate = 25.0", r"inner\.0\.rate = 25\.0: .*; give the rate in bytes/s, not in GB/s or Gb/s"),
        ("[[inner]]\nrate = 1e15", r"inner\.0\.rate = 1000000000000000\.0: .*; give the rate in bytes/s"),
        ("[[inner]]\nstart_s = 12.0", r"inner\.0\.start_s = 12\.0: .*; give seconds, not microseconds"),
        ("[[inner]]\nsize_bytes = 80", r"inner\.0\.size_bytes = 80: .*; give bytes, not GB or GiB"),
        ("number = [", r"a\.toml: line \d+: not TOML: .*; restore the file"),
    ],
)
def test_violations_name_key_value_rule_and_remedy(tmp_path: Path, line: str, message: str) -> None:
    with pytest.raises(InputError, match=message):
        _read(tmp_path / "a.toml", HEAD + line)


def test_missing_keys_and_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"a\.toml: evidence: this key is required; add it"):
        _read(tmp_path / "a.toml", HEAD.split("\n", 1)[1])
    with pytest.raises(InputError, match=r"absent\.toml: no such file; correct the path"):
        read_section(_File, tmp_path / "absent.toml")


def test_a_reader_of_one_kind_of_file_says_what_to_do_with_it(tmp_path: Path) -> None:
    remedies = Remedies(
        absent="measure it", broken="measure again", missing="update it", bounds={("greater_than_equal", 1e8): "give hertz, not MHz"}
    )  # fmt: skip
    with pytest.raises(InputError, match=r"clock_hz = 1400\.0: .*; give hertz, not MHz"):
        _read(tmp_path / "a.toml", HEAD + "clock_hz = 1400.0", remedies)
    with pytest.raises(InputError, match="required; update it"):
        _read(tmp_path / "a.toml", "", remedies)
    with pytest.raises(InputError, match="; measure again"):
        _read(tmp_path / "a.toml", "[", remedies)
    with pytest.raises(InputError, match="no such file; measure it"):
        read_section(_File, tmp_path / "absent.toml", remedies=remedies)


def test_one_number_may_bound_different_things(tmp_path: Path) -> None:
    """Links' rates and processors' clocks share 1e8: each file's own remedies say which unit is meant."""
    with pytest.raises(InputError, match="give the rate in bytes/s"):
        _read(tmp_path / "a.toml", HEAD + "[[inner]]\nrate = 5.0")
    clocks = Remedies(bounds={("greater_than_equal", 1e8): "give hertz"})
    with pytest.raises(InputError, match="give hertz"):
        _read(tmp_path / "a.toml", HEAD + "clock_hz = 5.0", clocks)
