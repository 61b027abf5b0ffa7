"""What talks to the driver, on a fake CUDA namespace with a clock of its own: events, lanes, the driver's answers, the allocator's traces."""

from __future__ import annotations

import json
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from hardware_models import microbench_allocator, microbench_environment, microbench_timing
from hardware_models.microbench_allocator import (
    allocator_timings,
    child_environment,
    compact,
    entries_of,
    play,
    sequences,
    training_step,
)
from hardware_models.microbench_cases import Call, Case, Pool
from hardware_models.microbench_environment import GpuMonitor, parse_smi_line, query_gpu, reasons_of, summary_of
from hardware_models.microbench_sustained import sustained_timings
from hardware_models.microbench_timing import Lanes, Stopwatch, flush_bytes, keep_busy

MIB = 2**20


class FakeCuda:
    """Streams with a time each; a kernel is a call of `work`, a busy wait is one of two cycles a nanosecond."""

    def __init__(self) -> None:
        self.now_s: dict[str, float] = {"default": 0.0}
        self.current = "default"
        self.log: list[str] = []
        fake = self

        class Event:
            def __init__(self, *, enable_timing: bool = False) -> None:
                assert enable_timing
                self.at_s = -1.0

            def record(self, stream: Any = None) -> None:
                self.at_s = fake.now_s[stream.name if stream else fake.current]

            def synchronize(self) -> None:
                fake.log.append("wait for event")

            def elapsed_time(self, end: Any) -> float:
                return (end.at_s - self.at_s) * 1e3

        class Stream:
            def __init__(self) -> None:
                self.name = f"stream{len(fake.now_s)}"
                fake.now_s[self.name] = 0.0

            def wait_event(self, event: Event) -> None:
                fake.now_s[self.name] = max(fake.now_s[self.name], event.at_s)

        self.Event, self.Stream = Event, Stream

    @contextmanager
    def stream(self, stream: Any) -> Iterator[None]:
        """Makes a stream the current one."""
        before, self.current = self.current, stream.name
        yield
        self.current = before

    def synchronize(self) -> None:
        """All streams wait for the last."""
        latest = max(self.now_s.values())
        self.now_s = dict.fromkeys(self.now_s, latest)

    def _sleep(self, cycles: int) -> None:
        self.log.append("busy")
        self.now_s[self.current] += cycles / 2e9

    def get_device_properties(self, _device: int) -> SimpleNamespace:
        """A cache of 50 MiB."""
        return SimpleNamespace(L2_cache_size=50 * MIB, uuid="1234-abcd")

    def work(self, seconds: float) -> Callable[[], None]:
        """A kernel of so many seconds."""

        def run() -> None:
            self.now_s[self.current] += seconds

        return run


@pytest.fixture
def cuda(monkeypatch: pytest.MonkeyPatch) -> FakeCuda:
    fake = FakeCuda()
    namespace = SimpleNamespace(cuda=fake, zeros=lambda *_a, **_k: torch.zeros(4), int8=torch.int8)
    monkeypatch.setattr(microbench_timing, "torch", namespace)
    monkeypatch.setattr(microbench_environment, "torch", namespace)
    return fake


def test_events_time_the_device_and_not_the_wait_before_it(cuda: FakeCuda) -> None:
    stopwatch = Stopwatch("cuda")
    assert stopwatch.time(cuda.work(3e-5), 4, host_s=1e-3) == pytest.approx(1.2e-4)
    assert cuda.log == ["busy", "wait for event"]
    assert stopwatch.host_s > 0


@pytest.mark.parametrize(("host_s", "wait_s"), [(0.0, 2e-4), (2e-3, 3e-3), (5.0, 0.1)])
def test_the_device_is_busy_while_the_host_enqueues(cuda: FakeCuda, host_s: float, wait_s: float) -> None:
    keep_busy(host_s)
    assert cuda.now_s["default"] == pytest.approx(wait_s)


