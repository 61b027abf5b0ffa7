"""Pictures of devices: lines are the prices, points the timings, and the committed gallery is complete."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from hardware_models.catalogue import catalogue_names, load_hardware
from hardware_models.gallery_figures import (
    Published,
    device_figure,
    drawn_grid,
    has_picture,
    main,
    node_stack,
    read_published,
    save_picture,
)
from hardware_models.kernel_tables import TimedKernel, TimedStream, gemm_kernel
from hardware_models.network.network_tables import TimedCollective

FOLDER = Path(__file__).parents[2] / "hardware_models"
MOST_BYTES, MOST_BYTES_IN_ALL = 120_000, 2_000_000


def panels(figure: Figure) -> list[Axes]:
    return list(figure.axes)


def line(axes: Axes, label: str) -> tuple[np.ndarray, np.ndarray]:
    (found,) = [one for one in axes.lines if one.get_label() == label]
    return np.asarray(found.get_xdata()), np.asarray(found.get_ydata())


def points(axes: Axes) -> list[tuple[float, float]]:
    dots = [one for one in axes.lines if one.get_marker() == "o"]
    return [(float(x), float(y)) for one in dots for x, y in zip(one.get_xdata(), one.get_ydata(), strict=True)]  # type: ignore[arg-type]


def test_a_device_without_timings_shows_its_curves() -> None:
    profile = load_hardware("l4")
    products, attention, ramp, collectives = panels(device_figure(profile))
    grid = drawn_grid(profile, "mm")
    assert grid is not None
    rows, rates = line(products, "n = 4096, k = 4096")
    last = int(rows[-1])
    assert rates[-1] == pytest.approx(2 * last * 4096**2 / grid.seconds(np.array([[last, 4096, 4096]]))[0] / 1e12)
    assert rates.max() < profile.peak("bfloat16") / 1e12
    assert "not timed, borrowed" in products.get_title()
    assert "borrowed" in attention.get_title()
    moved, bandwidth = line(ramp, "in a CUDA graph, 8-byte loads")
    assert profile.light is not None
    assert bandwidth[0] == pytest.approx(moved[0] / float(profile.light.seconds(moved[0], launch="graph")) / 1e9)
    assert not collectives.axison
    assert all(not points(panel) for panel in (products, attention, ramp))


def test_timings_of_the_device_and_software_become_points() -> None:
    profile = load_hardware("h100-sxm")
    grid = drawn_grid(profile, "mm")
    assert grid is not None
    assert grid.stack == "torch.nn.functional.linear"

    def timed(device: str, stack: str, m: int) -> TimedKernel:
        kernel = gemm_kernel(m, 4096, 4096, "bfloat16")
        return TimedKernel(device=device, stack=stack, kernel=kernel, seconds=1e-4, op="gemm", source="made", line=2)

    published = Published(
        kernels=(timed("NVIDIA H100 80GB HBM3", grid.stack, 512), timed("NVIDIA B200", grid.stack, 64), timed("H100", "other", 128)),
        streams=(
            TimedStream(device="h100", launch="graph", moved_bytes=2.0**20, read_fraction=0.5, seconds=1e-6, op="small_kernel", line=2),
        ),
        collectives=(
            TimedCollective(
                device="NVIDIA H100 80GB HBM3", stack="nccl-2.29.2", collective="all_reduce", num_ranks=8, num_nodes=1, ranks_per_node=8, bytes=2.0**20,
                dtype="half", seconds=1e-4, platform="NVIDIA H100 80GB HBM3", source="made", commit="0", line=2,
            ),
        ),
    )  # fmt: skip
    products, _attention, ramp, collectives = panels(device_figure(profile, published))
    assert points(products) == [(512.0, pytest.approx(2 * 512 * 4096**2 / 1e-4 / 1e12))]
    assert points(ramp) == [(2.0**20, pytest.approx(2.0**20 / 1e-6 / 1e9))]
    assert points(collectives) == [(2.0**20, pytest.approx(1.75 * 2.0**20 / 1e-4 / 1e9))]


def test_bus_bandwidth_stays_below_what_the_link_allows() -> None:
    collectives = panels(device_figure(load_hardware("a100-sxm-80gb")))[3]
    _sizes, rate = line(collectives, "all_gather, 8 GPUs")
    assert 0.5 * 300 < rate[-1] < 300  # NVLink 3: 300 GB/s each way


def test_only_nodes_of_the_very_device_count_as_measured() -> None:
    found = node_stack("h100-sxm")
    assert found is not None
    assert found.name == "hgx-h100-nccl-2.29.2"
    assert node_stack("l4") is None
    assert node_stack("b300") is None


def test_nothing_known_is_no_picture() -> None:
    profile = load_hardware("t4")
    assert has_picture(profile)
    assert drawn_grid(profile, "mm") is not None
    assert not has_picture(profile.changed(grids=(), light=None))


def test_tables_are_read_by_their_columns(tmp_path: Path) -> None:
    (tmp_path / "a.csv").write_text("gpu,mode,bytes_moved,time_per_kernel_us\na40,cudaGraph,64,1.5\n", encoding="utf-8")
    (tmp_path / "b.csv").write_text(
        "m,n,k,dtype,device,kernel_source,latency_us\n1,2,3,bfloat16,NVIDIA B200,x,4\n", encoding="utf-8"
    )
    (tmp_path / "c.csv").write_text("gpu,peak\na40,1\n", encoding="utf-8")
    published = read_published(tmp_path)
    assert (len(published.kernels), len(published.streams), len(published.collectives)) == (1, 1, 0)


def test_pictures_repeat_byte_by_byte_and_are_small(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    main(["--out", str(tmp_path), "--device", "l4"])
    assert capsys.readouterr().out == f"{tmp_path / 'l4.png'}\n"
    save_picture(device_figure(load_hardware("l4")), tmp_path / "again.png")
    content = (tmp_path / "l4.png").read_bytes()
    assert content == (tmp_path / "again.png").read_bytes()
    assert content.startswith(b"\x89PNG")
    assert 5_000 < len(content) < MOST_BYTES


def test_the_gallery_holds_every_device_and_the_readme_shows_it() -> None:
    pictures = list((FOLDER / "gallery").glob("*.png"))
    assert sorted(path.stem for path in pictures) == list(catalogue_names())
    sizes = [path.stat().st_size for path in pictures]
    assert max(sizes) < MOST_BYTES
    assert sum(sizes) < MOST_BYTES_IN_ALL
    text = (FOLDER / "README.md").read_text(encoding="utf-8")
    assert [path.name for path in pictures if f"gallery/{path.name}" not in text] == []
