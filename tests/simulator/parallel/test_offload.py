"""Activations that travel to the host between a micro-batch's passes: hand-computed steps, limits, memory on both sides."""

from __future__ import annotations

from itertools import accumulate, pairwise

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.network.cluster_file import load_cluster
from hardware_models.pricing import price
from simulator import engine_compiled, engine_simpy
from simulator.exposed_time import exposed_times
from simulator.lower import PassPrices
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.lower_step import lower_step
from simulator.parallel.offload import host_path, staged_bytes
from simulator.parallel.offload_memory import host_peaks, node_peak
from simulator.parallel.offload_step import BACK, OUT
from simulator.parallel.recompute import stage_operations
from simulator.parallel.stages import chunk_costs, stage_cost, stages_of
from simulator.pipeline.one_way import gpipe, interleaved, one_f_one_b
from simulator.pipeline.zero_bubble import zb_h1
from simulator.plan import Plan
from simulator.plan_parallel import check_parallel
from simulator.precision import STORED_AS
from simulator.presets import build_workload
from simulator.program import MemoryClass, Program, Stream, no_slowdown
from tests.simulator.parallel.offload_cases import (
    CHUNK_BYTES,
    CHUNK_RISE,
    CHUNKS,
    STAGE_S,
    chunk,
    digest,
    offloading,
    path_of,
    program_of,
    run,
    with_memory,
)
from tests.simulator.parallel.step_cases import SEQ_LEN, cluster_of, parts_of, plan_of, small_config

WHOLE = CHUNKS * CHUNK_BYTES
PLANS = {
    "one device": plan_of(num_microbatches=2),
    "1f1b": plan_of(pp=4),
    "recompute": plan_of(pp=2, recompute="full", num_microbatches=4),
    "selective": plan_of(tp=2, pp=2, recompute="selective", flash=False, num_microbatches=4),
    "split backward": plan_of(pp=4, schedule="zb-h1"),
    "interleaved": plan_of(pp=2, dp=2, virtual_stages=2, schedule="interleaved", zero_stage=1),
    "zero 3": plan_of(dp=8, zero_stage=3, num_microbatches=2),
    "two directions": plan_of(pp=4, schedule="chimera"),
}


def peak(program: Program) -> int:
    """Most bytes on the first rank above the 1 kB that it holds."""
    return engine_compiled.run(program)[1][0].peak_bytes - 1000


def test_a_step_without_offload_is_what_it_was() -> None:
    """Digests of programs as they were before steps could offload (made at 8540828, streams and classes of memory as of now)."""
    sync = GradientSync(chunks=4, reduce_s=4.0, gather_s=2.0)
    parts = (
        parts_of(gpipe(3, 4), sync=[sync] * 3, optimizer_s=5.0),
        parts_of(one_f_one_b(4, 6), tied_s=2.0, waits=True, rate=50.0),
    )
    made = [lower_step(one, [(0,) * len(MemoryClass)] * one.order.num_ranks, no_slowdown()) for one in parts]
    assert [digest(program) for program in made] == ["a0dd8f2f538ac4ef", "04cedb611391a09e"]


@pytest.mark.parametrize(("rate", "expected_s"), [(250.0, 14.0), (125.0, 19.0)])
def test_one_micro_batch_by_hand(rate: float, expected_s: float) -> None:
    """Chunks of 1 s and 250 B forward, 2 s backward. At 250 B/s: the forward pass ends at 4, its last chunk has left at 5 and is back at 6; the others come in time.

    At 125 B/s: each takes 2 s; chunks 2 and 3 wait until chunks 0 and 1 have left (3, 5), the last one has left at 9 and is back at 11; then 2 s a chunk.
    """
    program = program_of(offloading(one_f_one_b(1, 1), path_of(rate), activations=1.0))
    for engine in (engine_compiled, engine_simpy):
        assert engine.run(program)[0].makespan_s == pytest.approx(expected_s, rel=1e-12)
    record = engine_compiled.record(program)
    assert exposed_times(program, record)["offload"] == pytest.approx(expected_s - STAGE_S, rel=1e-12)
    leaves = [n for n, label in enumerate(program.option) if label == OUT]
    gone = {250.0: [2, 3, 4, 5], 125.0: [3, 5, 7, 9]}[rate]
    assert record.end_s[leaves].tolist() == pytest.approx(gone, rel=1e-12)


def test_peaks_by_hand() -> None:
    """As a backward pass begins: all chunks and a rise of 400 B; with offload what stays, and two chunks' bytes: one computes, one comes."""
    order = one_f_one_b(1, 1)
    assert peak(program_of(offloading(order, path_of(250.0)))) == WHOLE + CHUNK_RISE
    assert peak(program_of(offloading(order, path_of(250.0), activations=1.0))) == 2 * CHUNK_BYTES + CHUNK_RISE
    assert peak(program_of(offloading(order, path_of(250.0), activations=0.4))) == 600 + 2 * 100 + CHUNK_RISE


