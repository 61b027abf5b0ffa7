"""Pipeline orders by the names that plans and the command line use."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hardware_models.errors import InfeasibleError, UnknownNameError
from simulator.pipeline.action import Order
from simulator.pipeline.asynchronous import pipedream_2bw
from simulator.pipeline.controllable_memory import CHUNKS, v_half, v_limited, v_min
from simulator.pipeline.one_way import gpipe, interleaved, looped_bfs, one_f_one_b
from simulator.pipeline.order_text import read_order
from simulator.pipeline.play_order import WEIGHT_SHARE, RankTimes, play_order
from simulator.pipeline.sizes import check_sizes, size_error
from simulator.pipeline.two_way import ChimeraMode, chimera, dualpipe, dualpipe_v
from simulator.pipeline.zero_bubble import zb_h1, zb_h2, zb_v
from simulator.pipeline.zero_bubble_auto import EQUAL_TIMES, zb_auto
from simulator.pipeline.zero_bubble_kernels import MEMORY_SLACK

FILE_PREFIX = "file:"
"""Begins the name of an order that comes from a CSV file."""
_ONE_CHUNK = MappingProxyType(
    {"gpipe": gpipe, "1f1b": one_f_one_b, "zb-h2": zb_h2, "pipedream-2bw": pipedream_2bw, "dualpipe": dualpipe}
)
_ANY_CHUNKS = MappingProxyType({"interleaved": (interleaved, 3), "looped-bfs": (looped_bfs, 2), "zb-h1": (zb_h1, 1)})
"""Generator, and the chunks of a rank where none are given: three, as in the published bubbles of interleaved 1F1B (arXiv 2401.10241, table 5)."""
_V = MappingProxyType({"zb-v": zb_v, "v-half": v_half, "v-min": v_min})
"""Two chunks, and any limit of memory from V-Min's on."""
_AUTO = MappingProxyType({"zb-1p": 1, "zb-2p": 2})
"""Limit of memory in M_B over ranks, where none is given."""
PIPELINE_SCHEDULES = (*_ONE_CHUNK, *_ANY_CHUNKS, *_AUTO, *_V, "dualpipe-v", "chimera")
"""All names, but for ``file:ORDER.csv``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class OrderRequest:
    """Which order is wanted. What a schedule has no use for is refused, not ignored."""

    schedule: str
    """One of `PIPELINE_SCHEDULES`, or ``file:ORDER.csv``."""
    num_ranks: int
    """Pipeline ranks."""
    num_microbatches: int
    """Micro-batches of a step."""
    virtual_stages: int | None = None
    """Chunks of a rank; None is the schedule's own number."""
    memory_limit: float | None = None
    """Most activations of a rank in its M_B; None is the schedule's own."""
    chimera_mode: ChimeraMode = "direct"
    """How Chimera runs more micro-batches than ranks."""
    times: RankTimes = EQUAL_TIMES
    """What ZB-1p and ZB-2p are made for."""
    weight_share: float = WEIGHT_SHARE
    """Part of a micro-batch's activations that goes with its weight gradient."""


def make_order(request: OrderRequest) -> Order:
    """The order of a request.

    Raises:
        UnknownNameError: no schedule has the name.
        InputError: the schedule does not exist at these sizes, or the file cannot be read or run.
        InfeasibleError: the schedule needs more than the limit of memory.
    """
    name, ranks, batches, limit = request.schedule, request.num_ranks, request.num_microbatches, request.memory_limit
    check_sizes(name, num_ranks=ranks, num_microbatches=batches, virtual_stages=request.virtual_stages or 1)
    if name in _AUTO:
        _check_chunks(request, 1)
        wanted = _AUTO[name] * ranks if limit is None else limit
        return zb_auto(ranks, batches, memory_limit=wanted, times=request.times, weight_share=request.weight_share, name=name)
    if name in _V and limit is not None:
        _check_chunks(request, CHUNKS)
        return v_limited(ranks, batches, memory_limit=limit, name=name)
    order = _fixed_order(request)
    if limit is not None:
        _check_limit(order, request, limit)
    return order


def _fixed_order(request: OrderRequest) -> Order:
    name, ranks, batches = request.schedule, request.num_ranks, request.num_microbatches
    if name.startswith(FILE_PREFIX):
        return _order_from_file(request)
    if name in _ONE_CHUNK:
        _check_chunks(request, 1)
        return _ONE_CHUNK[name](ranks, batches)
    if name in _ANY_CHUNKS:
        generator, chunks = _ANY_CHUNKS[name]
        return generator(ranks, batches, virtual_stages=request.virtual_stages or chunks)
    if name in _V:
        _check_chunks(request, CHUNKS)
        return _V[name](ranks, batches)
    if name == "dualpipe-v":
        _check_chunks(request, CHUNKS)
        return dualpipe_v(ranks, batches)
    if name == "chimera":
        _check_chunks(request, 1)
        return chimera(ranks, batches, mode=request.chimera_mode)
    raise UnknownNameError(
        source="pipeline", key="schedule", value=name, known=(*PIPELINE_SCHEDULES, FILE_PREFIX + "ORDER.csv")
    )


def _order_from_file(request: OrderRequest) -> Order:
    order = read_order(Path(request.schedule.removeprefix(FILE_PREFIX)))
    for key, found in (("num_ranks", order.num_ranks), ("num_microbatches", order.num_microbatches)):
        if found != getattr(request, key):
            rule = f"the file's order has {key} == {found}, but {getattr(request, key)} are asked for"
            raise size_error(request.schedule, key, getattr(request, key), rule, f"ask for {found}")
    if request.virtual_stages not in (None, order.num_stages // order.num_ranks):
        rule = f"the file's order has {order.num_stages} stages on {order.num_ranks} ranks"
        raise size_error(request.schedule, "virtual_stages", request.virtual_stages, rule, "leave it out")
    return order


def _check_chunks(request: OrderRequest, chunks: int) -> None:
    if request.virtual_stages not in (None, chunks):
        rule = f"schedule {request.schedule} runs virtual_stages == {chunks}, but got {request.virtual_stages}"
        raise size_error(
            request.schedule, "virtual_stages", request.virtual_stages, rule, "leave it out, or take another schedule"
        )


def _check_limit(order: Order, request: OrderRequest, limit: float) -> None:
    peak = max(play_order(order, EQUAL_TIMES, weight_share=request.weight_share).peak_activations)
    if peak > limit + MEMORY_SLACK:
        text = f"schedule {request.schedule} holds {peak:g} M_B on a rank, memory_limit is {limit:g}"
        raise InfeasibleError(limit=text, smallest_change=f"memory_limit >= {peak:g} would do, or schedule zb-1p or v-min")
