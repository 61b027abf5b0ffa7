"""One process of a replay over several: joins the others, runs its part, and hands what it measured to rank 0.

Run as ``python -m validation.distributed.worker FOLDER`` with torchrun's variables set; `validation.distributed.launch` does that.
"""

from __future__ import annotations

import os
import pickle
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from datetime import timedelta
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist

from hardware_models.host_memory import keep_freed_pages
from simulator.program import Kind, Stream
from simulator.timeline import Span
from simulator.tracing.plan_stages import plan_stages
from simulator.tracing.trace import Traced, trace
from simulator.tracing.traced_model import micro_batches
from validation.distributed.check import runs_whole_modules
from validation.distributed.job import Job, JobReport, LinkFacts, RankReport
from validation.distributed.mesh import groups_of, place_of
from validation.distributed.module_rank import ModuleRank
from validation.distributed.pipeline_rank import PipelineRank
from validation.distributed.reference import Reference, compare, plain_reference
from validation.measure import StepTimes, peak_memory, synchronize

JOB_FILE, REPORT_FILE, ERROR_FILE = "job.pickle", "report.pickle", "error{rank}.txt"
_LINK_BYTES = (8, 8 << 20)
_LINK_REPEATS = 5
_PEAK_STEPS = {"cpu": 3, "cuda": 1}
"""Steps whose peaks are read, of which the least counts: a thread of gloo may hold a buffer a moment after its wait."""
_PARENT_S = 1.0
"""How often a process looks whether its parent is still there."""
_LETTERS = {Kind.FORWARD: "F", Kind.RECOMPUTE: "R", Kind.BACKWARD: "B"}
Progress = Callable[[str], None]


def join(job: Job) -> tuple[int, torch.device]:
    """Joins the processes that the environment names; the rank and the device of this one."""
    rank, local = int(os.environ["RANK"]), int(os.environ.get("LOCAL_RANK", os.environ["RANK"]))
    if job.device == "cuda":
        device = torch.device("cuda", local % torch.cuda.device_count())
        torch.cuda.set_device(device)
    else:
        device = torch.device("cpu")
        keep_freed_pages()
        torch.set_num_threads(threads_per_process(int(os.environ.get("LOCAL_WORLD_SIZE", os.environ["WORLD_SIZE"]))))
    backend = "nccl" if device.type == "cuda" else "gloo"
    store = os.environ.get("SCHEDLAB_STORE")
    dist.init_process_group(
        backend, init_method=f"file://{store}" if store else None, rank=rank, world_size=int(os.environ["WORLD_SIZE"]),
        timeout=timedelta(seconds=job.timeout_s),
    )  # fmt: skip
    return rank, device


