"""The time of memory-bound kernels: limits, monotonicity, recovery by the fit, transfer, operators that pass more than once."""

from __future__ import annotations

from dataclasses import replace
from math import hypot
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.bandwidth_fit import (
    DramLaw,
    MemorySystem,
    RampTimings,
    carry_ramp,
    fit_dram_law,
    fit_ramp,
    ramp_errors,
    read_ramp_timings,
)
from hardware_models.bandwidth_ramp import BandwidthRamp
from hardware_models.catalogue import catalogue_names, load_hardware
from hardware_models.errors import InputError, UnknownNameError
from hardware_models.kernel import Kernel
from hardware_models.light_kernels import FUSED_ELEMENTS, LIGHT_CLASSES, SORT_LAUNCHES, light_seconds, optimizer_seconds
from hardware_models.roofline import roofline_evidence, roofline_seconds, roofline_seconds_of

RAMP = BandwidthRamp(
    graph_launch_s=1e-6, stream_gap_s=1e-6, stream_floor_s=1e-9, first_wave_bytes=4e6, first_wave_bytes_per_s=8e12, second_wave_s=3e-7, cache_bytes_per_s=4e12,
    cache_bytes=4e7, spill_width=0.1, dram_latency_s=2e-6, dram_bytes_per_s=1.7e12, mix=((0.0, 1.1), (0.5, 1.0), (1.0, 1.05)), wide_mix=((0.0, 1.1), (0.5, 1.1), (1.0, 1.15)),
    median_error=0.0, p90_error=0.0, evidence="published", source="test",
)  # fmt: skip
MEMORY = MemorySystem(
    kind="hbm",
    num_multiprocessors=108,
    threads_per_multiprocessor=2048,
    clock_hz=1.41e9,
    l2_bytes=4.2e7,
    bandwidth_bytes_per_s=2e12,
)
DEVICE = load_hardware("a100-sxm-80gb").changed(light=RAMP)
sizes = st.floats(1e2, 1e11)


def test_empty_kernel_costs_the_launch() -> None:
    assert RAMP.seconds(0.0, launch="graph") == pytest.approx(1e-6, rel=1e-9)
    assert RAMP.seconds(0.0, launch="stream") == pytest.approx(2e-6, rel=1e-9)


def test_one_wave_in_the_cache_by_hand() -> None:
    # 1 MB of one wave of 4 MB: 1e6 / 8e12 = 0.125 us beyond the launch
    assert RAMP.seconds(1e6, launch="graph") == pytest.approx(1.125e-6, rel=1e-6)


def test_several_waves_in_the_cache_by_hand() -> None:
    # 12 MB: 4e6 / 8e12 = 0.5 us, 8e6 / 4e12 = 2 us, second wave 0.3 us
    assert RAMP.seconds(12e6, launch="graph") == pytest.approx(1e-6 + 0.5e-6 + 2e-6 + 0.3e-6, rel=1e-4)


def test_large_kernels_run_at_the_rate_of_memory() -> None:
    assert 1e12 / RAMP.seconds(1e12) == pytest.approx(1.7e12, rel=1e-4)
    assert 1e12 / RAMP.seconds(1e12, wide=True) == pytest.approx(1.1 * 1.7e12, rel=1e-4)
    assert 1e12 / RAMP.seconds(1e12, read_fraction=0.0) == pytest.approx(1.1 * 1.7e12, rel=1e-4)
    assert 1e12 / RAMP.seconds(1e12, read_fraction=0.75) == pytest.approx(1.025 * 1.7e12, rel=1e-4)


def test_cold_operands_come_from_memory() -> None:
    assert RAMP.seconds(1e6, cold=1.0, launch="graph") == pytest.approx(1e-6 + 2e-6 + 1e6 / 1.7e12, rel=1e-9)


def test_host_interval_bounds_small_kernels_only() -> None:
    slow_host = replace(RAMP, stream_floor_s=1e-5)
    assert slow_host.seconds(1e3) == pytest.approx(1e-5, rel=1e-3)
    assert slow_host.seconds(1e9) == pytest.approx(RAMP.seconds(1e9), rel=1e-6)
    assert slow_host.seconds(1e3, launch="graph") == RAMP.seconds(1e3, launch="graph")


@given(sizes, st.floats(1.01, 4.0), st.floats(0.0, 1.0), st.floats(0.0, 1.0))
def test_time_grows_with_size_and_cold(moved: float, factor: float, read_fraction: float, cold: float) -> None:
    for launch in ("stream", "graph"):
        small, large = RAMP.seconds(np.array([moved, factor * moved]), read_fraction=read_fraction, cold=cold, launch=launch)
        assert large > small
    assert RAMP.seconds(moved, cold=1.0) >= RAMP.seconds(moved, cold=cold) * (1 - 1e-12)


