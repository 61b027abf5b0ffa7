"""Copies beside each other and beside kernels, on a bench whose laws are known."""

from __future__ import annotations

from collections.abc import Callable, Mapping

import pytest
import torch

from hardware_models import microbench_copies
from hardware_models.calibration_device import copy_engine, duplex_efficiency, line_of
from hardware_models.microbench_copies import COPY_BYTES, Bench, admitted_sizes, copy_timings, cpu_copy_timings, slowdown

LATENCY_S = 8e-6
RATES = {"h2d": 25e9, "d2h": 20e9, "pageable_h2d": 9e9, "pageable_d2h": 7e9}
DUPLEX = 0.8
SLOWDOWN = {"gemm": 1.1, "memory": 1.5}
COPY_SLOWDOWN = 1.2
KERNEL_S = {"gemm": 2e-4, "memory": 3e-4}


class FakeDevice:
    """Runs lanes by writing down what they ask for and working out the time."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, int]] = []

    def bench(self) -> Bench:
        """What `copy_timings` runs on."""
        return Bench(
            seconds=self.seconds, wall=self.wall, copies=lambda size: {name: self.asking(name, size) for name in RATES},
            kernels={name: self.asking(name, 0) for name in KERNEL_S},
        )  # fmt: skip

    def asking(self, name: str, size: int) -> Callable[[], None]:
        """A call that writes down what is asked for."""
        return lambda: self.asked.append((name, size))

    def wall(self, run: Callable[[], object]) -> float:
        """Of one pageable copy."""
        self.asked.clear()
        run()
        ((name, size),) = self.asked
        return LATENCY_S + size / RATES[name]

    def seconds(self, lanes: Mapping[str, Callable[[], object]]) -> Mapping[str, float]:
        """Of lanes at once, by the laws above."""
        work = {}
        for lane, run in lanes.items():
            self.asked.clear()
            run()
            work[lane] = list(self.asked)
        copies = {lane: LATENCY_S + asked[0][1] / RATES[asked[0][0]] for lane, asked in work.items() if asked[0][0] in RATES}
        kernels = {lane: asked for lane, asked in work.items() if asked[0][0] in KERNEL_S}
        if len(copies) == 2:
            return self.both(copies)
        if not kernels:
            return copies
        ((lane, asked),) = kernels.items()
        alone_s = len(asked) * KERNEL_S[asked[0][0]]
        if not copies:
            return {lane: alone_s}
        ((copy, copy_s),) = copies.items()
        beside_s = COPY_SLOWDOWN * copy_s
        assert alone_s > beside_s, "kernels last longer than the copy, so that it never runs alone"
        return {lane: alone_s + beside_s * (1 - 1 / SLOWDOWN[asked[0][0]]), copy: beside_s}

    @staticmethod
    def both(copies: Mapping[str, float]) -> Mapping[str, float]:
        """Of two copies that slow each other down until the shorter is done."""
        (short, short_s), (long, long_s) = sorted(copies.items(), key=lambda item: item[1])
        return {short: short_s / DUPLEX, long: short_s / DUPLEX + long_s - short_s}


def test_known_laws_are_recovered() -> None:
    rows = copy_timings(FakeDevice().bench(), sizes=COPY_BYTES)
    engine = copy_engine(rows)
    assert engine is not None
    assert engine["to_device_bytes_per_s"] == pytest.approx(25e9, rel=1e-3)
    assert engine["to_host_bytes_per_s"] == pytest.approx(20e9, rel=1e-3)
    assert engine["latency_s"] == pytest.approx(LATENCY_S, rel=1e-2)
    assert engine["duplex_efficiency"] == pytest.approx(DUPLEX, rel=1e-3)
    assert engine["compute_slowdown"] == pytest.approx((1.1 + 1.5) / 2, rel=1e-6)
    under = [one for row in rows for one in row.get("under", ())]
    assert {(one["kernel"], one["direction"]) for one in under} == {(k, d) for k in ("gemm", "memory") for d in ("h2d", "d2h")}
    assert all(one["copy_slowdown"] == pytest.approx(COPY_SLOWDOWN) for one in under)
    assert all(row["pageable_h2d_s"] > row["h2d_s"] for row in rows)
    assert [row["bytes"] for row in rows] == list(COPY_BYTES)


def test_progress_goes_up_to_one() -> None:
    told: list[float] = []
    copy_timings(FakeDevice().bench(), sizes=(2**12, 2**20), tell=told.append)
    assert told == [0.5, 1.0]


def test_slowdown_by_hand() -> None:
    # 10 ms of kernels take 12 ms with a copy of 4 ms beside them: in those 4 ms they did the work of 2
    assert slowdown(0.010, 0.012, 0.004) == pytest.approx(2.0)
    assert slowdown(0.010, 0.010, 0.004) == 1.0


def test_duplex_by_hand() -> None:
    assert duplex_efficiency(1.0, 1.0, 1.0) == 1.0
    assert duplex_efficiency(1.0, 1.0, 2.0) == 0.5
    assert duplex_efficiency(1.0, 2.0, 2.0) == 1.0
    assert duplex_efficiency(1.0, 1.0, 0.9) == 1.0  # no more than both at full rate, whatever the clock says


def test_line_of_few_sizes() -> None:
    rate = 2e9
    latency_s, found = line_of([{"bytes": size, "t": 1e-5 + size / rate} for size in (2**12, 2**16)], "t")
    assert found == pytest.approx(rate)
    assert latency_s == pytest.approx(1e-5)


def test_without_copies_there_is_no_engine() -> None:
    assert copy_engine([]) is None


def test_buffers_take_a_tenth_of_what_is_free() -> None:
    assert admitted_sizes(COPY_BYTES, host_bytes=2**34, device_bytes=2**40)[-1] == 2**30
    assert admitted_sizes(COPY_BYTES, host_bytes=2**32, device_bytes=2**40)[-1] == 2**28
    assert admitted_sizes(COPY_BYTES, host_bytes=2**40, device_bytes=2**10) == ()


def test_copies_of_a_cpu_take_buffers_in_turn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbench_copies, "_CPU_TURN_BYTES", 2**14)
    places: list[tuple[int, int]] = []
    monkeypatch.setattr(torch.Tensor, "copy_", lambda to, source: places.append((to.data_ptr(), source.data_ptr())))
    copies = microbench_copies._cpu_copies(2**12)
    for name in ("h2d", "d2h"):
        places.clear()
        for _ in range(4):
            copies[name]()
        assert places[:2] == places[2:], "half of the four buffers are each direction's, and after them come the first again"
        assert len({place for pair in places for place in pair}) == 4


def test_copies_of_a_cpu_have_every_key_of_a_gpus(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbench_copies, "_CPU_TURN_BYTES", 2**22)
    monkeypatch.setattr(microbench_copies, "_CPU_ADDED_ELEMENTS", 2**18)
    rows = cpu_copy_timings(quick=True)
    assert [row["bytes"] for row in rows] == [2**20, 2**26]
    assert all(row["h2d_s"] > 0 and row["duplex_s"] > 0 for row in rows)
    assert [(one["kernel"], one["direction"]) for one in rows[-1]["under"]] == [
        (k, d) for k in ("gemm", "memory") for d in ("h2d", "d2h")
    ]
    engine = copy_engine(rows)
    assert engine is not None
    assert engine["to_device_bytes_per_s"] > 1e8
    assert min(engine["compute_slowdown"], engine["copy_slowdown"]) >= 1.0