def test_latency_comes_before_the_bytes() -> None:
    """1.5 s a transfer: chunks leave by 2.5, 4, 5.5, 7 (2 and 3 wait for room at 2.5 and 4); the last one is back at 8.5, the others in time."""
    program = program_of(offloading(one_f_one_b(1, 1), path_of(250.0, latency_s=0.5), activations=1.0))
    assert engine_compiled.run(program)[0].makespan_s == pytest.approx(8.5 + CHUNKS * 2.0, rel=1e-12)


@pytest.mark.parametrize("order", [one_f_one_b(4, 6), gpipe(3, 4), zb_h1(4, 6), interleaved(2, 4, virtual_stages=2)])
@pytest.mark.parametrize("part", [0.3, 1.0])
def test_an_infinitely_fast_link_costs_nothing(order: object, part: float) -> None:
    plain = engine_compiled.run(program_of(offloading(order, path_of())))  # type: ignore[arg-type]
    timeline, profiles = engine_compiled.run(program_of(offloading(order, path_of(), activations=part)))  # type: ignore[arg-type]
    assert timeline.makespan_s == pytest.approx(plain[0].makespan_s, rel=1e-12)
    assert all(own.peak_bytes < before.peak_bytes for own, before in zip(profiles, plain[1], strict=True))


def test_both_directions_share_the_links_joint_rate() -> None:
    """The first of three ranks takes chunks back while others leave: each way at 100 B/s where both together have 200, at half of that at the most."""
    longest = []
    for both in (200.0, 100.0):
        program = program_of(offloading(one_f_one_b(3, 6), path_of(100.0, both=both), activations=1.0))
        record = engine_compiled.record(program)
        chosen = [n for n, label in enumerate(program.option) if label in {OUT, BACK} and program.device[n] == 0]
        longest.append(float((record.end_s - record.start_s)[chosen].max()))
    assert longest[0] == pytest.approx(2.5, rel=1e-12)
    assert 2.5 * 1.5 < longest[1] <= 5.0 * (1 + 1e-12)


def test_a_chunk_comes_back_no_earlier_than_the_pass_before_begins() -> None:
    program = program_of(offloading(gpipe(1, 3), path_of(250.0), activations=1.0))
    record = engine_compiled.record(program)
    backward = [n for n in range(program.num_instructions) if program.label(n).startswith("B")]
    first = {batch: min(float(record.start_s[n]) for n in backward if program.micro_batch[n] == batch) for batch in range(3)}
    back = [n for n, label in enumerate(program.option) if label == BACK]
    for batch in (1, 2):
        own = [float(record.start_s[n]) for n in back if program.micro_batch[n] == batch]
        assert first[batch - 1] <= min(own) < first[batch]


def test_all_bytes_go_and_come_once() -> None:
    """Of 6 micro-batches on 4 stages, 0.6 of what each keeps."""
    transfers = program_of(offloading(one_f_one_b(4, 6), path_of(), activations=0.6)).transfers
    assert transfers.size_bytes[transfers.size_bytes > 1.0].sum() == pytest.approx(2 * 6 * 4 * 0.6 * WHOLE, rel=1e-12)


def test_what_may_go_stays_within_what_is_kept() -> None:
    """The chunk that consumes 100 B of the one before leaves only what is kept through it."""
    one = chunk()
    first = type(one.forward)(seconds=one.forward.seconds, rise_bytes=400, net_bytes=350)
    second = type(one.forward)(seconds=one.forward.seconds, rise_bytes=400, net_bytes=-100)
    back = type(one.backward)(seconds=one.backward.seconds, rise_bytes=400, net_bytes=-125)
    chunks = [type(one)(forward=forward, backward=back, parameter_elements=0) for forward in (first, second)]
    assert staged_bytes(chunks, 1.0, 1.0) == (125, 125)
    assert sum(staged_bytes(chunks, 0.5, 1.0)) == 125


@pytest.mark.parametrize("name", PLANS)
def test_engines_agree_and_memory_returns(name: str) -> None:
    result = run(PLANS[name], activation_offload=0.7)
    reference = engine_simpy.record(result.program)
    np.testing.assert_allclose(result.record.end_s, reference.end_s, rtol=1e-9, atol=1e-15)
    for profile in result.profiles:
        assert profile.alive_bytes[0].tolist() == profile.alive_bytes[-1].tolist()
    assert sum(exposed_times(result.program, result.record).values()) == pytest.approx(result.step_time_s, rel=1e-9)


@pytest.mark.parametrize("name", PLANS)
def test_more_offload_never_raises_the_devices_peak(name: str) -> None:
    results = [run(PLANS[name], activation_offload=part) for part in (0.0, 0.25, 0.5, 1.0)]
    for less, more in pairwise(results):
        assert all(b <= a for a, b in zip(less.peak_memory_bytes, more.peak_memory_bytes, strict=True))
        assert more.peak_host_bytes > less.peak_host_bytes
    assert max(results[-1].peak_memory_bytes) < max(results[0].peak_memory_bytes)