def test_lanes_start_together_and_overlap(cuda: FakeCuda) -> None:
    lanes = Lanes()
    for _ in range(2):  # streams are used again
        found = lanes.seconds({"copy": cuda.work(0.3), "compute": cuda.work(0.2)})
        assert found == pytest.approx({"copy": 0.3, "compute": 0.2})
    assert len(cuda.now_s) == 3


@pytest.mark.parametrize(("cache_mib", "flushed_mib"), [(4, 32), (50, 150), (126, 378), (300, 512)])
def test_the_flushed_buffer_exceeds_the_cache(cuda: FakeCuda, cache_mib: int, flushed_mib: int) -> None:
    cuda.get_device_properties = lambda _device: SimpleNamespace(L2_cache_size=cache_mib * MIB)  # type: ignore[method-assign]
    assert flush_bytes("cuda") == flushed_mib * MIB


def smi(monkeypatch: pytest.MonkeyPatch, known: dict[str, str]) -> list[list[str]]:
    commands: list[list[str]] = []

    def run(command: list[str], **_: object) -> SimpleNamespace:
        commands.append(command)
        fields = command[1].removeprefix("--query-gpu=").split(",")
        if any(name not in known for name in fields):
            return SimpleNamespace(returncode=2, stdout='Field "x" is not a valid field to query.\n')
        return SimpleNamespace(returncode=0, stdout=", ".join(known[name] for name in fields) + "\n")

    monkeypatch.setattr(subprocess, "run", run)
    return commands


@pytest.mark.usefixtures("cuda")
def test_fields_that_a_driver_does_not_know_are_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    commands = smi(monkeypatch, {"driver_version": "550.54", "power.limit": "700.00", "ecc.mode.current": "[N/A]"})
    assert query_gpu(("driver_version", "power.limit", "ecc.mode.current", "new.field")) == {
        "driver_version": 550.54,
        "power.limit": 700.0,
    }
    assert all(command[-2:] == ["-i", "GPU-1234-abcd"] for command in commands)


@pytest.mark.usefixtures("cuda")
def test_the_older_name_of_the_reasons_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    smi(monkeypatch, {"clocks_throttle_reasons.active": "0x0000000000000004"})
    assert microbench_environment.reasons_field() == ("clocks_throttle_reasons.active",)


@pytest.mark.usefixtures("cuda")
def test_a_machine_without_the_tool_tells_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(microbench_environment, "_SMI", "no-such-tool-anywhere")
    assert query_gpu(("driver_version",)) == {}
    with GpuMonitor() as monitor:
        assert monitor.between(0.0, 1e12) == {"num": 0, "reasons": []}


