"""Work shared out over the processors of this machine: copies of this process that know all that it knows, and send back what they found."""

from __future__ import annotations

import multiprocessing
import os
import sys
from collections.abc import Callable, Sequence
from multiprocessing.connection import Connection
from typing import Any, TypeVar

MOST_PROCESSES = 16
_Part = TypeVar("_Part")
_Found = TypeVar("_Found")


def num_processes() -> int:
    """Processors that this process may use, up to `MOST_PROCESSES`; 1 where processes cannot be copied safely."""
    return min(MOST_PROCESSES, len(os.sched_getaffinity(0))) if sys.platform == "linux" else 1


def shared_out(work: Callable[[_Part], _Found], parts: Sequence[_Part]) -> list[_Found]:
    """What ``work`` finds for each part, in their order: the first part here, each other one in a copy of this process.

    Args:
        work: what is done; what it changes in a copy is lost there, what it returns is pickled.
        parts: one for each process.

    Raises:
        Exception: the first that a part raises; the others are ended.
    """
    context = multiprocessing.get_context("fork" if len(parts) > 1 else None)
    pipes, copies = [], []
    for part in parts[1:]:
        ours, theirs = context.Pipe(duplex=False)
        copy = context.Process(target=_send, args=(theirs, work, part), daemon=True)
        copy.start()
        theirs.close()
        pipes.append(ours)
        copies.append(copy)
    over = False
    try:
        found = [work(part) for part in parts[:1]] + [_received(pipe) for pipe in pipes]
        over = True
    finally:
        for copy in copies:
            if not over:
                copy.kill()
            copy.join()
    return found


def _send(pipe: Connection, work: Callable[[_Part], _Found], part: _Part) -> None:
    try:
        pipe.send(work(part))
    except Exception as error:  # noqa: BLE001 - raised again where the answer is awaited
        pipe.send(error)


def _received(pipe: Connection) -> Any:
    try:
        found = pipe.recv()
    except EOFError as error:
        raise ChildProcessError("a process of the search ended without an answer; was memory short?") from error
    if isinstance(found, Exception):
        raise found
    return found
