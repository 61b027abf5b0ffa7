"""Optimizer states on drives, and parameters on hosts beside ZeRO: bytes and times by hand, limits, and what more of each does."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.errors import InputError
from simulator.parallel.offload import DriveShare, HostPath, drive_share, host_path
from simulator.parallel.offload_plan import from_drives, host_update
from simulator.parallel.simulation import ParallelSimulation
from simulator.program import MemoryClass
from tests.simulator.parallel.offload_cases import run, with_memory
from tests.simulator.parallel.step_cases import cluster_of, plan_of

PARAMETERS = 1000
DRAM = HostPath(
    to_device_bytes_per_s=10.0, to_host_bytes_per_s=10.0, both_bytes_per_s=20.0, dram_bytes_per_s=100.0, latency_s=0.0
)


def drives(rate: float) -> DriveShare:
    return DriveShare(reads_bytes_per_s=2 * rate, writes_bytes_per_s=rate, both_bytes_per_s=2 * rate, latency_s=0.0)


def test_slow_drives_set_the_time_of_the_hosts_step() -> None:
    """AdamW in bfloat16: 12 bytes of states read and written; at 1 B/s of writes 12,000 s, which memory at 100 B/s would spend on 1.2 MB."""
    update = host_update(with_memory(plan_of(), optimizer_offload=1.0), [PARAMETERS], width=2)
    assert update.state_bytes == 12 * PARAMETERS
    assert from_drives(update, drives(1.0), DRAM).moved_bytes == 12 * PARAMETERS * 100.0


def test_fast_drives_leave_memory_the_bytes_that_pass_through() -> None:
    update = host_update(with_memory(plan_of(), optimizer_offload=1.0), [PARAMETERS], width=2)
    assert from_drives(update, drives(1e30), DRAM).moved_bytes == (4 + 12 + 12 + 2 + 24) * PARAMETERS


def test_faster_drives_never_hurt() -> None:
    update = host_update(with_memory(plan_of(), optimizer_offload=1.0), [PARAMETERS], width=2)
    moved = [from_drives(update, drives(rate), DRAM).moved_bytes for rate in (0.1, 1.0, 10.0, 100.0, 1e9)]
    assert moved == sorted(moved, reverse=True)


def test_a_rank_has_its_share_of_the_nodes_drives() -> None:
    cluster = cluster_of(plan_of(dp=8))
    one, eight = drive_share(cluster.with_gpus(1)), drive_share(cluster)
    assert one.reads_bytes_per_s == pytest.approx(8 * eight.reads_bytes_per_s)
    assert host_path(cluster, "nvme").to_device_bytes_per_s <= eight.reads_bytes_per_s


@pytest.mark.parametrize(
    "plan",
    [
        plan_of(num_microbatches=2),
        plan_of(dp=8, zero_stage=1, num_microbatches=2),
        plan_of(dp=8, zero_stage=3, num_microbatches=2),
    ],
)
def test_states_on_drives_take_longer_than_in_memory_and_as_little_of_the_device(plan: object) -> None:
    memory, drive = (run(plan, optimizer_offload=1.0, offload_target=target) for target in ("host", "nvme"))  # type: ignore[arg-type]
    assert drive.step_time_s > memory.step_time_s
    assert drive.peak_memory_bytes == memory.peak_memory_bytes
    assert drive.program.resident_bytes[0][MemoryClass.OPTIMIZER_STATES] == 0


def test_states_on_drives_need_drives() -> None:
    cluster = cluster_of(plan_of())
    with pytest.raises(InputError, match=r"host\.num_nvme.*drives"):
        drive_share(replace(cluster, host=replace(cluster.host, num_nvme=0)))


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_parameters_on_the_host_beside_zero(zero_stage: int) -> None:
    """What stays on the device goes down by the part that leaves: of all parameters, or of the rank's shard under ZeRO 3."""
    plan = plan_of(dp=8, zero_stage=zero_stage, num_microbatches=2)
    kept, away = (run(plan, weight_offload=part) for part in (0.0, 1.0))
    gone = kept.program.resident_bytes[0][MemoryClass.PARAMETERS] - away.program.resident_bytes[0][MemoryClass.PARAMETERS]
    (whole,) = [
        own[MemoryClass.PARAMETERS] for own in run(plan_of(num_microbatches=2), weight_offload=0.0).program.resident_bytes
    ]
    assert gone == pytest.approx(whole / (8 if zero_stage == 3 else 1), rel=0.05)
    assert away.peak_host_bytes == pytest.approx(8 * gone, rel=0.01)
    assert away.step_time_s >= kept.step_time_s * (1 - 1e-9)


TABLE_BYTES = 4096 * 1024 * 2
"""The table that embedding and head share stays on the device."""


def sent_bytes(result: ParallelSimulation, label: str) -> float:
    """Of all transfers with a label."""
    rows, option = result.program.transfers, result.program.option
    return float(
        sum(size for n, size in zip(rows.instruction.tolist(), rows.size_bytes.tolist(), strict=True) if option[n] == label)
    )


@pytest.mark.parametrize("zero_stage", [0, 1, 3])
def test_bytes_fetched_are_those_that_live_on_the_host(zero_stage: int) -> None:
    """Once for each pass of each of two micro-batches; four ranks share the node."""
    result = run(plan_of(dp=4, zero_stage=zero_stage, num_microbatches=2), weight_offload=0.5)
    assert sent_bytes(result, "fetch") == pytest.approx(4 * result.peak_host_bytes / 4, rel=1e-3)


def test_all_on_the_host_is_zero_infinity() -> None:
    """ZeRO 3 with parameters, gradients and states away: the device keeps neither; updated shards need not travel, but the table's."""
    plan = plan_of(dp=8, zero_stage=3, num_microbatches=2)
    result = run(plan, weight_offload=1.0, optimizer_offload=1.0, grad_offload=1.0, offload_target="nvme")
    resident = result.program.resident_bytes[0]
    assert resident[MemoryClass.OPTIMIZER_STATES] == resident[MemoryClass.GRADIENTS] == 0
    assert sent_bytes(result, "return") == 0.0
    assert sent_bytes(result, "params") == pytest.approx(TABLE_BYTES / 8, rel=1e-3)


@pytest.mark.parametrize("zero_stage", [0, 1, 2, 3])
def test_shards_that_all_ranks_need_go_up_and_all_comes_down_again(zero_stage: int) -> None:
    """Under ZeRO 1 and 2: a quarter of the parameters up, all but the table down. Else nothing but the table moves."""
    result = run(plan_of(dp=4, zero_stage=zero_stage, num_microbatches=2), weight_offload=1.0, optimizer_offload=1.0)
    (whole,) = [own[MemoryClass.PARAMETERS] for own in run(plan_of(num_microbatches=2)).program.resident_bytes]
    shared = zero_stage in {1, 2}
    up_bytes = whole / 4 if shared else TABLE_BYTES / (4 if zero_stage == 3 else 1)
    assert sent_bytes(result, "params") == pytest.approx(up_bytes, rel=1e-3)
    assert sent_bytes(result, "return") == pytest.approx(whole - TABLE_BYTES if shared else 0.0, rel=1e-3)