@pytest.mark.usefixtures("cuda")
def test_the_driver_is_listened_to_while_kernels_run(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    tool = tmp_path / "smi"
    tool.write_text(
        f"#!{sys.executable}\nimport sys, time\n"
        "print('1500, 2600, 650.5, 61, 1024, 0x4')\n"
        "while '-lms' in sys.argv:\n    time.sleep(0.02)\n    print('1400, 2600, 690.5, 61, 1024, 0x20')\n"
    )
    tool.chmod(0o755)
    monkeypatch.setattr(microbench_environment, "_SMI", str(tool))
    monkeypatch.setattr(microbench_environment, "reasons_field", lambda: ("clocks_event_reasons.active",))
    begin = time.perf_counter()
    with GpuMonitor() as monitor:
        while monitor.between(begin, time.perf_counter())["num"] < 3 and time.perf_counter() < begin + 20:
            time.sleep(0.01)
        found = monitor.between(begin, time.perf_counter())
        nothing = monitor.between(begin - 2, begin - 1)
    assert found["clocks.sm"] == 1400.0
    assert found["reasons"] == ["sw_power_cap", "sw_thermal_slowdown"]
    assert nothing == {"num": 0, "reasons": []}


def test_answers_of_the_driver() -> None:
    assert parse_smi_line("1980, 699.53, 0x0000000000000024, [N/A], Enabled") == [1980.0, 699.53, 0x24, None, "Enabled"]
    assert reasons_of(0x24) == ["sw_power_cap", "sw_thermal_slowdown"]
    assert reasons_of(None) == []
    fields = ("clocks.sm", "power.draw", "clocks_event_reasons.active")
    found = summary_of(fields, [[1980.0, 600.0, 0x4], [1500.0, 700.0, 0x0], [1400.0, None, 0x40]])
    assert found == {"num": 3, "clocks.sm": 1500.0, "power.draw": 650.0, "reasons": ["sw_power_cap", "hw_thermal_slowdown"]}


class Bytes:
    """Counts what is held."""

    held = 0
    most = 0

    def __init__(self, size: int) -> None:
        self.size = size
        Bytes.held += size
        Bytes.most = max(Bytes.most, Bytes.held)

    def __del__(self) -> None:
        Bytes.held -= self.size


def test_sequences_free_all_that_they_allocate() -> None:
    found = sequences()
    assert set(found) == {"small", "pools", "split", "merged", "best_fit", "growing"}
    for steps in found.values():
        Bytes.held = Bytes.most = 0
        play(steps, Bytes)
        assert Bytes.held == 0
        assert Bytes.most >= max(size for _, _, size in steps)
    Bytes.most = 0
    play([("allocate", "a", 5), ("free", "a", 0), ("allocate", "b", 3)], Bytes)
    assert Bytes.most == 5


def test_traces_are_kept_without_tracebacks_and_come_back() -> None:
    entries = [
        {"action": "segment_alloc", "addr": 139_000_000_000, "size": 2 * MIB, "stream": 0, "time_us": 5, "frames": []},
        {"action": "alloc", "addr": 139_000_000_000, "size": 512, "stream": 0},
        {"action": "free_requested", "addr": 139_000_000_000, "size": 512, "stream": 0},
        {"action": "alloc", "addr": 139_000_000_000, "size": 1024, "stream": 7},
        {"action": "oom", "size": 10, "stream": 0, "device_free": 3},
    ]
    trace = json.loads(json.dumps(compact(entries)))
    wanted = [
        {"action": one["action"], "addr": one.get("addr", 0), "size": one["size"], "stream": one["stream"]} for one in entries
    ]
    assert entries_of(trace) == wanted
    assert trace["actions"] == ["segment_alloc", "alloc", "free_requested", "oom"]


def test_each_setting_has_a_process_of_its_own(tmp_path: Path) -> None:
    seen = []

    def run(command: list[str], *, env: dict[str, str], **_: object) -> SimpleNamespace:
        seen.append(env.get("PYTORCH_CUDA_ALLOC_CONF", ""))
        if len(seen) == 2:
            return SimpleNamespace(returncode=1, stderr="Traceback\nRuntimeError: expandable segments are not supported\n")
        Path(command[command.index("--out") + 1]).write_text(json.dumps({"context_bytes": 123}))
        return SimpleNamespace(returncode=0, stderr="")

    told: list[float] = []
    found = allocator_timings(10**9, run=run, tell=told.append)
    assert seen == ["", "expandable_segments:True"]
    assert found == {
        "default": {"context_bytes": 123},
        "expandable_segments": {"failed": "RuntimeError: expandable segments are not supported"},
    }
    assert told == [0.5, 1.0]
    base = {"PYTORCH_ALLOC_CONF": "x:1", "PYTORCH_CUDA_ALLOC_CONF": "y:2", "PYTHONPATH": str(tmp_path), "HOME": "h"}
    environment = child_environment(base, "")
    assert "PYTORCH_ALLOC_CONF" not in environment
    assert "PYTORCH_CUDA_ALLOC_CONF" not in environment
    root, other = environment["PYTHONPATH"].split(":")
    assert (Path(root) / "hardware_models" / "microbench_allocator.py").exists()
    assert other == str(tmp_path)


def test_a_process_that_hangs_is_named() -> None:
    def run(command: list[str], **_: object) -> None:
        raise subprocess.TimeoutExpired(command, 120)

    assert allocator_timings(1, settings={"default": ""}, run=run) == {"default": {"failed": "took more than 60 s"}}


def test_recorder_marks_the_parts_of_one_trace(monkeypatch: pytest.MonkeyPatch) -> None:
    trace: list[dict[str, Any]] = []
    asked: list[dict[str, Any]] = []

    def add(action: str) -> None:
        trace.append({"action": action, "addr": 0, "size": 512, "stream": 0})

    memory = SimpleNamespace(
        _record_memory_history=lambda **given: asked.append(given), _snapshot=lambda: {"device_traces": [list(trace)]}
    )
    fake = SimpleNamespace(
        memory=memory, synchronize=lambda: None, current_device=lambda: 0, empty_cache=lambda: add("segment_free"),
        reset_peak_memory_stats=lambda: None, max_memory_allocated=lambda: 512, max_memory_reserved=lambda: 2 * MIB,
    )  # fmt: skip
    monkeypatch.setattr(microbench_allocator, "torch", SimpleNamespace(cuda=fake))
    recorder = microbench_allocator.Recorder()
    assert asked == [{"enabled": "all", "context": None, "stacks": "python", "max_entries": 200_000}]
    recorder.run("first", lambda: add("alloc"))
    recorder.run("second", lambda: [add("alloc"), add("free_requested")])
    assert [(one["name"], one["first_event"], one["end_event"]) for one in recorder.sections] == [
        ("first", 1, 2),
        ("second", 3, 5),
    ]
    assert recorder.sections[0]["peak_reserved_bytes"] == 2 * MIB


def test_the_recorded_step_trains() -> None:
    step = training_step("cpu", num_blocks=1, width=64, batch=2, length=16)
    step()
    step()


class Draws:
    """A driver that tells for how long it was asked."""

    def between(self, begin_s: float, end_s: float) -> dict[str, Any]:
        """As `GpuMonitor.between`."""
        return {"num": 1, "reasons": [], "window_s": end_s - begin_s}


def test_load_is_timed_alone_in_a_burst_and_lasting(monkeypatch: pytest.MonkeyPatch) -> None:
    """A device that runs at half its rate once it has worked for 20 ms without a pause."""
    now_s, busy_s = [0.0], [0.0]

    class Hot:
        host_s = 0.0

        def flush(self) -> None: ...

        def synchronize(self) -> None: ...

        def time(self, run: Callable[[], object], repeats: int, *, host_s: float = 0.0) -> float:
            assert host_s >= 0
            begin = now_s[0]
            for _ in range(repeats):
                run()
                seconds = 1e-3 * (2.0 if busy_s[0] > 0.02 else 1.0)
                now_s[0] += seconds
                busy_s[0] += seconds
            return now_s[0] - begin

    def pause(seconds: float) -> None:
        now_s[0] += seconds
        busy_s[0] = 0.0

    monkeypatch.setattr(
        "hardware_models.microbench_sustained.time", SimpleNamespace(perf_counter=lambda: now_s[0], sleep=pause)
    )
    one = Case(
        kernel_class="gemm",
        op="mm",
        shape=(8, 8, 8),
        dtype="float32",
        flops=1024,
        build=lambda _pool: Call(run=lambda: None, reads=()),
    )
    pool = Pool(num_elements=64, device="cpu", dtype=torch.float32)
    (row,) = sustained_timings([one], lambda _case: pool, Hot(), Draws(), duration_s=0.5, end_s=100.0)  # type: ignore[arg-type]
    assert row["isolated_s"] == pytest.approx(1e-3)
    assert row["burst_s"] == pytest.approx(1e-3)
    assert row["sustained_s"] == pytest.approx(2e-3)
    assert row["duration_s"] >= 0.5
    assert 0.2 < row["state"]["window_s"] < 0.35
    assert sustained_timings([one], lambda _case: pool, Hot(), Draws(), duration_s=0.5, end_s=now_s[0]) == []  # type: ignore[arg-type]