def threads_per_process(processes: int) -> int:
    """Cores of this machine shared by so many processes, at least one each."""
    return max(1, len(os.sched_getaffinity(0)) // processes)


def run_job(job: Job, progress: Progress) -> JobReport | None:
    """Runs this process' part of a job; the report of all on rank 0, else None."""
    rank, device = join(job)
    try:
        return _run(job, rank, device, progress if rank == 0 else lambda _: None)
    finally:
        if sys.exc_info()[0] is None:
            dist.destroy_process_group()


def _run(job: Job, rank: int, device: torch.device, progress: Progress) -> JobReport | None:
    progress(f"building {job.model} on {job.plan.num_gpus} processes")
    torch.manual_seed(job.seed)
    module, inputs = job.source.definition.build()
    pieces = micro_batches(inputs, job.plan.batch.micro_batch or 1)
    traced = trace(module, pieces[0], name=job.model, precision=job.plan.precision.compute)
    place = place_of(rank, job.plan)
    progress("gradients of the plain module")
    reference = plain_reference(module, traced, pieces, seed=job.seed) if rank == 0 else None
    own = pieces[place.dp * job.order.num_microbatches : (place.dp + 1) * job.order.num_microbatches]
    part = _part(job, rank, module, traced, own, device)
    expected, states, loss_scale = _shared_reference(reference, module, part, first=place.dp * job.order.num_microbatches)
    part.optimizer.device = device
    if loss_scale != 1.0:
        part.scale_loss(loss_scale)
    del reference, module, inputs, pieces, own
    progress("gradients under the plan")
    part.draw_as(states)
    torch.manual_seed(job.seed)
    buffers = {name: value.clone() for name, value in part.buffers.items()}
    part.gradients()
    for name, value in buffers.items():
        part.buffers[name].copy_(value)
    gradients = part.take_gradients()
    match = compare({name: None if grad is None else grad.cpu() / loss_scale for name, grad in gradients.items()}, expected)
    num_compared = len(gradients)
    del expected, gradients, buffers
    part.draw_as({})
    progress("memory and spans")
    part.step()
    found = [peak_memory(part.step, part.resident, device=device) for _ in range(_PEAK_STEPS[device.type])]
    peak = min(found, key=lambda one: one.allocated_bytes)
    spans = _spans(part, rank, device)
    progress(f"timing {job.steps} steps")
    times = _times(part, job.steps, device)
    report = RankReport(
        rank=rank, peak_bytes=peak.allocated_bytes, reserved_bytes=peak.reserved_bytes, resident_bytes=sum(_sizes(part.resident)),
        spans=spans, match=match, num_compared=num_compared,
    )  # fmt: skip
    link = _link(rank, device)
    gathered: list[Any] | None = [None] * job.plan.num_gpus if rank == 0 else None
    dist.gather_object(report, gathered)
    if gathered is None:
        return None
    environment = {"torch": torch.__version__, "backend": dist.get_backend(), "cores": len(os.sched_getaffinity(0))}
    return JobReport(times=times, ranks=tuple(gathered), link=link, threads=torch.get_num_threads(), environment=environment)


def _part(
    job: Job, rank: int, module: torch.nn.Module, traced: Traced, own: Sequence[Mapping[str, Any]], device: torch.device
) -> PipelineRank | ModuleRank:
    """What this process runs; ``module`` stays as it is."""
    if runs_whole_modules(job.plan):
        return ModuleRank(job.plan, deepcopy(module), own, device=device)
    planned, groups = plan_stages(traced, job.plan, job.order, sequence=job.sequence), _groups(job, rank)
    tied = _tied_groups(job, rank, planned)
    place = place_of(rank, job.plan)
    return PipelineRank(
        job, place, module, planned, own, device=device, pipeline=groups["pp"], replicas=groups["dp"], tied=tied
    )


def _sizes(tensors: Sequence[torch.Tensor]) -> list[int]:
    return list({tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}.values())  # noqa: SLF001 - torch's only storage identity


def _groups(job: Job, rank: int) -> dict[str, dist.ProcessGroup | None]:
    """This rank's group along each axis; None where it is alone on it. Every rank makes every group, in one order."""
    found: dict[str, dist.ProcessGroup | None] = {"pp": None, "dp": None}
    for axis in found:
        for ranks in groups_of(axis, job.plan):
            made = dist.new_group(ranks) if len(ranks) > 1 else None
            if rank in ranks:
                found[axis] = made
    return found


def _tied_groups(job: Job, rank: int, planned: Sequence[Any]) -> dict[str, dist.ProcessGroup]:
    """Per parameter that several ranks of a pipeline hold and this one too: those ranks."""
    holders: dict[str, set[int]] = {}
    for one in planned:
        for name, held in one.stage.parameters.items():
            if held.trained:
                holders.setdefault(name, set()).add(job.order.ranks_of_stage[one.stage.index][0])
    found: dict[str, dist.ProcessGroup] = {}
    for pipeline in groups_of("pp", job.plan):
        made: dict[tuple[int, ...], dist.ProcessGroup] = {}
        for name, places in sorted(holders.items()):
            ranks = tuple(pipeline[place] for place in sorted(places))
            if len(ranks) < 2:  # noqa: PLR2004 - one holder has nobody to sum with
                continue
            if ranks not in made:
                made[ranks] = dist.new_group(list(ranks))
            if rank in ranks:
                found[name] = made[ranks]
    return found


def _shared_reference(
    reference: Reference | None, module: torch.nn.Module, part: PipelineRank | ModuleRank, *, first: int
) -> tuple[dict[str, torch.Tensor | None], Mapping[tuple[int, int], Any], float]:
    """Rank 0's reference, handed to all: gradients of this rank's parameters, random states of its replica's micro-batches, the scale of the loss."""
    has: list[Any] = [
        None if reference is None else {name for name, grad in reference.gradients.items() if grad is not None},
        None if reference is None else reference.random_states,
        None if reference is None else reference.loss_scale,
    ]
    dist.broadcast_object_list(has, src=0)
    trained, states, loss_scale = has
    device = next(iter(part.parameters.values())).device
    expected: dict[str, torch.Tensor | None] = {}
    for name, parameter in module.named_parameters():
        if name not in trained:
            expected[name] = None
            continue
        grad = reference.gradients[name] if reference is not None else None
        value = torch.empty_like(parameter, device=device) if grad is None else grad.to(device).contiguous()
        dist.broadcast(torch.view_as_real(value) if value.is_complex() else value, src=0)
        if name in part.parameters:
            expected[name] = value.detach().cpu()
    return expected, {(number - first, block): state for (number, block), state in states.items()}, loss_scale


def _spans(part: PipelineRank | ModuleRank, rank: int, device: torch.device) -> tuple[Span, ...]:
    """What each block's runs took, from the moment at which all ranks begin."""
    spans: list[Span] = []
    dist.barrier()
    origin = last = time.perf_counter()

    def ended(kind: Kind, block: int, number: int) -> None:
        nonlocal last
        synchronize(device)
        now = time.perf_counter()
        spans.append(
            Span(
                device=rank, stream=Stream.COMPUTE, kind=kind, name=f"{_LETTERS[kind]}{block} mb{number}", micro_batch=number, block=block,
                start_s=last - origin, end_s=now - origin,
            )
        )  # fmt: skip
        last = now

    part.watch(ended)
    part.gradients()
    last = time.perf_counter()
    part.update()
    synchronize(device)
    part.watch(None)
    now = time.perf_counter()
    spans.append(
        Span(
            device=rank,
            stream=Stream.COMPUTE,
            kind=Kind.OPTIMIZER,
            name="step",
            micro_batch=-1,
            block=-1,
            start_s=last - origin,
            end_s=now - origin,
        )
    )
    return tuple(spans)


def _times(part: PipelineRank | ModuleRank, steps: int, device: torch.device) -> StepTimes:
    """Steps that all ranks begin together, after one that is not counted; each as long as its slowest rank's."""
    seconds = []
    for repeat in range(steps + 1):
        dist.barrier()
        synchronize(device)
        started = time.perf_counter()
        part.step()
        synchronize(device)
        took = torch.tensor(time.perf_counter() - started, dtype=torch.float64, device=device)
        dist.all_reduce(took, op=dist.ReduceOp.MAX)
        if repeat:
            seconds.append(float(took))
    return StepTimes(seconds=tuple(seconds))


def _link(rank: int, device: torch.device) -> LinkFacts:
    """Latency and rate between ranks 0 and 1: half the time of a message there and back."""
    best: list[float] = []
    for size in _LINK_BYTES:
        message = torch.zeros(size, dtype=torch.uint8, device=device)
        times = []
        for _ in range(_LINK_REPEATS):
            dist.barrier()
            started = time.perf_counter()
            if rank == 0:
                dist.send(message, 1)
                dist.recv(message, 1)
            elif rank == 1:
                dist.recv(message, 0)
                dist.send(message, 0)
            synchronize(device)
            times.append((time.perf_counter() - started) / 2)
        best.append(sorted(times)[len(times) // 2])
    small, large = best
    return LinkFacts(latency_s=small, bytes_per_s=_LINK_BYTES[1] / max(large - small, 1e-9))


def _end_with(parent: int) -> None:
    """Ends this process when the one that started it is gone, however that ended."""
    while os.getppid() == parent:
        time.sleep(_PARENT_S)
    os._exit(1)


def main(folder: Path) -> int:
    """The exit status of a process that `validation.distributed.launch` started."""
    threading.Thread(target=_end_with, args=(int(os.environ["SCHEDLAB_PARENT"]),), daemon=True).start()
    job: Job = pickle.loads((folder / JOB_FILE).read_bytes())  # noqa: S301 - written by our own parent
    try:
        report = run_job(job, lambda text: print(text, file=sys.stderr, flush=True))  # noqa: T201 - the parent shows it
    except Exception as error:
        said = (str(error).strip() or "no message").splitlines()[0]
        (folder / ERROR_FILE.format(rank=os.environ["RANK"])).write_text(f"{type(error).__name__}: {said}", encoding="utf-8")
        raise
    if report is not None:
        (folder / REPORT_FILE).write_bytes(pickle.dumps(report))
    return 0


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
