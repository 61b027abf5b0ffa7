"""A simulated step: times and bytes add up, ratios follow from them, and limits decide what fits."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest

from hardware_models.caching_allocator import parse_alloc_conf
from hardware_models.catalogue import load_hardware
from hardware_models.profile import DeviceProfile
from hardware_models.units import MIB
from simulator.exposed_time import TIME_CLASSES
from simulator.program import Kind, MemoryClass
from simulator.sequence import checkpoint_blocks, keep_all
from simulator.simulate import (
    INTERVAL_Z,
    Simulation,
    StepSetting,
    simulate,
    static_peak_bytes,
    step_kernels,
)
from simulator.workload import Workload
from tests.small_models import BATCH, traced
from tests.small_steps import nested, program_of, sequences

KEYS = set(
    "step_time_s step_time_interval_s tokens_per_s_per_gpu model_flops_per_s_per_gpu mfu hfu peak_memory_bytes peak_reserved_bytes "
    "peak_host_bytes peak_memory_breakdown fits time_breakdown_s bottleneck num_events evidence".split()
)


@pytest.fixture(scope="module")
def device() -> DeviceProfile:
    return load_hardware("h100-sxm")


@pytest.fixture(scope="module")
def workload() -> Workload:
    return traced("residual-mlp").workload


def full(workload: Workload) -> Any:
    count = len(workload.blocks)
    return checkpoint_blocks(count, range(count), ["all"] * count)


def test_the_step_is_the_sum_of_its_parts(workload: Workload, device: DeviceProfile) -> None:
    found = simulate(workload, full(workload), device, StepSetting(num_microbatches=3))
    times = found.time_breakdown_s
    assert tuple(times) == TIME_CLASSES
    assert sum(times.values()) == pytest.approx(found.step_time_s, rel=1e-12)
    assert times["recompute"] > 0
    assert times["optimizer"] > 0
    assert times["bubble"] == pytest.approx(0, abs=1e-12)
    plain = simulate(workload, keep_all(5), device, StepSetting(num_microbatches=3))
    assert plain.time_breakdown_s["recompute"] == 0
    assert plain.time_breakdown_s["optimizer"] == pytest.approx(times["optimizer"])
    assert found.step_time_s - times["recompute"] == pytest.approx(
        plain.step_time_s - 3 * forward_difference_s(plain, found), rel=1e-9
    )


def forward_difference_s(plain: Simulation, again: Simulation) -> float:
    """What a first forward pass takes longer with graphs than without, per micro-batch."""
    totals = [
        sum(span.duration_s for span in one.timeline.spans if span.kind == Kind.FORWARD) / one.setting.num_microbatches
        for one in (plain, again)
    ]
    return totals[0] - totals[1]


def test_all_keys_of_the_command_line(workload: Workload, device: DeviceProfile) -> None:
    found = simulate(workload, nested(5), device, StepSetting(num_microbatches=2)).to_json()
    assert set(found) == KEYS
    assert found["bottleneck"] in TIME_CLASSES
    assert found["tokens_per_s_per_gpu"] == pytest.approx(2 * BATCH / found["step_time_s"])  # type: ignore[operator]
    assert found["peak_host_bytes"] == 0
    assert found["evidence"]
    assert sum(found["peak_memory_breakdown"].values()) == found["peak_memory_bytes"][0]  # type: ignore[attr-defined, index]


def test_utilisation_with_and_without_recompute(workload: Workload, device: DeviceProfile) -> None:
    plain = simulate(workload, keep_all(5), device, StepSetting(num_microbatches=3))
    again = simulate(workload, full(workload), device, StepSetting(num_microbatches=3))
    assert plain.hardware_flops == 3 * workload.model_flops
    assert again.hardware_flops == 3 * (workload.model_flops + workload.forward_flops)
    shown = again.to_json()
    peak = device.peak("float32")
    assert shown["mfu"] == pytest.approx(3 * workload.model_flops / again.step_time_s / peak)
    assert shown["hfu"] == pytest.approx(again.hardware_flops / again.step_time_s / peak)
    assert plain.to_json()["mfu"] == plain.to_json()["hfu"]


@pytest.mark.parametrize("name", ["residual-mlp", "transformer", "convolution-net", "spectral", "shared-layer"])
def test_kernels_of_a_step_are_the_programs(name: str, device: DeviceProfile) -> None:
    trace_of = traced(name)
    setting = StepSetting(num_microbatches=2)
    for label, operations in sequences(trace_of).items():
        kernels = step_kernels(trace_of.workload, operations, setting)
        program = program_of(trace_of, operations, 2)
        assert len(kernels) == program.duration_s.sum(), f"{label}: at one second a kernel"
        found = simulate(trace_of.workload, operations, device, setting)
        assert found.price.total_s == pytest.approx(found.step_time_s, rel=1e-9), label


def test_the_interval_comes_from_the_prices(workload: Workload, device: DeviceProfile) -> None:
    found = simulate(workload, keep_all(5), device)
    low, high = found.step_time_interval_s
    half = INTERVAL_Z * found.price.relative_standard_error * found.step_time_s
    assert low == pytest.approx(max(0.0, found.step_time_s - half))
    assert high == pytest.approx(found.step_time_s + half)


def test_memory_peaks_and_whole_segments(workload: Workload, device: DeviceProfile) -> None:
    found = simulate(workload, nested(5), device)
    (peak,), (allocated,), (reserved,) = found.peak_memory_bytes, found.peak_allocated_bytes, found.peak_reserved_bytes
    assert peak == static_peak_bytes(found.program)
    assert allocated % 512 == 0
    assert reserved % (2 * MIB) == 0
    assert peak <= allocated <= reserved
    tensors = len(workload.optimizer_tensors) * 5 + len(found.program.memory_bytes)
    assert allocated - peak < 512 * tensors, "all tensors are small: each loses less than 512 bytes"
    cpu = simulate(workload, nested(5), device.changed(kind="cpu"))
    assert cpu.peak_reserved_bytes == cpu.peak_allocated_bytes == cpu.peak_memory_bytes == (peak,)


def test_the_allocators_settings_change_what_is_reserved(workload: Workload, device: DeviceProfile) -> None:
    plain = simulate(workload, keep_all(5), device)
    rounded = StepSetting(allocator=parse_alloc_conf("roundup_power2_divisions:1"))
    assert simulate(workload, keep_all(5), device, rounded).allocators == plain.allocators
    coarse = StepSetting(allocator=parse_alloc_conf("roundup_power2_divisions:2"))
    found = simulate(workload, keep_all(5), device, coarse)
    assert found.peak_allocated_bytes > plain.peak_allocated_bytes
    assert found.peak_memory_bytes == plain.peak_memory_bytes


def test_what_fits(workload: Workload, device: DeviceProfile) -> None:
    plain = simulate(workload, keep_all(5), device)
    (peak,), (reserved,) = plain.peak_memory_bytes, plain.peak_reserved_bytes
    assert simulate(workload, keep_all(5), device, StepSetting(budget_bytes=peak)).fits
    assert not simulate(workload, keep_all(5), device, StepSetting(budget_bytes=peak - 1)).fits
    assert simulate(workload, nested(5), device, StepSetting(budget_bytes=peak - 1)).fits
    assert simulate(workload, keep_all(5), device.changed(memory_bytes=reserved + 9, context_bytes=9)).fits
    assert not simulate(workload, keep_all(5), device.changed(memory_bytes=reserved + 8, context_bytes=9)).fits


def test_recompute_takes_longer_and_needs_less(device: DeviceProfile) -> None:
    trace_of = traced("transformer")
    found = {label: simulate(trace_of.workload, operations, device) for label, operations in sequences(trace_of).items()}
    assert found["none"].step_time_s < found["selective"].step_time_s
    assert found["none"].step_time_s < found["full"].step_time_s < found["nested"].step_time_s
    assert found["none"].peak_memory_bytes > found["selective"].peak_memory_bytes > found["full"].peak_memory_bytes


def test_static_peak_is_for_one_stream_of_one_device() -> None:
    program = program_of(traced("residual-mlp"), keep_all(5), 1)
    more = replace(program, resident_bytes=program.resident_bytes * 2)
    with pytest.raises(ValueError, match="static_peak_bytes needs a program of one device"):
        static_peak_bytes(more)
    streams = program.stream.copy()
    streams[0] = 1
    with pytest.raises(ValueError, match="one stream"):
        static_peak_bytes(replace(program, stream=streams))


def test_static_peak_of_a_program_without_events_is_what_is_resident() -> None:
    program = program_of(traced("residual-mlp"), keep_all(5), 1)
    empty = replace(
        program, memory_offsets=np.zeros_like(program.memory_offsets), memory_time_s=np.zeros(0), memory_bytes=np.zeros(0, np.int64),
        memory_class=np.zeros(0, np.int8),
    )  # fmt: skip
    assert static_peak_bytes(empty) == sum(program.resident_bytes[0][one] for one in MemoryClass)
