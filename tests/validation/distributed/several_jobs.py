"""Several replays on the same processes, one after the other: torch is loaded once. Run as a module it is one of those processes."""

from __future__ import annotations

import os
import pickle
import subprocess
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import torch.distributed as dist

from hardware_models.profile import DeviceProfile
from simulator.model_source import ModelSource
from simulator.plan import Plan
from validation.distributed.job import Job
from validation.distributed.replay import ProcessesReplay, prepare
from validation.distributed.worker import run_job

LIMIT_S = 600.0
TIMEOUT_S = 120.0


def replay_several(
    cases: Sequence[tuple[ModelSource, Plan]],
    device: DeviceProfile,
    folder: Path,
    also: Callable[[int], None] | None = None,
) -> list[ProcessesReplay]:
    """Replays of models under plans, in their order.

    Args:
        cases: to run.
        device: predicts.
        folder: for files; empty.
        also: a function of the rank that is called in the first two processes, in a group of theirs; an error fails.
    """
    prepared = [prepare(source, plan, device, steps=1, timeout_s=TIMEOUT_S) for source, plan in cases]
    (folder / "jobs").write_bytes(pickle.dumps(([one.job for one in prepared], also)))
    ranks = max(one.job.plan.num_gpus for one in prepared)
    path = os.pathsep.join(entry or str(Path.cwd()) for entry in sys.path)
    environment = os.environ | {"PYTHONPATH": path, "GLOO_SOCKET_IFNAME": "lo"}
    processes = [
        subprocess.Popen([sys.executable, "-m", __name__, str(folder), str(rank)], env=environment, stderr=subprocess.PIPE)
        for rank in range(ranks)
    ]
    try:
        said = [process.communicate(timeout=LIMIT_S)[1].decode() for process in processes]
    finally:
        for process in processes:
            process.kill()
    assert not any(process.returncode for process in processes), "\n".join(said)[-4000:]
    reports = [pickle.loads((folder / f"report{number}").read_bytes()) for number in range(len(prepared))]  # noqa: S301 - our own
    return [one.result(report) for one, report in zip(prepared, reports, strict=True)]


def _rank(folder: Path, rank: int) -> None:
    jobs: list[Job]
    jobs, also = pickle.loads((folder / "jobs").read_bytes())  # noqa: S301 - our own
    for number, job in enumerate(jobs):
        size = job.plan.num_gpus
        if rank >= size:
            continue
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(size), "LOCAL_WORLD_SIZE": str(size), "SCHEDLAB_STORE": str(folder / f"store{number}"),
        }  # fmt: skip
        report = run_job(job, lambda _: None)
        if report is not None:
            (folder / f"report{number}").write_bytes(pickle.dumps(report))
    if also is not None and rank < 2:
        dist.init_process_group("gloo", init_method=f"file://{folder / 'store'}", rank=rank, world_size=2)
        also(rank)
        dist.destroy_process_group()


if __name__ == "__main__":
    _rank(Path(sys.argv[1]), int(sys.argv[2]))
