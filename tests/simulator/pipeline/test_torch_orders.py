"""Our orders are torch's, action by action, and torch's runtime loads ours.

torch builds its orders without processes from stages that only know their numbers. It writes idle steps as None and adds gradient
reductions: both are left out.
"""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from simulator.pipeline.action import Order
from simulator.pipeline.asynchronous import pipedream_2bw
from simulator.pipeline.controllable_memory import v_half, v_min
from simulator.pipeline.one_way import gpipe, interleaved, looped_bfs, one_f_one_b
from simulator.pipeline.order_text import order_csv, parse_order
from simulator.pipeline.two_way import chimera, dualpipe, dualpipe_v
from simulator.pipeline.zero_bubble import zb_h1, zb_h2, zb_v
from simulator.pipeline.zero_bubble_auto import zb_auto

schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")


def torch_schedule(kind: str, num_ranks: int, num_microbatches: int, chunks: int) -> Any:
    """A schedule of torch on stages that stand for nothing."""
    stages = [
        SimpleNamespace(
            num_stages=num_ranks * chunks, group_size=num_ranks, group_rank=0, stage_index=chunk * num_ranks, submod=SimpleNamespace(),
            has_backward=True, is_first=chunk == 0, is_last=False, stage_index_to_group_rank={},
        )
        for chunk in range(chunks)
    ]  # fmt: skip
    made: Any = getattr(schedules, kind)
    return made(stages[0] if kind in {"ScheduleGPipe", "Schedule1F1B"} else stages, num_microbatches)


def torch_texts(schedule: Any) -> list[list[str]]:
    order = schedule._get_pipeline_order() if hasattr(schedule, "_get_pipeline_order") else schedule.pipeline_order
    return [[str(cell) for cell in order[rank] if cell is not None and cell.is_compute_op] for rank in sorted(order)]


def our_texts(order: Order) -> list[list[str]]:
    return [[str(cell) for cell in cells] for cells in order.ranks]


SIZES = [(1, 1), (2, 4), (3, 9), (4, 8), (4, 10), (8, 24), (8, 64), (16, 32)]


@pytest.mark.parametrize(("ranks", "batches"), SIZES)
def test_gpipe(ranks: int, batches: int) -> None:
    assert our_texts(gpipe(ranks, batches)) == torch_texts(torch_schedule("ScheduleGPipe", ranks, batches, 1))


@pytest.mark.parametrize(("ranks", "batches"), SIZES)
def test_1f1b(ranks: int, batches: int) -> None:
    """Torch 2.13's table (not what it runs) counts the last rank's forward passes from 1: there, 1F1 comes first and 1F0 never."""
    *ours, last = our_texts(one_f_one_b(ranks, batches))
    *theirs, torch_last = torch_texts(torch_schedule("Schedule1F1B", ranks, batches, 1))
    assert ours == theirs
    first = 0 if f"{ranks - 1}F0" in torch_last else 1
    shifted = [f"{stage}F{int(batch) + first}" if batch else word for word in last for stage, _, batch in [word.partition("F")]]
    assert shifted == torch_last


@pytest.mark.parametrize("chunks", [2, 3, 4])
@pytest.mark.parametrize(("ranks", "batches"), [*SIZES, (4, 3)])
def test_interleaved(ranks: int, batches: int, chunks: int) -> None:
    theirs = torch_schedule("ScheduleInterleaved1F1B", ranks, batches, chunks)
    assert our_texts(interleaved(ranks, batches, virtual_stages=chunks)) == torch_texts(theirs)


@pytest.mark.parametrize("chunks", [2, 3])
@pytest.mark.parametrize(("ranks", "batches"), SIZES)
def test_looped_bfs(ranks: int, batches: int, chunks: int) -> None:
    theirs = torch_schedule("ScheduleLoopedBFS", ranks, batches, chunks)
    assert our_texts(looped_bfs(ranks, batches, virtual_stages=chunks)) == torch_texts(theirs)


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize(("ranks", "batches"), SIZES)
def test_interleaved_zero_bubble(ranks: int, batches: int, chunks: int) -> None:
    theirs = torch_schedule("ScheduleInterleavedZeroBubble", ranks, batches, chunks)
    assert our_texts(zb_h1(ranks, batches, virtual_stages=chunks)) == torch_texts(theirs)


@pytest.mark.parametrize(("ranks", "batches"), [*SIZES, (4, 3), (8, 9)])
def test_zb_v(ranks: int, batches: int) -> None:
    assert our_texts(zb_v(ranks, batches)) == torch_texts(torch_schedule("ScheduleZBVZeroBubble", ranks, batches, 2))


@pytest.mark.parametrize(("ranks", "batches"), [(1, 2), (2, 4), (3, 7), (4, 8), (4, 10), (8, 24), (16, 32)])
def test_dualpipe_v(ranks: int, batches: int) -> None:
    assert our_texts(dualpipe_v(ranks, batches)) == torch_texts(torch_schedule("ScheduleDualPipeV", ranks, batches, 2))


ONE_PLACE = {
    "gpipe": gpipe(4, 8),
    "1f1b": one_f_one_b(4, 8),
    "interleaved": interleaved(4, 8, virtual_stages=2),
    "looped-bfs": looped_bfs(4, 8, virtual_stages=2),
    "zb-h1": zb_h1(4, 8),
    "zb-h2": zb_h2(4, 8),
    "zb-1p": zb_auto(4, 8, memory_limit=4),
    "zb-v": zb_v(4, 8),
    "v-half": v_half(4, 8),
    "v-min": v_min(4, 8),
    "dualpipe-v": dualpipe_v(4, 8),
    "pipedream-2bw": pipedream_2bw(4, 8),
}


@pytest.mark.parametrize("name", ONE_PLACE)
def test_torch_loads_our_csv_and_writes_it_back(name: str, tmp_path: Path) -> None:
    order = ONE_PLACE[name]
    ours, theirs = tmp_path / "ours.csv", tmp_path / "theirs.csv"
    ours.write_text(order_csv(order), encoding="utf-8", newline="")
    runtime = torch_schedule("_PipelineScheduleRuntime", order.num_ranks, 8, order.num_stages // order.num_ranks)
    runtime._load_csv(str(ours), format="compute_only")
    assert torch_texts(runtime) == our_texts(order)
    assert runtime.stage_index_to_group_rank == {stage: ranks[0] for stage, ranks in enumerate(order.ranks_of_stage)}
    assert all(runtime.pipeline_order_with_comms[rank] for rank in range(order.num_ranks))
    runtime._dump_csv(str(theirs), format="compute_only")
    assert theirs.read_bytes() == ours.read_bytes()
    assert parse_order(theirs.read_text(encoding="utf-8")).ranks == order.ranks


@pytest.mark.parametrize("order", [chimera(4, 8), dualpipe(4, 8)], ids=["chimera", "dualpipe"])
def test_torch_cannot_place_two_directions(order: Order, tmp_path: Path) -> None:
    ours = tmp_path / "ours.csv"
    ours.write_text(order_csv(order), encoding="utf-8", newline="")
    with pytest.raises(AssertionError, match="is assigned to both rank"):
        torch_schedule("_PipelineScheduleRuntime", 4, 8, 1)._load_csv(str(ours), format="compute_only")
