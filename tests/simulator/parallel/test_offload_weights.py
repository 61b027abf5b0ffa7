"""Parameters that live on the host or on drives, fetched before each pass and dropped after."""

from __future__ import annotations

from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from hardware_models.errors import InputError
from hardware_models.network.cluster_file import load_cluster
from simulator import engine_compiled, engine_simpy
from simulator.parallel.offload import host_path
from simulator.parallel.offload_step import FETCH, RETURN, UP
from simulator.pipeline.one_way import gpipe, one_f_one_b
from simulator.pipeline.zero_bubble import zb_h1
from simulator.plan_parallel import check_parallel
from simulator.precision import STORED_AS
from simulator.program import MemoryClass, Program
from tests.simulator.parallel.offload_cases import (
    CHUNK_BYTES,
    CHUNK_ELEMENTS,
    CHUNK_RISE,
    CHUNKS,
    offloading,
    path_of,
    program_of,
    run,
    with_memory,
)
from tests.simulator.parallel.step_cases import plan_of

CHUNK_WEIGHTS = 2 * CHUNK_ELEMENTS
PLANS = {
    "one device": plan_of(num_microbatches=2),
    "1f1b": plan_of(pp=4, dp=2),
    "recompute": plan_of(pp=2, recompute="full", num_microbatches=4),
    "split backward": plan_of(pp=4, schedule="zb-h1"),
    "versions": plan_of(pp=4, schedule="pipedream-2bw"),
    "two directions": plan_of(pp=4, schedule="chimera"),
}


def moved(program: Program, label: str) -> float:
    rows = [row for row, n in enumerate(program.transfers.instruction) if program.option[n] == label]
    return float(program.transfers.size_bytes[rows].sum())


@pytest.mark.parametrize(("rate", "expected_s"), [(200.0, 13.0), (50.0, 34.0)])
def test_one_micro_batch_by_hand(rate: float, expected_s: float) -> None:
    """200 B a chunk, fetched while the chunk before runs. At 200 B/s only the first second is waited for.

    At 50 B/s each takes 4 s, and the link never rests from 0 to 32, when the eighth is there and its 2 s of backward pass begin.
    """
    program = program_of(offloading(one_f_one_b(1, 1), path_of(rate), weights=1.0))
    for engine in (engine_compiled, engine_simpy):
        assert engine.run(program)[0].makespan_s == pytest.approx(expected_s, rel=1e-12)


def test_peak_by_hand() -> None:
    """As the backward pass begins, all activations, the rise, and two chunks' parameters: one computes, one comes."""
    program = program_of(offloading(one_f_one_b(1, 1), path_of(200.0), weights=1.0))
    (profile,) = engine_compiled.run(program)[1]
    assert profile.peak_bytes - 1000 == CHUNKS * CHUNK_BYTES + CHUNK_RISE + 2 * CHUNK_WEIGHTS
    assert profile.alive_bytes[-1].tolist() == profile.alive_bytes[0].tolist()


def test_updated_parameters_return_when_the_step_is_over() -> None:
    """The 13 s of above, 0.5 s of optimizer, then 800 B at 200 B/s."""
    program = program_of(offloading(one_f_one_b(1, 1), path_of(200.0), weights=1.0, returned=[800.0], optimizer_s=0.5))
    assert engine_compiled.run(program)[0].makespan_s == pytest.approx(13.0 + 0.5 + 4.0, rel=1e-12)


def test_passes_that_only_make_weights_gradients_fetch_nothing() -> None:
    """Of 6 micro-batches on 4 stages, a forward and an input-gradient pass each."""
    program = program_of(offloading(zb_h1(4, 6), path_of(), weights=0.5))
    assert moved(program, FETCH) == 2 * 6 * 4 * CHUNKS * CHUNK_WEIGHTS / 2


