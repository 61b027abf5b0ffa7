"""Bubble rates that the Zero Bubble paper publishes, from its stage times.

Source: arXiv 2401.10241v1, tables 5 and 9 (techniques.md, appendix A). The table's stage times are those of a full stage, on every rank.
"""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from simulator.pipeline.catalogue import OrderRequest
from simulator.pipeline.play_order import RankTimes
from simulator.pipeline.report import play_request, times_in_ms

CELLS = ("1f1b", "interleaved", "zb-h1", "zb-h2", "zb-1p", "zb-2p")
PUBLISHED = {
    (8, 24, 18.522, 18.086, 9.337, 0.601): (0.2431, 0.1055, 0.1585, 0.1083, 0.1585, 0.0433),
    (8, 32, 18.513, 18.086, 9.331, 0.626): (0.1985, 0.0818, 0.1242, 0.0837, 0.1242, 0.0039),
    (8, 64, 18.546, 18.097, 9.321, 0.762): (0.1240, 0.0443, 0.0674, 0.0444, 0.0674, 0.0026),
    (16, 48, 11.347, 11.248, 8.132, 0.377): (0.2552, 0.1104, 0.1397, 0.0672, 0.1397, 0.0066),
    (16, 64, 11.307, 11.254, 8.101, 0.379): (0.2082, 0.0852, 0.1088, 0.0516, 0.1088, 0.0054),
    (16, 128, 11.325, 11.308, 8.109, 0.378): (0.1251, 0.0445, 0.0576, 0.0266, 0.0576, 0.0028),
}
"""p, m, T_F, T_B, T_W, T_comm (ms) -> bubble rates in the order of `CELLS`."""
LAYERS_OF_STAGE = 3
"""Of these models: interleaved runs one layer a chunk."""
STAGE_TIMES = Path(__file__).parents[4] / "shared" / "published" / "zero_bubble_stage_times.csv"


def bubble(schedule: str, ranks: int, batches: int, times: RankTimes) -> float:
    chunks = LAYERS_OF_STAGE if schedule == "interleaved" else None
    request = OrderRequest(schedule=schedule, num_ranks=ranks, num_microbatches=batches, virtual_stages=chunks, times=times)
    played = play_request(request)
    if schedule in {"zb-1p", "zb-2p"}:
        assert max(played.peak_activations) <= ranks * (1 if schedule == "zb-1p" else 2)
    return played.bubble_ratio


def check(schedule: str, found: float, published: float) -> None:
    if schedule in {"1f1b", "zb-h1", "zb-h2"}:
        assert round(found, 4) == published
    elif schedule == "interleaved":
        assert found == pytest.approx(published, abs=0.004)
    else:
        assert found <= published + 0.0005


@pytest.mark.parametrize("schedule", CELLS)
@pytest.mark.parametrize("row", PUBLISHED, ids=lambda row: f"{row[0]}x{row[1]}")
def test_published_rate(row: tuple[int, int, float, float, float, float], schedule: str) -> None:
    ranks, batches, forward, gradient, weight, comm = row
    times = times_in_ms((forward,), (gradient,), (weight,), comm)
    check(schedule, bubble(schedule, ranks, batches, times), PUBLISHED[row][CELLS.index(schedule)])


@pytest.mark.skipif(not STAGE_TIMES.exists(), reason="the published tables are not beside the project")
def test_rows_of_the_file() -> None:
    """The file holds stage times only: rates come from `PUBLISHED`, and ZB-2p beats ZB-1p, that 1F1B."""
    with STAGE_TIMES.open(encoding="utf-8", newline="") as file:
        for row in csv.DictReader(file):
            times = times_in_ms(
                (float(row["T_F_ms"]),), (float(row["T_B_ms"]),), (float(row["T_W_ms"]),), float(row["T_comm_ms"])
            )
            ranks, batches = int(row["pp"]), int(row["n_microbatches"])
            found = {schedule: bubble(schedule, ranks, batches, times) for schedule in ("1f1b", "zb-1p", "zb-2p")}
            known = PUBLISHED.get((ranks, batches, *(float(row[key]) for key in ("T_F_ms", "T_B_ms", "T_W_ms", "T_comm_ms"))))
            if known is not None:
                for schedule, value in found.items():
                    check(schedule, value, known[CELLS.index(schedule)])
            assert found["zb-2p"] < found["zb-1p"] < found["1f1b"]
