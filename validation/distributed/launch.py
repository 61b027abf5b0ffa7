"""Starts the processes of a replay, watches them, and ends all of them whatever happens."""

from __future__ import annotations

import os
import pickle
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from pathlib import Path

from hardware_models.errors import RunFailedError
from validation.distributed.job import Job, JobReport
from validation.distributed.worker import ERROR_FILE, JOB_FILE, REPORT_FILE

_POLL_S = 0.1
_START_S = 120.0
"""How long a process may take until it says its first word: importing torch on a busy machine."""
_GRACE_S = 3.0
"""How long the others may take to say what they saw once a rank has failed, and to end when told to."""


def launch(job: Job, progress: Callable[[str], None] = lambda _: None) -> JobReport:
    """What all ranks of a job report.

    Every rank is a process of its own group, joined through a file on this machine. When one ends badly, says nothing for the job's timeout, or this process is
    interrupted, all are ended.

    Raises:
        RunFailedError: names the rank that failed first and what it said.
    """
    with tempfile.TemporaryDirectory(prefix="schedlab-") as name:
        folder = Path(name)
        (folder / JOB_FILE).write_bytes(pickle.dumps(job))
        processes = [_start(job, folder, rank) for rank in range(job.plan.num_gpus)]
        try:
            _watch(job, folder, processes, progress)
        finally:
            _end(processes)
        report: JobReport = pickle.loads((folder / REPORT_FILE).read_bytes())  # noqa: S301 - written by our own rank 0
        return report


def _start(job: Job, folder: Path, rank: int) -> subprocess.Popen[bytes]:
    environment = os.environ | {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(job.plan.num_gpus), "LOCAL_WORLD_SIZE": str(job.plan.num_gpus),
        "PYTHONPATH": os.pathsep.join(path or str(Path.cwd()) for path in sys.path), "SCHEDLAB_STORE": str(folder / "store"), "SCHEDLAB_PARENT": str(os.getpid()),
    }  # fmt: skip
    environment.setdefault("GLOO_SOCKET_IFNAME", "lo")
    with (folder / f"log{rank}.txt").open("wb") as log:
        return subprocess.Popen(  # noqa: S603 - this interpreter on our own module
            [sys.executable, "-m", "validation.distributed.worker", str(folder)], env=environment, stdout=log, stderr=log, start_new_session=True
        )  # fmt: skip


def _watch(job: Job, folder: Path, processes: Sequence[subprocess.Popen[bytes]], progress: Callable[[str], None]) -> None:
    """Returns when all have ended well; tells what rank 0 says on the way."""
    log, told, heard = folder / "log0.txt", 0, time.monotonic()
    while True:
        text = log.read_text(encoding="utf-8", errors="replace")
        lines = text[: text.rfind("\n") + 1].splitlines()
        for line in lines[told:]:
            progress(line)
        if len(lines) > told:
            told, heard = len(lines), time.monotonic()
        codes = [process.poll() for process in processes]
        if any(codes):
            raise _failure(folder, processes)
        if all(code == 0 for code in codes):
            return
        if time.monotonic() - heard > (job.timeout_s + _GRACE_S if told else _START_S):
            silent = [rank for rank, code in enumerate(codes) if code is None]
            raise RunFailedError(
                f"no progress for {job.timeout_s:g} s: ranks {silent} still run, last said: {lines[-1] if lines else 'nothing'}"
            )
        time.sleep(_POLL_S)


def _failure(folder: Path, processes: Sequence[subprocess.Popen[bytes]]) -> RunFailedError:
    """The rank that failed first: one that was killed, else one that failed for a reason of its own rather than because another went away."""
    deadline = time.monotonic() + _GRACE_S
    while time.monotonic() < deadline and any(process.poll() is None for process in processes):
        time.sleep(_POLL_S)
    killed = [rank for rank, process in enumerate(processes) if (process.returncode or 0) < 0]
    if killed:
        number = -(processes[killed[0]].returncode or 0)
        hint = "; the kernel does that when memory runs out" if number == signal.SIGKILL else ""
        return RunFailedError(f"rank {killed[0]} was ended by signal {number} ({signal.Signals(number).name}){hint}")
    said = {rank: folder / ERROR_FILE.format(rank=rank) for rank in range(len(processes))}
    texts = {rank: path.read_text(encoding="utf-8") for rank, path in said.items() if path.exists()}
    first = sorted(texts, key=lambda rank: (_is_consequence(texts[rank]), rank))
    if first:
        return RunFailedError(f"rank {first[0]}: {texts[first[0]]}")
    rank = next(rank for rank, process in enumerate(processes) if process.returncode)
    tail = (folder / f"log{rank}.txt").read_text(encoding="utf-8", errors="replace").strip().splitlines()
    return RunFailedError(
        f"rank {rank} ended with status {processes[rank].returncode}: {tail[-1] if tail else 'it said nothing'}"
    )


def _is_consequence(text: str) -> bool:
    """Whether an error is how a lost peer looks from the other end."""
    return any(
        part in text
        for part in ("Connection closed by peer", "Connection reset by peer", "Timed out waiting", "DistBackendError")
    )


def _end(processes: Sequence[subprocess.Popen[bytes]]) -> None:
    """Ends every process and what it started."""
    for process in processes:
        if process.poll() is None:
            os.killpg(process.pid, signal.SIGTERM)
    deadline = time.monotonic() + _GRACE_S
    for process in processes:
        try:
            process.wait(timeout=max(0.0, deadline - time.monotonic()))
        except subprocess.TimeoutExpired:
            os.killpg(process.pid, signal.SIGKILL)
            process.wait()
