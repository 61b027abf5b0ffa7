"""Workers of a study on this machine: copies of this process that meet in a storage."""

from __future__ import annotations

import multiprocessing
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Protocol

from search.joint.batch_study import JointStudyResult, Progress
from search.storage import JOURNAL


class TakesPart(Protocol):
    """Takes part in a study until it is over."""

    def __call__(
        self, storage: str | None, time_limit_s: float | None, on_progress: Callable[[Progress], None] | None = None
    ) -> JointStudyResult:
        """The study as it then stands."""


def run_together(
    take_part: TakesPart, workers: int, storage: str | None, limit_s: float | None, on_progress: Callable[[Progress], None] | None
) -> JointStudyResult:  # fmt: skip
    """The study with as many processes: the others are copies of this one, which know all that it has priced.

    Args:
        take_part: what each of them does.
        workers: processes.
        storage: where they meet; None: a file of this call, where there are several.
        limit_s: seconds after which each of them stops.
        on_progress: of this process.
    """
    if workers == 1:
        return take_part(storage, limit_s, on_progress)
    with tempfile.TemporaryDirectory(prefix="schedlab-") as folder:
        shared = storage or f"{JOURNAL}{Path(folder) / 'study.log'}"
        context = multiprocessing.get_context("fork")
        others = [context.Process(target=take_part, args=(shared, limit_s)) for _ in range(workers - 1)]
        for one in others:
            one.start()
        try:
            return take_part(shared, limit_s, on_progress)
        finally:
            for one in others:
                one.join()