CATALOGUED = tuple(load_hardware(name).light for name in ("a100-sxm-80gb", "h200-sxm", "l4", "b200"))


@given(sizes)
def test_a_graph_is_never_slower_than_a_stream(moved: float) -> None:
    for ramp in CATALOGUED:
        assert ramp is not None
        assert ramp.seconds(moved, launch="graph") < ramp.seconds(moved)


def _timings(noise: float, seed: int = 0) -> RampTimings:
    generator = np.random.default_rng(seed)
    moved = np.tile(np.geomspace(6e4, 1e9, 90), 2)
    stream = np.repeat([True, False], 90)
    ramp = replace(RAMP, mix=((0.5, 1.0),), stream_floor_s=2.2e-6)
    seconds = np.where(stream, ramp.seconds(moved), ramp.seconds(moved, launch="graph")) * np.exp(
        noise * generator.normal(size=180)
    )
    return RampTimings(moved_bytes=moved, seconds=seconds, stream=stream)


def test_fit_recovers_the_law() -> None:
    fitted = fit_ramp(
        _timings(0.0), replace(MEMORY, num_multiprocessors=122), source="test"
    )  # 122 multiprocessors: waves of 4 MB
    assert fitted.graph_launch_s == pytest.approx(1e-6, rel=0.01)
    assert fitted.dram_bytes_per_s == pytest.approx(1.7e12, rel=0.005)
    assert fitted.cache_bytes_per_s == pytest.approx(4e12, rel=0.03)
    assert fitted.cache_bytes == pytest.approx(4e7, rel=0.02)
    assert fitted.median_error < 0.005


def test_fit_reports_the_noise_as_its_error() -> None:
    fitted = fit_ramp(_timings(0.05), MEMORY, source="test")
    assert 0.02 < fitted.median_error < 0.06  # of a normal distribution: 0.67 times 5%
    assert fitted.median_error < fitted.p90_error


def test_carried_to_itself_a_ramp_stays() -> None:
    timings = _timings(0.0)
    fitted = fit_ramp(timings, MEMORY, source="test")
    carried = carry_ramp([(MEMORY, fitted)], MEMORY, rates=[(MEMORY, fitted.dram_bytes_per_s)], source="test")
    assert np.median(ramp_errors(carried, timings)) < 0.01
    assert carried.evidence == "datasheet"


def test_carried_to_a_larger_device_a_ramp_scales() -> None:
    larger = replace(MEMORY, num_multiprocessors=216, l2_bytes=8.4e7, bandwidth_bytes_per_s=4e12)
    carried = carry_ramp([(MEMORY, RAMP)], larger, rates=[(MEMORY, 1.7e12)], source="test")
    assert carried.cache_bytes_per_s == pytest.approx(2 * RAMP.cache_bytes_per_s)
    assert carried.cache_bytes == pytest.approx(2 * RAMP.cache_bytes)
    assert carried.dram_bytes_per_s == pytest.approx(3.4e12, rel=0.01)
    assert carried.graph_launch_s == pytest.approx(RAMP.graph_launch_s)


def test_nothing_known_is_an_input_error() -> None:
    with pytest.raises(InputError, match="at least one timed device is needed"):
        carry_ramp([], MEMORY, rates=[], source="test")


def test_rate_from_memory_is_bounded_by_bytes_in_flight() -> None:
    law = DramLaw(share=0.9, latency_s=1e-6)
    wide_bus = replace(MEMORY, bandwidth_bytes_per_s=1e15)
    assert law.rate(wide_bus) == pytest.approx(108 * 2048 * 16 / 1e-6, rel=1e-6)
    narrow_bus = replace(MEMORY, bandwidth_bytes_per_s=1e11)
    assert law.rate(narrow_bus) == pytest.approx(0.9e11, rel=1e-6)


def test_memory_law_is_recovered() -> None:
    law = DramLaw(share=0.89, latency_s=1.1e-6)
    devices = [replace(MEMORY, bandwidth_bytes_per_s=bandwidth) for bandwidth in (9e11, 2e12, 3.3e12, 4.8e12)]
    found = fit_dram_law([(device, law.rate(device)) for device in devices])
    assert found.share == pytest.approx(0.89, abs=0.006)
    assert found.latency_s == pytest.approx(1.1e-6, rel=0.05)


