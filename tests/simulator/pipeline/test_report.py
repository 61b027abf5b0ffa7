"""What the command prints: the keys, orders that come back as files, and the picture."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from hardware_models.errors import InputError
from simulator.pipeline.catalogue import OrderRequest
from simulator.pipeline.report import pipeline_grid, pipeline_report, play_request, times_in_ms

TIMES = times_in_ms((2.0,), (1.0,), (1.0,), 0.5)


def asked(schedule: str, **more: object) -> OrderRequest:
    return OrderRequest(schedule=schedule, num_ranks=2, num_microbatches=2, times=TIMES, **more)  # type: ignore[arg-type]


def test_keys_and_values() -> None:
    report = json.loads(json.dumps(pipeline_report(play_request(asked("1f1b")))))
    assert set(report) == {"makespan_ms", "bubble_ratio", "peak_activations", "orders"}
    assert report["makespan_ms"] == pytest.approx(13.0)
    assert report["bubble_ratio"] == pytest.approx(5 / 13)
    assert report["peak_activations"] == [2.0, 1.0]
    assert report["orders"] == ["0F0,0F1,0B0,0B1", "1F0,1B0,1F1,1B1"]


def test_a_report_s_orders_are_a_file_that_gives_the_same_report(tmp_path: Path) -> None:
    report = pipeline_report(play_request(asked("zb-h1")))
    path = tmp_path / "order.csv"
    path.write_text("\n".join(report["orders"]) + "\n", encoding="utf-8")
    assert pipeline_report(play_request(asked(f"file:{path}"))) == report
    with pytest.raises(InputError, match="num_microbatches == 2, but 3 are asked for"):
        play_request(OrderRequest(schedule=f"file:{path}", num_ranks=2, num_microbatches=3))
    with pytest.raises(InputError, match=r"missing\.csv: no such file; name a CSV file with a row per rank"):
        play_request(asked(f"file:{tmp_path / 'missing.csv'}"))


def test_grid_has_one_axis_of_time() -> None:
    assert pipeline_grid(play_request(asked("1f1b")), width=52).splitlines() == [
        "rank 0 0F0.....0F1.....            0B0.....        0B1.....",
        "rank 1           1F0.....1B0.....1F1.....1B1.....",
    ]


def test_times_are_checked() -> None:
    with pytest.raises(InputError, match="finite times >= 0"):
        times_in_ms((-1.0,), (1.0,), (1.0,), 0.0)
    with pytest.raises(InputError, match="1 or 2 entries"):
        play_request(
            OrderRequest(
                schedule="1f1b", num_ranks=2, num_microbatches=2, times=times_in_ms((1.0, 1.0, 1.0), (1.0,), (1.0,), 0.0)
            )
        )
    with pytest.raises(InputError, match="comm_s >= 0"):
        times_in_ms((1.0,), (1.0,), (1.0,), -0.1)
    with pytest.raises(InputError, match="0 <= weight_share <= 1"):
        play_request(asked("1f1b", weight_share=1.5))
