"""Files appear whole or not at all, and what cannot be written is said before the work that it would hold."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from errno import ENOSPC
from pathlib import Path
from tempfile import TemporaryFile

from hardware_models.errors import InputError


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A path beside ``path`` to write to, with the same suffix; it becomes ``path`` when the block ends without an error.

    Raises:
        InputError: nothing can be written there.
    """
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        temporary = path.with_name(f".{path.stem}-{os.getpid()}{path.suffix}")
        try:
            yield temporary
            temporary.replace(path)
        finally:
            temporary.unlink(missing_ok=True)
    except OSError as error:
        raise _unwritable(path, error) from error


def writable_folder(folder: Path) -> Path:
    """The folder, made where it was not: asked for before work whose results go there.

    Raises:
        InputError: it cannot be made, or no file can be made in it.
    """
    try:
        folder.mkdir(parents=True, exist_ok=True)
        with TemporaryFile(dir=folder):
            return folder
    except OSError as error:
        raise _unwritable(folder, error) from error


def writable_files(*paths: Path | None) -> None:
    """Sees that files can be written, before the work whose results they hold; None: one that is not asked for.

    Raises:
        InputError: one is a folder, or its folder cannot be made or written to.
    """
    for path in paths:
        if path is not None:
            if path.is_dir():
                raise InputError(
                    source=str(path), key="", value=None, rule="cannot be written: Is a directory", remedy="name a file"
                )
            writable_folder(path.parent)


def _unwritable(path: Path, error: OSError) -> InputError:
    remedy = "free some space, or name another place" if error.errno == ENOSPC else "name a place that you may write to"
    return InputError(source=str(path), key="", value=None, rule=f"cannot be written: {said(error)}", remedy=remedy)


def said(error: OSError) -> str:
    """The operating system's words."""
    return error.strerror or str(error)
