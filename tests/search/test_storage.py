"""Storages of studies: a killed worker holds no lock and spoils no journal, workers that start together find their tables, and what cannot be opened is refused by name."""

from __future__ import annotations

import multiprocessing
import threading
import time
from multiprocessing.synchronize import Event
from pathlib import Path

import optuna
import pytest
from sqlalchemy.exc import IntegrityError, ProgrammingError

import search.storage
from hardware_models.errors import InputError
from search.storage import DRIVERS, TABLE_ATTEMPTS, KernelLock, storage_of


def values_in(storage: str) -> list[float]:
    return [float(one.values[0]) for one in optuna.load_study(study_name="one", storage=storage_of(storage)).get_trials()]


def told(storage: str, value: float) -> None:
    study = optuna.create_study(study_name="one", storage=storage_of(storage), load_if_exists=True)
    study.tell(study.ask(), value)


@pytest.mark.parametrize("kind", ["journal:{}/study.log", pytest.param("sqlite:///{}/study.db", marks=pytest.mark.slow)])
def test_a_study_is_there_again_when_it_is_opened_again(kind: str, tmp_path: Path) -> None:
    storage = kind.format(tmp_path)
    told(storage, 1.5)
    told(storage, 2.5)
    assert values_in(storage) == [1.5, 2.5]


def test_no_storage_is_memory() -> None:
    assert storage_of(None) is None


def test_a_journal_whose_last_entry_was_cut_off_goes_on(tmp_path: Path) -> None:
    storage, path = f"journal:{tmp_path / 'study.log'}", tmp_path / "study.log"
    told(storage, 1.5)
    with path.open("ab") as journal:
        journal.write(b'{"op_code":4,"study_id":0,"dat' + b"x" * 100_000)
    told(storage, 2.5)
    assert values_in(storage) == [1.5, 2.5]
    assert all(line.startswith(b"{") and line.endswith(b"}") for line in path.read_bytes().splitlines())


def hold(path: Path, held: Event) -> None:
    KernelLock(path).acquire()
    held.set()
    time.sleep(60.0)


def test_the_lock_of_a_killed_process_is_free_at_once(tmp_path: Path) -> None:
    path, context = tmp_path / "study.log", multiprocessing.get_context("fork")
    held = context.Event()
    holder = context.Process(target=hold, args=(path, held))
    holder.start()
    assert held.wait(10.0)
    lock, taken = KernelLock(path), threading.Event()
    waiter = threading.Thread(target=lambda: (lock.acquire(), taken.set()))
    waiter.start()
    assert not taken.wait(0.05)
    holder.kill()
    assert taken.wait(10.0)
    waiter.join()
    holder.join()
    lock.release()


@pytest.mark.parametrize(
    ("text", "told"),
    [
        ("study.db", "--storage = 'study.db': neither a URL nor journal:FILE; give journal:FILE, sqlite:///FILE or postgresql://USER@HOST/DATABASE"),
        ("oracledb9://me@host/x", "no driver for this database is installed"),
        ("journal:", "journal:FILE names a file in a folder that exists"),
        ("journal:nowhere/study.log", "make the folder nowhere"),
        ("sqlite:///nowhere/study.db", "unable to open database file.*check that the folder exists"),
    ],
)  # fmt: skip
def test_what_cannot_be_opened_is_refused(text: str, told: str) -> None:
    with pytest.raises(InputError, match=told):
        storage_of(text)


@pytest.mark.parametrize("text", ["not\na journal\n", "not a journal", '{"op_code": 0}\nnot a journal\n'])
def test_a_file_that_is_no_journal_is_refused_and_kept(text: str, tmp_path: Path) -> None:
    path = tmp_path / "notes.txt"
    path.write_text(text)
    with pytest.raises(InputError, match="is no journal that can be read and written"):
        storage_of(f"journal:{path}")
    assert path.read_text() == text


def test_a_missing_driver_is_named_without_the_password(monkeypatch: pytest.MonkeyPatch) -> None:
    def missing(*_arguments: object, **_more: object) -> None:
        raise ImportError("No module named 'psycopg'")

    monkeypatch.setattr(search.storage, "RDBStorage", missing)
    with pytest.raises(InputError) as raised:
        storage_of("postgresql+psycopg://me:secret@host/x")
    assert DRIVERS in str(raised.value)
    assert "secret" not in str(raised.value)


@pytest.mark.parametrize(("failures", "opened"), [pytest.param(2, True, marks=pytest.mark.slow), (TABLE_ATTEMPTS, False)])
def test_workers_that_make_the_same_tables_try_again(failures: int, opened: bool, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:  # fmt: skip
    real, tries = search.storage.RDBStorage, []

    def raced(url: str, **more: object) -> object:
        tries.append(url)
        if len(tries) <= failures:
            raise (ProgrammingError, IntegrityError)[len(tries) % 2]("", None, Exception('relation "studies" already exists'))
        return real(url, **more)

    monkeypatch.setattr(search.storage, "RDBStorage", raced)
    monkeypatch.setattr(time, "sleep", lambda _seconds: None)
    url = f"sqlite:///{tmp_path / 'study.db'}"
    if opened:
        assert storage_of(url) is not None
        assert len(tries) == failures + 1
    else:
        with pytest.raises(InputError, match="already exists"):
            storage_of(url)