def test_devices_on_one_switch_share_it() -> None:
    """Selene: two devices a switch; alone a device has it whole. Sixteen memory channels serve eight devices."""
    alone, node = (host_path(load_cluster("selene").with_gpus(gpus)) for gpus in (1, 8))
    link = load_cluster("selene").fabric.host_link
    assert alone.to_device_bytes_per_s == link.achieved_bytes_per_s.value
    assert node.to_device_bytes_per_s == link.achieved_bytes_per_s.value / 2
    assert node.both_bytes_per_s == pytest.approx(link.duplex_capacity_bytes_per_s / 2, rel=1e-12)
    assert alone.dram_bytes_per_s == pytest.approx(8 * node.dram_bytes_per_s, rel=1e-12)


def test_a_nodes_host_holds_all_its_devices_bytes() -> None:
    """Four stages on four devices of a node: their peaks add up; the report and `fits` take the sum."""
    result = run(PLANS["1f1b"], activation_offload=1.0)
    peaks = host_peaks(result.program, result.record)
    assert result.peak_host_bytes == sum(peaks) == result.to_json()["peak_host_bytes"]
    leaves = [row for row, n in enumerate(result.program.transfers.instruction) if result.program.option[n] == OUT]
    assert 0 < peaks[0] <= result.program.transfers.size_bytes[leaves].sum()


def test_what_exceeds_the_hosts_memory_does_not_fit() -> None:
    from dataclasses import replace

    result = run(PLANS["1f1b"], activation_offload=1.0)
    host = result.cluster.host
    assert result.fits
    for room, fits in ((result.peak_host_bytes, True), (result.peak_host_bytes - 1, False)):
        smaller = replace(result, cluster=replace(result.cluster, host=replace(host, dram_bytes=room)))
        assert smaller.fits is fits


def test_nodes_hold_the_ranks_that_lie_on_them() -> None:
    """Two stages of eight tensor-parallel devices: a node each, so the fuller one counts."""
    result = run(plan_of(tp=8, pp=2, num_microbatches=2), activation_offload=1.0)
    peaks = host_peaks(result.program, result.record)
    assert result.peak_host_bytes == 8 * max(peaks) == node_peak(peaks, _mesh(result))


def _mesh(result: object) -> object:
    from simulator.parallel.mesh import mesh_of

    return mesh_of(result.plan, result.cluster)  # type: ignore[attr-defined]


def test_transfers_run_on_the_copy_streams() -> None:
    program = run(PLANS["1f1b"], activation_offload=1.0).program
    streams = {label: {int(program.stream[n]) for n, own in enumerate(program.option) if own == label} for label in (OUT, BACK)}
    assert streams == {OUT: {Stream.D2H}, BACK: {Stream.H2D}}


def test_the_best_fraction_is_not_solved() -> None:
    with pytest.raises(InputError, match=r"memory\.activation_offload.*optimal.*fraction"):
        check_parallel(with_memory(plan_of(), activation_offload="optimal"), compute=tuple(STORED_AS))


@pytest.mark.parametrize("plan", PLANS.values(), ids=PLANS)
@pytest.mark.parametrize("most", [1, 3, 8, 1000])
def test_chunks_add_up_to_their_stage(plan: Plan, most: int) -> None:
    """Times, bytes at the end, and the highest rise of all chunks are those of the whole passes; parameters those of the stage's blocks."""
    cluster = cluster_of(plan)
    device = load_hardware(cluster.device)
    model = build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16")
    prices = PassPrices(lambda kernels: price(kernels, device))
    for stage in stages_of(model, plan):
        operations = stage_operations(plan, stage)
        whole, chunks = stage_cost(stage, operations, prices), chunk_costs(stage, operations, prices, most=most)
        assert 1 <= len(chunks) <= most
        assert most < 3 or len(chunks) >= min(most, len(stage.blocks) // 2)
        for of_stage, parts in (
            (whole.forward, [one.forward for one in chunks]),
            (whole.backward, [one.backward for one in reversed(chunks)]),
        ):
            assert sum(part.total_s for part in parts) == pytest.approx(of_stage.total_s, rel=1e-12)
            levels = [0, *accumulate(part.net_bytes for part in parts)]
            assert levels[-1] == of_stage.net_bytes
            assert max(level + part.rise_bytes for level, part in zip(levels, parts, strict=False)) == of_stage.rise_bytes
        assert sum(one.parameter_elements for one in chunks) == sum(block.parameter_elements for block in stage.blocks)
        assert sum(staged_bytes(chunks, 1.0, 1.0)) == whole.forward.net_bytes
