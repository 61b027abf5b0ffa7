"""Files that are written whole, and texts that are read with their mistakes named."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_models.errors import InputError
from hardware_models.files import whole_file, writable_files, writable_folder
from hardware_models.text_files import json_of, text_of, toml_of


def test_a_file_appears_whole_or_not_at_all(tmp_path: Path) -> None:
    path = tmp_path / "new" / "a.txt"
    with whole_file(path) as temporary:
        temporary.write_text("all", encoding="utf-8")
        assert not path.exists()
    assert path.read_text(encoding="utf-8") == "all"
    with pytest.raises(UnicodeEncodeError), whole_file(path) as temporary:
        temporary.write_text("part of it: \N{SNOWMAN}", encoding="ascii")
    assert path.read_text(encoding="utf-8") == "all"
    assert [one.name for one in path.parent.iterdir()] == ["a.txt"]


def test_places_that_cannot_be_written_are_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("", encoding="utf-8")
    for path in (tmp_path, tmp_path / "file" / "a.txt", Path("/dev/null/a.txt")):
        with (
            pytest.raises(InputError, match=f"{path}: cannot be written: .*; name a place that you may write to"),
            whole_file(path) as temporary,
        ):
            temporary.write_text("", encoding="utf-8")
    with pytest.raises(InputError, match="file: cannot be written: File exists"):
        writable_folder(tmp_path / "file")
    with pytest.raises(InputError, match="Is a directory; name a file"):
        writable_files(None, tmp_path)
    writable_files(None, tmp_path / "made" / "a.txt")
    assert list((tmp_path / "made").iterdir()) == []


def test_a_full_disk_is_said(tmp_path: Path) -> None:
    with (
        pytest.raises(InputError, match="cannot be written: No space left on device; free some space"),
        whole_file(tmp_path / "a.txt"),
    ):
        Path("/dev/full").write_text("x", encoding="utf-8")


def test_texts_of_spreadsheets_begin_with_a_mark(tmp_path: Path) -> None:
    path = tmp_path / "a.csv"
    path.write_text("a,b\n", encoding="utf-8-sig")
    assert text_of(path) == "a,b\n"
    with pytest.raises(InputError, match="cannot be read: Is a directory; correct the path"):
        text_of(tmp_path)
    with pytest.raises(InputError, match="cannot be read: Not a directory"):
        text_of(path / "b")


def test_texts_that_are_nested_too_deeply_are_refused() -> None:
    deep = "[" * 100_000
    with pytest.raises(InputError, match="x: not TOML: nested too deeply"):
        toml_of(f"a = {deep}", source="x")
    with pytest.raises(InputError, match="x: is not JSON: nested too deeply"):
        json_of(deep, source="x")
