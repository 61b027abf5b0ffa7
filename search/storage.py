"""Where the trials of a study are kept: memory, a journal file, SQLite or PostgreSQL; a worker that is killed leaves nothing locked and nothing torn."""

from __future__ import annotations

import fcntl
import os
import re
import time
from pathlib import Path

from optuna.storages import BaseStorage, JournalStorage, RDBStorage
from optuna.storages.journal import JournalFileBackend, JournalFileOpenLock
from sqlalchemy.engine import make_url
from sqlalchemy.exc import ArgumentError, IntegrityError, NoSuchModuleError, OperationalError, ProgrammingError, SQLAlchemyError

from hardware_models.errors import InputError

JOURNAL = "journal:"
"""Begins a storage that is a journal file."""
ENTRY = b"{"
"""Begins each entry of a journal."""
SOURCE = "--storage"
DRIVERS = "pip install 'schedlab[postgresql]'"
LIBPQ_DRIVERS = frozenset({"psycopg", "psycopg2"})
KINDS = "give journal:FILE, sqlite:///FILE or postgresql://USER@HOST/DATABASE"
TABLE_ATTEMPTS = 8
"""Tries to make or find the tables of a new database: workers that start together race for them (optuna/optuna#1092)."""
_TABLE_WAIT_S = 0.1
_CONNECT_WAIT_S = 10
"""Until a server that does not answer is given up (libpq's connect_timeout, whole seconds)."""
_TAIL_BYTES = 1 << 16


class KernelLock(JournalFileOpenLock):
    """A lock that the kernel takes back from a process that ends, however it ends; one that a killed worker left half an entry for is mended first.

    Optuna's own locks are files, which stay when their owner is killed: the others then wait for thirty seconds. An entry that was cut off was never confirmed to its writer; left
    there, it would spoil the next one and with it the file.

    Args:
        path: of the journal.
    """

    def __init__(self, path: Path) -> None:
        super().__init__(str(path))
        self._path = path
        self._held: int | None = None

    def acquire(self) -> bool:
        """Waits for the lock and holds it."""
        self._held = os.open(self._path, os.O_RDWR | os.O_CREAT, 0o644)
        fcntl.flock(self._held, fcntl.LOCK_EX)
        _cut_torn_entry(self._held)
        return True

    def release(self) -> None:
        """Gives the lock back."""
        assert self._held is not None, "a lock is held before it is given back"
        os.close(self._held)
        self._held = None


def storage_of(text: str | None) -> BaseStorage | None:
    """Optuna's storage of a text: a database URL, ``journal:PATH``, or None for memory.

    Raises:
        InputError: names no kind of storage, or what is there cannot be opened; says what would do.
    """
    if text is None:
        return None
    if text.startswith(JOURNAL):
        return _journal(text)
    try:
        return _database(text)
    except (NoSuchModuleError, ImportError) as error:
        rule = "no driver for this database is installed"
        remedy = DRIVERS if text.startswith("postgresql") else KINDS
        raise InputError(source=SOURCE, key="", value=_shown(text), rule=rule, remedy=remedy) from error
    except ArgumentError as error:
        raise InputError(source=SOURCE, key="", value=text, rule="neither a URL nor journal:FILE", remedy=KINDS) from error
    except (SQLAlchemyError, RuntimeError) as error:
        rule = f"cannot be opened: {_first_line(error)}"
        remedy = (
            "start the server, or check host, user and database"
            if "@" in text
            else "check that the folder exists and may be written"
        )
        raise InputError(source=SOURCE, key="", value=_shown(text), rule=rule, remedy=remedy) from error


def close(storage: BaseStorage | None) -> None:
    """Ends a storage's connections; it makes new ones when it is asked again."""
    if isinstance(storage, RDBStorage):
        storage.engine.dispose()


def _journal(text: str) -> JournalStorage:
    path = Path(text.removeprefix(JOURNAL))
    if not path.parent.is_dir() or path.is_dir() or not text.removeprefix(JOURNAL):
        rule = "journal:FILE names a file in a folder that exists"
        raise InputError(
            source=SOURCE, key="", value=text, rule=rule, remedy=f"make the folder {path.parent}, or name another file"
        )
    try:
        begins = path.read_bytes()[:1] if path.exists() else b""
        if begins in {b"", ENTRY}:
            return JournalStorage(JournalFileBackend(str(path), lock_obj=KernelLock(path)))
        told = "it holds something else"
    except (OSError, ValueError, KeyError) as error:
        told = _first_line(error)
    rule = f"is no journal that can be read and written: {told}"
    raise InputError(source=SOURCE, key="", value=text, rule=rule, remedy="name another file")


def _database(url: str) -> RDBStorage:
    arguments = {"connect_timeout": _CONNECT_WAIT_S} if make_url(url).get_driver_name() in LIBPQ_DRIVERS else {}
    for attempt in range(TABLE_ATTEMPTS):
        try:
            return RDBStorage(url, engine_kwargs={"connect_args": arguments, "pool_pre_ping": True})
        except (IntegrityError, ProgrammingError, OperationalError) as error:
            if attempt + 1 == TABLE_ATTEMPTS or not _raced(error):
                raise
            time.sleep(_TABLE_WAIT_S * (attempt + 1))
    raise AssertionError("the last attempt returns or raises")


def _raced(error: SQLAlchemyError) -> bool:
    """Whether another worker made the same table at the same moment."""
    return re.search(r"already exists|duplicate key|UNIQUE constraint failed|database is locked", str(error)) is not None


def _cut_torn_entry(descriptor: int) -> None:
    """Takes away what follows the last line end of a journal."""
    size = os.fstat(descriptor).st_size
    kept = size
    while kept:
        start = max(0, kept - _TAIL_BYTES)
        place = os.pread(descriptor, kept - start, start).rfind(b"\n")
        if place >= 0:
            kept = start + place + 1
            break
        kept = start
    if kept < size:
        os.ftruncate(descriptor, kept)


def _shown(url: str) -> str:
    """A URL without its password."""
    return make_url(url).render_as_string(hide_password=True)


def _first_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
