"""Gradients and parameters between replicas, by hand: volumes of collectives priced by the same cluster, and what steps make of them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.network.cluster import CommGroup
from hardware_models.network.collectives import collective_seconds
from simulator.parallel.communication import Communication
from simulator.parallel.gradient_sync import GradientSync, StageLoad, gradient_sync
from simulator.parallel.mesh import mesh_of
from simulator.parallel.parameter_gathers import ListSeconds, Unit
from simulator.parallel.wire_format import WireFormat
from simulator.plan import Plan
from simulator.plan_parallel import check_parallel
from simulator.precision import price_in
from tests.simulator.parallel.step_cases import NO_SLOWDOWN, SEQ_LEN, cluster_of, plan_of, simulated, small_config

ELEMENTS = 64_000_000
UNITS = tuple(Unit(first=n, end=n + 1, elements=ELEMENTS // 4) for n in range(4))
LOAD = StageLoad(elements=ELEMENTS, units=UNITS, forward_s=(1.0,) * 4, backward_s=(2.0,) * 4)
NODE = {"num_ranks": 8, "ranks_per_node": 8}
ACROSS = {"num_ranks": 4, "ranks_per_node": 1, "concurrent_groups": 8}


def plan(*, dp: int = 32, dp_shard: int | None = None, zero_stage: int = 1, ep: int = 1, prefetch: int | None = None) -> Plan:
    own = plan_of(dp=dp, ep=ep, zero_stage=zero_stage, framework="deepspeed")
    runtime = replace(own.runtime, bucket_bytes=1 << 40, prefetch_blocks=prefetch)
    return replace(own, parallel=replace(own.parallel, dp_shard=dp_shard), runtime=runtime)


def synced(own: Plan, load: StageLoad = LOAD) -> GradientSync:
    communication = Communication(
        own, mesh_of(own, cluster_of(own)), small_config(), dtype="bfloat16", seq_len=SEQ_LEN, factors=NO_SLOWDOWN
    )
    device = load_hardware(cluster_of(own).device)
    wire = WireFormat(comm=own.precision.comm, price=price_in("bf16", device))
    return gradient_sync(own, communication, load, wire, distance=0, dtype="bfloat16")


def seconds(collective: str, size_bytes: float, group: dict[str, int]) -> float:
    return collective_seconds(collective, size_bytes, CommGroup(**group), cluster_of(plan()))


@pytest.mark.parametrize("zero_stage", [1, 2])
def test_hybrid_shards_scatter_inside_and_sum_across(zero_stage: int) -> None:
    """Groups of eight in a node: 256 MB of float32 gradients scattered among them, an eighth of them summed over four nodes."""
    own = synced(plan(dp_shard=8, zero_stage=zero_stage))
    expected = seconds("reduce_scatter", 4.0 * ELEMENTS, NODE) + seconds("all_reduce", 0.5 * ELEMENTS, ACROSS)
    assert own.reduce_s == pytest.approx(expected, rel=1e-12)
    assert own.gather_s == pytest.approx(seconds("all_gather", 2.0 * ELEMENTS, NODE), rel=1e-12)


@pytest.mark.parametrize(
    ("framework", "read", "written"),
    [("megatron-core", 8, 4), ("megatron-core@2023", 4, 4), ("megatron-lm@2021", 4, 4), ("pytorch", 0, 0)],
)
def test_megatron_divides_gradients_before_it_sums_them_and_its_core_looks_for_what_is_no_number(
    framework: str, read: int, written: int
) -> None:
    """Four bytes an element read for the norm, four read and four written to divide them."""
    bare = plan(zero_stage=0)
    own = replace(bare, runtime=replace(bare.runtime, framework=framework))
    wire = WireFormat(comm="same", price=price_in("bf16", load_hardware(cluster_of(own).device)))
    expected = wire.pass_s(ELEMENTS, read_bytes=read, written_bytes=written) if read else 0.0
    assert synced(own).reduce_s - synced(bare).reduce_s == pytest.approx(expected, rel=1e-9)


def test_all_ranks_in_one_group_is_the_default() -> None:
    assert synced(plan(dp_shard=32)) == synced(plan())


def test_sharding_within_nodes_gathers_faster() -> None:
    assert synced(plan(dp_shard=8)).gather_s < synced(plan(dp_shard=16)).gather_s < synced(plan()).gather_s


def test_zero_3_gathers_and_scatters_by_unit() -> None:
    own = synced(plan(zero_stage=3, dp_shard=8))
    one_s = seconds("all_gather", 2.0 * ELEMENTS / 4, NODE)
    assert own.forward_gathers.first_s == pytest.approx(one_s)
    assert own.backward_gathers.rest_s == pytest.approx(3 * one_s)
    scatter_s = seconds("reduce_scatter", 4.0 * ELEMENTS / 4, NODE) + seconds("all_reduce", 0.5 * ELEMENTS / 4, ACROSS)
    assert own.reduce_s == pytest.approx(4 * scatter_s)
    assert own.every_micro_batch


def test_without_prefetch_a_pass_waits_for_every_unit() -> None:
    near, far = synced(plan(zero_stage=3, prefetch=0)), synced(plan(zero_stage=3, prefetch=1))
    assert near.forward_gathers.first_s == pytest.approx(4 * far.forward_gathers.first_s)
    assert near.forward_gathers.rest_s == pytest.approx(0.0, abs=1e-12)


def test_experts_are_summed_over_their_own_copies() -> None:
    """Eight experts' ranks in a node: dense gradients go over all 32, an expert's over the four nodes."""
    load = replace(LOAD, expert_elements=ELEMENTS / 2)
    whole = {"num_ranks": 32, "ranks_per_node": 8}
    expected = seconds("reduce_scatter", 2.0 * ELEMENTS, whole) + seconds("reduce_scatter", 2.0 * ELEMENTS, ACROSS)
    assert synced(plan(ep=8), load).reduce_s == pytest.approx(expected, rel=1e-12)
    alone = synced(plan(ep=32), load)
    assert alone.reduce_s == pytest.approx(seconds("reduce_scatter", 2.0 * ELEMENTS, whole), rel=1e-12)


def test_smaller_groups_hold_more() -> None:
    """States of 12 bytes a parameter over 8 ranks instead of 16: 12 * P / 16 more."""
    small, large = (simulated(plan(dp=16, dp_shard=ranks)) for ranks in (8, 16))
    parameters = large.profiles[0].peak_breakdown_bytes["parameters"] / 2
    assert small.peak_memory_bytes[0] - large.peak_memory_bytes[0] == pytest.approx(12 * parameters / 16, rel=1e-6)


def test_prefetching_holds_more_and_is_no_slower() -> None:
    plans = [plan(dp=16, zero_stage=3, prefetch=blocks) for blocks in (0, 2)]
    near, far = (simulated(replace(own, runtime=replace(own.runtime, cuda_graphs=True))) for own in plans)
    assert far.step_time_s < near.step_time_s
    assert far.peak_memory_bytes[0] > near.peak_memory_bytes[0]


@pytest.mark.parametrize(
    ("own", "message"),
    [
        (plan(dp_shard=8, zero_stage=0), r"dp_shard = 8: nothing is sharded at zero_stage = 0"),
        (plan(zero_stage=1, prefetch=2), r"prefetch_blocks = 2: .* at zero_stage = 3 only, but got 1"),
    ],
)
def test_sharding_keys_without_sharding_are_refused(own: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_parallel(own, compute=("bf16",))


def sent_as(own: Plan, comm: str) -> Plan:
    return replace(own, precision=replace(own.precision, comm=comm))  # type: ignore[arg-type]


def test_quantised_gradients_are_exchanged_in_two_steps() -> None:
    """A byte and 1/64 of scales an element: all of them among 8 ranks of a node, an eighth across 4 nodes.

    Before each exchange 4 bytes are read and 1 written, behind it 1 is read and a part of 4 written.
    """
    own = sent_as(plan(), "int8")
    device = load_hardware(cluster_of(own).device)
    wire = WireFormat(comm="int8", price=price_in("bf16", device))
    expected, elements = 0.0, float(ELEMENTS)
    for group, ranks in ((NODE, 8), (ACROSS, 4)):
        expected += seconds("all_to_all", elements * (1 + 1 / 64), group)
        expected += wire.change_s(elements, read_bytes=4, written_bytes=1) + wire.change_s(
            elements, read_bytes=1, written_bytes=4 / ranks
        )
        elements /= ranks
    assert wire.change_s(ELEMENTS, read_bytes=4, written_bytes=1) > 5.0 * ELEMENTS / device.memory_bandwidth_bytes_per_s
    assert synced(own).reduce_s == pytest.approx(expected, rel=1e-12)


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_eight_bits_save_less_than_their_share(zero_stage: int) -> None:
    """Between nodes a quarter of the bytes of float32 gradients; casts and scales take some of it back."""
    full, half, eighth = (synced(sent_as(plan(zero_stage=zero_stage), comm)).reduce_s for comm in ("same", "bf16", "fp8"))
    assert half < full
    assert full / 4 < eighth < full


def test_quantised_parameters_are_gathered_in_half_the_bytes() -> None:
    full, eighth = (synced(sent_as(plan(), comm)).gather_s for comm in ("same", "int8"))
    assert full / 2 < eighth < full


def test_bfloat16_halves_gradients_and_leaves_parameters() -> None:
    full, half = (synced(sent_as(plan(zero_stage=1), comm)) for comm in ("same", "bf16"))
    expected = seconds("reduce_scatter", 2.0 * ELEMENTS, {"num_ranks": 32, "ranks_per_node": 8})
    assert half.reduce_s == pytest.approx(expected, rel=1e-12)
    assert half.gather_s == full.gather_s


def test_fsdp_copies_out_of_and_into_flat_buffers() -> None:
    """Two bytes read and written of each gathered parameter in either pass; two read and four written of each gradient."""
    own = plan(zero_stage=3)
    flat, direct = (
        synced(replace(own, runtime=replace(own.runtime, framework=name))) for name in ("torchtitan", "megatron-core")
    )
    wire = WireFormat(comm="same", price=price_in("bf16", load_hardware(cluster_of(own).device)))
    out_s, in_s = (4 * wire.pass_s(ELEMENTS // 4, read_bytes=2, written_bytes=width) for width in (2, 4))
    for own_gathers, other in (
        (flat.forward_gathers, direct.forward_gathers),
        (flat.backward_gathers, direct.backward_gathers),
    ):
        assert own_gathers.first_s - other.first_s == pytest.approx(out_s, rel=1e-6)
    assert flat.reduce_s - direct.reduce_s == pytest.approx(in_s, rel=1e-6)


def test_a_trainer_that_sums_everywhere_moves_whole_float32_gradients() -> None:
    """Over 32 ranks 4 bytes a parameter are summed, not scattered, under ZeRO 1; five passes move 4, 4, 6, 6 and 4 bytes; parameters are gathered as elsewhere."""
    own = plan(dp=32)
    own = replace(own, runtime=replace(own.runtime, framework="aa-scaling"), precision=replace(own.precision, grads="bf16"))
    found = synced(own)
    summed_s = seconds("all_reduce", 4.0 * ELEMENTS, {"num_ranks": 32, "ranks_per_node": 8})
    memory_s = 24.0 * ELEMENTS / load_hardware("a100-sxm-80gb").memory_bandwidth_bytes_per_s
    assert summed_s + memory_s < found.reduce_s < summed_s + 1.4 * memory_s
    assert found.gather_s == synced(plan(dp=32)).gather_s


def test_lists_hold_the_device_for_each_rank_and_each_tensor() -> None:
    """Four tensors of 16 million among 32 ranks, one listing of 1 ms a rank each: 128 ms a pass, and copies of half a million elements."""
    own = plan(zero_stage=3, prefetch=1)
    listed = replace(LOAD, lists=ListSeconds(gathered_s=1e-3, scattered_s=2e-3))
    before, after = synced(own), synced(own, listed)
    more_s = after.forward_gathers.first_s - before.forward_gathers.first_s
    assert 4 * 32e-3 <= more_s < 4 * 32e-3 + 32 * 4 * 20e-6
    assert 4 * 64e-3 < after.reduce_s - before.reduce_s < 4 * 64e-3 + 32 * 4 * 20e-6