@pytest.mark.parametrize("order", [one_f_one_b(4, 6), gpipe(3, 4), zb_h1(4, 6)])
def test_an_infinitely_fast_link_costs_nothing(order: object) -> None:
    times = [engine_compiled.run(program_of(offloading(order, path_of(), weights=part)))[0].makespan_s for part in (0.0, 1.0)]  # type: ignore[arg-type]
    assert times[1] == pytest.approx(times[0], rel=1e-12)


@pytest.mark.parametrize("name", PLANS)
def test_engines_agree_and_memory_returns(name: str) -> None:
    result = run(PLANS[name], weight_offload=0.7, activation_offload=0.2)
    reference = engine_simpy.record(result.program)
    np.testing.assert_allclose(result.record.end_s, reference.end_s, rtol=1e-9, atol=1e-15)
    for profile in result.profiles:
        assert profile.alive_bytes[0].tolist() == profile.alive_bytes[-1].tolist()


@pytest.mark.parametrize("name", PLANS)
def test_more_offload_never_raises_the_devices_peak(name: str) -> None:
    results = [run(PLANS[name], weight_offload=part) for part in (0.0, 0.25, 0.5, 1.0)]
    for less, more in pairwise(results):
        assert all(b <= a for a, b in zip(less.peak_memory_bytes, more.peak_memory_bytes, strict=True))
        assert more.peak_host_bytes > less.peak_host_bytes
    gone = [one.program.resident_bytes[0][MemoryClass.PARAMETERS] for one in (results[0], results[-1])]
    assert gone[1] < 0.5 * gone[0]


def test_what_the_host_updates_needs_no_way_back() -> None:
    """Parameters that live on the host: updated there, none goes up but the shared table's; updated on the device, all return."""
    plan = PLANS["one device"]
    both, alone = (run(plan, weight_offload=1.0, optimizer_offload=part).program for part in (1.0, 0.0))
    table = 2 * 4096 * 1024
    assert moved(both, UP) == pytest.approx(table)
    assert moved(both, RETURN) == 0.0
    assert moved(alone, RETURN) == pytest.approx(moved(alone, FETCH) / 4)  # fetched for two passes of two micro-batches


def test_drives_are_slower_than_memory_and_have_room_of_their_own() -> None:
    memory, drives = (run(PLANS["1f1b"], weight_offload=0.5, offload_target=target) for target in ("host", "nvme"))
    assert drives.step_time_s > memory.step_time_s
    assert drives.peak_host_bytes == memory.peak_host_bytes
    assert drives.peak_memory_bytes == memory.peak_memory_bytes
    host = drives.cluster.host
    assert drives.fits
    full = replace(drives, cluster=replace(drives.cluster, host=replace(host, nvme_bytes=drives.peak_host_bytes - 1)))
    assert not full.fits


def test_drives_lie_in_series_with_the_host_link() -> None:
    """Selene: eight drives for eight devices, so one each: slower than half of a switch port; latencies add."""
    cluster = load_cluster("selene").with_gpus(8)
    near, far = host_path(cluster), host_path(cluster, "nvme")
    drive = cluster.host.nvme_link
    assert drive is not None
    assert far.to_device_bytes_per_s == drive.achieved_bytes_per_s.value < near.to_device_bytes_per_s
    assert far.to_host_bytes_per_s == drive.achieved_back_bytes_per_s.value < near.to_host_bytes_per_s
    assert far.latency_s == pytest.approx(near.latency_s + drive.latency_s.value, rel=1e-12)
    with pytest.raises(InputError, match=r"host\.num_nvme.*drives"):
        host_path(replace(cluster, host=replace(cluster.host, num_nvme=0)), "nvme")


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (with_memory(plan_of(), offload_target="nvme"), r"memory\.offload_target.*all are 0"),
        (with_memory(plan_of(), weight_offload="optimal"), r"memory\.weight_offload.*optimal"),
    ],
)
def test_what_is_not_simulated_is_refused(plan: object, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_parallel(plan, compute=tuple(STORED_AS))  # type: ignore[arg-type]
