"""Fitting collectives: known curves come back, noise is smoothed, files round trip, bad files are refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from hardware_models.errors import InputError
from hardware_models.network.collective_algorithms import bus_factor
from hardware_models.network.collective_curves import COLLECTIVES_FOLDER, read_stack
from hardware_models.network.collective_fit import cross_validate, leave_devices_out, main
from hardware_models.network.collective_smoothing import Point, smooth, thin
from hardware_models.network.collective_stacks import fit_stacks
from hardware_models.network.network_tables import TimedCollective
from hardware_models.network.platforms import predict_price

HEADER = "origin,source,provenance,device,nccl_version,n_gpus,n_nodes,collective,dtype,bytes,time_us,algbw_GBps,busbw_GBps\n"


def true_seconds(ranks: int, size: float) -> float:
    """Three protocols on NVLink 3."""
    wire = size * bus_factor("all_gather", ranks) / 300e9
    return float(
        min(
            5e-6 + 1e-6 * (ranks - 1) + 20 * wire,
            8e-6 + 1.5e-6 * (ranks - 1) + 3 * wire,
            30e-6 + 2e-6 * (ranks - 1) + 1.3 * wire,
        )
    )


def made_rows(noise: float = 0.0, seed: int = 0) -> list[TimedCollective]:
    generator = np.random.default_rng(seed)
    return [
        TimedCollective(
            device="NVIDIA A100-SXM4-80GB", stack="nccl-2.27.3", collective="all_gather", num_ranks=ranks, num_nodes=1, ranks_per_node=ranks,
            bytes=2.0**octave, dtype="half", seconds=true_seconds(ranks, 2.0**octave) * float(np.exp(noise * generator.standard_normal())),
            platform="NVIDIA A100-SXM4-80GB", source="made", commit="0", line=2,
        )
        for ranks in (2, 4, 8) for octave in range(9, 31)
    ]  # fmt: skip


def test_three_protocols_come_back() -> None:
    rows = made_rows()
    (stack,) = fit_stacks(rows)
    errors = [abs(predict_price(row, [stack]).seconds / row.seconds - 1) for row in rows]
    assert np.median(errors) < 0.01
    assert max(errors) < 0.1


def test_held_out_sizes_are_predicted() -> None:
    errors = np.array([error for _, _, error in cross_validate(made_rows(noise=0.02))])
    assert len(errors) == 66
    assert np.median(np.abs(errors)) < 0.03


def test_cross_validation_never_sees_the_held_out_size() -> None:
    """A single absurd row must be predicted as if it were not there."""
    rows = made_rows()
    rows[10] = replace(rows[10], seconds=1.0)
    errors = {(row.num_ranks, row.bytes): error for row, _, error in cross_validate(rows)}
    assert errors[rows[10].num_ranks, rows[10].bytes] < np.log(true_seconds(rows[10].num_ranks, rows[10].bytes)) / 2


def test_a_device_left_out_is_priced_by_the_others() -> None:
    """H100 timings made by the transfer rule itself: 1.5 times the rate, 1.98 / 1.41 times the clock."""
    clock = 1.41 / 1.98
    others = [
        replace(
            row,
            device="H",
            platform="NVIDIA H100 80GB HBM3",
            seconds=clock * true_seconds(row.num_ranks, row.bytes / 1.5 / clock),
        )
        for row in made_rows()
    ]
    errors = np.array([error for _, error in leave_devices_out([*made_rows(), *others], ("h100-sxm",))])
    assert len(errors) == len(others)
    assert np.median(np.abs(errors)) < 0.02


def point(octave: float, residual: float, curve: str = "a") -> Point:
    return Point(family="f", collective="all_reduce", curve=curve, num_ranks=8, log2_bytes=octave, residual=residual)


def test_smoothing_follows_a_curve_and_forgets_it_far_away() -> None:
    points = [point(octave, 0.1 * np.sin(octave)) for octave in np.arange(10, 20, 0.5)]
    near = smooth(points, [point(12.25, 0.0)])
    assert near == pytest.approx([0.1 * np.sin(12.25)], abs=0.01)
    assert abs(smooth(points, [point(60.0, 0.0)])[0]) < 1e-3


def test_like_curves_help_each_other() -> None:
    known = [point(octave, 0.2) for octave in range(10, 20)] + [point(10.0, 0.2, "b"), point(19.0, 0.2, "b")]
    alone = smooth(known[-2:], [point(14.5, 0.0, "b")])[0]
    helped = smooth(known, [point(14.5, 0.0, "b")])[0]
    assert abs(helped - 0.2) < abs(alone - 0.2)


def test_thinning_keeps_the_line_within_tolerance() -> None:
    knots = np.linspace(0.0, 10.0, 101)
    values = np.abs(knots - 5.0)
    kept = thin(knots, values, 1e-6)
    assert kept == [0, 50, 100]
    assert np.abs(np.interp(knots, knots[kept], values[kept]) - values).max() < 1e-9


def test_the_command_writes_stacks_that_read_back(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    lines = [
        f"read,made,0,{row.device},2.27.3,{row.num_ranks},1,all_gather,half,{int(row.bytes)},{row.seconds * 1e6},1,1\n"
        for row in made_rows(0.02)
    ]
    (tmp_path / "table.csv").write_text(HEADER + "".join(lines), encoding="utf-8")
    (tmp_path / "other.csv").write_text("m,n,k\n1,2,3\n", encoding="utf-8")
    main(["--measurements", str(tmp_path), "--out", str(tmp_path / "out")])
    assert "made" in capsys.readouterr().out
    stack = read_stack(tmp_path / "out" / "dgx-a100-80gb-nccl-2.27.3.toml")
    assert (stack.nccl_version, stack.automatic, len(stack.curves)) == ("2.27.3", ("intra",), 3)
    assert all(0 < curve.relative_standard_error < 0.2 for curve in stack.curves)


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("log2_bytes = [", "log2_bytes = [\n    99.0,", "knots increase and log_ratio has as many values"),
        ("num_ranks = 2", "num_ranks = 1", r"curve\.\d+\.num_ranks = 1"),
        ("base_s = ", "base_s = -", r"base_s = -.*greater than or equal to 0"),
    ],
)
def test_bad_stacks_are_refused(tmp_path: Path, old: str, new: str, message: str) -> None:
    text = (COLLECTIVES_FOLDER / "hgx-h100-nccl-2.29.2.toml").read_text(encoding="utf-8")
    assert old in text
    path = tmp_path / "stack.toml"
    path.write_text(text.replace(old, new, 1), encoding="utf-8")
    with pytest.raises(InputError, match=message) as caught:
        read_stack(path)
    assert str(path) in str(caught.value)