def test_timings_are_read_and_bad_tables_named(tmp_path: Path) -> None:
    path = tmp_path / "table.csv"
    path.write_text("gpu,mode,bytes_moved,time_per_kernel_us\nx,cudaGraph,64,1.5\nx,stream launch,128,2.5\n")
    read = read_ramp_timings(path)["x"]
    assert read.seconds == pytest.approx([1.5e-6, 2.5e-6])
    assert read.stream.tolist() == [False, True]
    path.write_text("gpu,mode,bytes_moved,time_per_kernel_us\nx,hipGraph,64,1.5\n")
    with pytest.raises(InputError, match="mode = 'hipGraph': one of stream launch, cudaGraph"):
        read_ramp_timings(path)
    path.write_text("gpu,mode,bytes_moved\nx,cudaGraph,64\n")
    with pytest.raises(InputError, match="the columns hold one of: bytes_moved, gpu, mode, time_per_kernel_us"):
        read_ramp_timings(path)


def _light(kernel_class: str, op: str, shape: tuple[int, ...], read: float, written: float) -> float:
    shapes = np.array([shape], dtype=np.int64)
    return float(light_seconds(kernel_class, op, shapes, [read], [written], DEVICE)[0])


def test_one_pass_operators_cost_their_traffic() -> None:
    assert _light("pointwise", "add", (10**9,), 8e9, 4e9) == pytest.approx(
        RAMP.seconds(12e9, read_fraction=2 / 3, wide=True).item(), rel=1e-12
    )


def test_backward_of_layer_norm_reads_twice_in_two_launches() -> None:
    forward = _light("normalization", "native_layer_norm", (10**6, 4096), 8e9, 8e9)
    backward = _light("normalization", "native_layer_norm_backward", (10**6, 4096), 16e9, 8e9)
    assert forward == pytest.approx(
        float(RAMP.seconds(16e9, wide=True)), rel=1e-9
    )  # the second pass over a row is in the cache
    rates = RAMP.dram_rate([16 / 24, 1.0], wide=True)
    assert backward == pytest.approx(24e9 / rates[0] + 16e9 / rates[1], rel=1e-3)


def test_batch_norm_reads_its_input_again() -> None:
    twice = _light("normalization", "native_batch_norm", (256, 10**7), 1e10, 1e10)
    rates = RAMP.dram_rate([1.0, 0.5], wide=True)
    assert twice == pytest.approx(1e10 / rates[0] + 2e10 / rates[1], rel=1e-3)


def test_softmax_reads_long_rows_thrice_when_they_leave_the_cache() -> None:
    short = _light("softmax", "_softmax", (10**7, 1000), 2e10, 2e10)
    assert short == pytest.approx(float(RAMP.seconds(4e10, wide=True)), rel=1e-9)
    spilled = _light("softmax", "_log_softmax", (10**5, 50_000), 2e10, 2e10)  # 216 rows of 0.2 MB under way exceed 40 MB
    rate = RAMP.dram_rate(6 / 8, wide=True)
    assert spilled == pytest.approx(8e10 / rate, rel=1e-3)
    resident = _light("softmax", "_log_softmax", (2 * 10**5, 25_000), 1e10, 1e10)  # 48 KiB < 0.05 MB, 216 of them fit 40 MB
    assert resident == pytest.approx(2e10 / RAMP.dram_rate(0.5, wide=True), rel=1e-3)


def test_embedding_backward_zeroes_adds_and_sorts() -> None:
    few = _light("embedding", "embedding_dense_backward", (3000, 1024, 50_000), 3000 * 1032 * 4, 50_000 * 4096)
    many = _light("embedding", "embedding_dense_backward", (3100, 1024, 50_000), 3100 * 1032 * 4, 50_000 * 4096)
    assert few > 50_000 * 4096 / RAMP.dram_rate(0.0, wide=True)
    assert many - few == pytest.approx(SORT_LAUNCHES * 2e-6, rel=0.2)


def test_optimizer_forms() -> None:
    tensors = [10**6] * 72
    fused_s, fused_launches = optimizer_seconds(tensors, DEVICE, form="fused")
    foreach_s, foreach_launches = optimizer_seconds(tensors, DEVICE, form="foreach")
    per_tensor_s, per_tensor_launches = optimizer_seconds(tensors, DEVICE, form="per-tensor")
    assert fused_launches == -(-72 * 10**6 // FUSED_ELEMENTS)
    assert foreach_launches == 8 * fused_launches
    assert per_tensor_launches == 8 * 72
    assert fused_s < foreach_s < per_tensor_s
    large, _launches = optimizer_seconds([10**10], DEVICE, form="fused")
    assert large == pytest.approx(7 * 4e10 / RAMP.dram_rate(4 / 7, wide=True), rel=0.05)
    with pytest.raises(UnknownNameError, match="known are fused, foreach, per-tensor"):
        optimizer_seconds(tensors, DEVICE, form="loop")  # type: ignore[arg-type]


def test_arrays_and_lists_agree() -> None:
    kernels = [
        Kernel(kernel_class="gemm", op="mm", shape=(100 * i, 200, 300), dtype="bfloat16", flops=2 * 100 * i * 60_000, read_bytes=i * 10**4, written_bytes=10**4)
        for i in range(1, 50)
    ]  # fmt: skip
    kernels += [
        Kernel(kernel_class="pointwise", op="add", shape=(i,), dtype="float32", flops=0, read_bytes=8 * i, written_bytes=4 * i)
        for i in (1, 10**3, 10**7)
    ]
    together = roofline_seconds(kernels, DEVICE)
    assert together == pytest.approx([float(roofline_seconds([kernel], DEVICE)[0]) for kernel in kernels])
    assert (roofline_seconds(kernels, DEVICE, launch="graph") < together).all()


def test_classes_with_arithmetic_stay_on_the_roofline() -> None:
    shapes = np.array([[4096, 4096, 4096]])
    seconds = roofline_seconds_of(
        "gemm", "mm", "bfloat16", shapes=shapes, work=[2.0 * 4096**3], read_bytes=[6.7e7], written_bytes=[3.4e7], profile=DEVICE
    )
    assert 2 * 4096**3 / seconds[0] < DEVICE.peak("bfloat16") * DEVICE.efficiency("gemm").flops
    assert "gemm" not in LIGHT_CLASSES


def test_evidence_of_light_classes_is_that_of_the_ramp() -> None:
    evidence, error = roofline_evidence("pointwise", DEVICE.changed(light=replace(RAMP, p90_error=0.164, evidence="measured")))
    assert evidence == "measured"
    assert error == pytest.approx(hypot(0.1, 0.15))
    assert roofline_evidence("gemm", DEVICE) == ("published", DEVICE.efficiency("gemm").relative_standard_error)
    assert (
        roofline_evidence("pointwise", DEVICE.changed(light=None))[1] == DEVICE.efficiency("pointwise").relative_standard_error
    )


@pytest.mark.parametrize(
    ("name", "write", "read", "scale", "triad"),
    [
        ("a100-sxm-80gb", 1897, 1769, 1732, 1759),
        ("h200-sxm", 3898, 2756, 3165, 3534),
        ("v100-sxm2-32gb", 895, 866, 804, 814),
        ("l40", 846, 844, 816, 803),
    ],
)
def test_published_stream_rates_are_met(name: str, write: float, read: float, scale: float, triad: float) -> None:
    ramp = load_hardware(name).light  # te42kyfo/gpu-benches gpu-stream @1c36d509ee, GB/s
    assert ramp is not None
    assert ramp.dram_rate([0.0, 0.5, 2 / 3, 1.0]) / 1e9 == pytest.approx([write, scale, triad, read], rel=0.09)


@pytest.mark.parametrize("name", catalogue_names())
def test_every_catalogued_ramp_is_sane(name: str) -> None:
    profile = load_hardware(name)
    ramp = profile.light
    assert ramp is not None
    achieved = 1e10 / ramp.seconds(1e10, wide=True)
    assert 0.75 < achieved / profile.memory_bandwidth_bytes_per_s <= 1.0
    assert 0.5e-6 < ramp.seconds(1.0, launch="graph") < ramp.seconds(1.0) < 5e-6
    assert 0.0 < ramp.median_error < ramp.p90_error < 0.3
    assert ramp.cache_bytes == pytest.approx(profile.l2_bytes, rel=0.5)


@pytest.mark.benchmark
def test_a_million_shapes_within_a_second() -> None:
    from time import perf_counter

    shapes = np.random.default_rng(0).integers(1, 16384, (10**6, 3))
    m, n, k = shapes.T
    start = perf_counter()
    roofline_seconds_of("gemm", "mm", "bfloat16", shapes=shapes, work=2.0 * m * n * k, read_bytes=2.0 * (m * k + n * k), written_bytes=2.0 * m * n,
                        profile=DEVICE)  # fmt: skip
    assert perf_counter() - start < 1.0
