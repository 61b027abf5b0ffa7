"""Host schedules: errands of small chains by hand, what their times are, and what holds for any of them."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from simulator import engine_compiled
from simulator.host_planner import host_schedule
from simulator.host_schedule import INPUT, SHARED, HostSchedule, HostShares
from simulator.lower import PassPrices, lower
from simulator.lower_host import HostLanes, host_lanes
from simulator.program import MemoryClass
from simulator.run_record import outcome_of
from simulator.sequence import Operation, checkpoint_blocks, keep_all
from simulator.timeline import MemoryProfile, Timeline
from simulator.workload import Block, ParameterTensor, SavedTensor, Workload
from tests.simulator.test_lower import GRADIENT, OUT, SAVED, WORKLOAD, seconds

WEIGHT = GRADIENT
LANES = HostLanes(
    to_device_bytes_per_s=50.0, to_host_bytes_per_s=50.0, both_bytes_per_s=100.0, latency_s=0.0, compute_slowdown=1.0, copy_slowdown=1.0,
    update_bytes_per_s=1e9,
)  # fmt: skip


def chain(num_blocks: int) -> Workload:
    """Equal blocks that save one tensor and their input, two seconds forward and three backward."""
    first, middle = WORKLOAD.blocks[0], WORKLOAD.blocks[1]

    def known(block: Block) -> Block:
        saved = (SavedTensor(op="mm", shape=(SAVED,), dtype="int8", size_bytes=SAVED, packed=0),)
        options = tuple(replace(option, saved=saved) for option in block.options)
        return replace(block, options=options, parameters=(ParameterTensor(elements=1, size_bytes=WEIGHT, trained=True),))

    first, middle = (replace(known(block), gradient_bytes=GRADIENT) for block in (first, middle))
    blocks = (first, *[middle] * (num_blocks - 1))
    return replace(
        WORKLOAD, blocks=blocks, gradient_bytes=num_blocks * GRADIENT, optimizer_tensors=(1,) * num_blocks,
        parameter_bytes=num_blocks * WEIGHT,
    )  # fmt: skip


def shares(num_blocks: int, activations: float = 0.0, weights: float = 0.0, optimizer: float = 0.0) -> HostShares:
    return HostShares(activations=(activations,) * num_blocks, weights=(weights,) * num_blocks, optimizer=optimizer)


def schedule_of(operations: tuple[Operation, ...], chosen: HostShares, num_microbatches: int = 1) -> HostSchedule:
    found = host_schedule(chain(len(chosen.weights)), operations, chosen, num_microbatches=num_microbatches, optimizer_states=2)
    assert found is not None
    return found


def text(schedule: HostSchedule) -> list[str]:
    """A line a moment: errands before | after, each verb with its part's block."""
    return [
        " ".join(f"{verb}{schedule.parts[part].block}" for verb, part in moment.before)
        + "|"
        + " ".join(f"{verb}{schedule.parts[part].block}" for verb, part in moment.after)
        for moment in schedule.moments
    ]


def outcome(
    operations: tuple[Operation, ...], chosen: HostShares | None, lanes: HostLanes = LANES
) -> tuple[Timeline, MemoryProfile]:
    workload = chain(1 + max(operation.block for operation in operations))
    host = None if chosen is None else host_schedule(workload, operations, chosen, num_microbatches=1, optimizer_states=2)
    program = lower(workload, operations, PassPrices(seconds), optimizer="sgd", host=host, lanes=lanes)
    timeline, (profile,) = outcome_of(program, engine_compiled.record(program))
    return timeline, profile


def test_saved_tensors_leave_beside_the_next_block_and_return_beside_the_one_before() -> None:
    schedule = schedule_of(keep_all(4), shares(4, activations=1.0))
    assert text(schedule) == [
        "|store0", "|store1", "drop0|store2", "drop1|", "drop2 load2|", "load1 use2|", "load0 use1|", "use0|", "|", "|",
    ]  # fmt: skip
    assert [part.members for part in schedule.parts] == [(0,), (INPUT, 0), (INPUT, 0)], (
        "the last block's come back too soon to go"
    )
    assert schedule.host_bytes == 3 * SAVED + 2 * OUT


def test_checkpoints_leave_too() -> None:
    schedule = schedule_of(checkpoint_blocks(4, range(3), ["all"] * 4), shares(4, activations=1.0))
    assert [(part.block, part.members) for part in schedule.parts] == [(1, (INPUT,)), (2, (INPUT,))]
    assert text(schedule)[1:8] == ["|store1", "|store2", "drop1|", "drop2 load2|", "use2|", "load1|", "use1|"]


def test_weights_come_before_each_run_and_gradients_are_updated_there() -> None:
    schedule = schedule_of(keep_all(3), shares(3, weights=1.0, optimizer=1.0))
    assert text(schedule) == [
        "load0 load1 use0|release0", "load2 use1|release1", "use2|", "load1|store2 update2 release2",
        "load0 use1|store1 update1 release1", "drop2 use0|store0 update0 release0", "drop1|", "drop0|",
    ]  # fmt: skip
    assert schedule.resident_bytes == 3 * 4 * WEIGHT, "parameter, gradient and two states"


def test_weights_that_the_device_updates_come_once_more_and_go_back() -> None:
    schedule = schedule_of(keep_all(2), shares(2, weights=1.0))
    assert text(schedule)[-4:] == ["load0|", "load1 use0|store0", "use1|store1", "drop0 drop1|"]
    assert [moment.block for moment in schedule.moments[-4:]] == [SHARED, 0, 1, SHARED]


def test_a_fraction_takes_every_other_tensor() -> None:
    schedule = schedule_of(keep_all(6), shares(6, weights=0.5))
    assert schedule.away == ((), (0,), (), (0,), (), (0,))


def test_nothing_offloaded_is_no_schedule() -> None:
    assert host_schedule(chain(3), keep_all(3), shares(3), num_microbatches=1, optimizer_states=2) is None


def test_time_and_memory_by_hand() -> None:
    """Four blocks of 2 s forward, 3 s backward, an update of 4 s: block 0's 100 bytes and then 110 of each of two take 2.2 s a direction."""
    operations = keep_all(4)
    plain, offloaded = outcome(operations, None), outcome(operations, shares(4, activations=1.0))
    assert plain[0].makespan_s == 4 * 2 + 4 * 3 + 4
    spans = {(span.name, span.stream.name): (span.start_s, span.end_s) for span in offloaded[0].spans}
    assert spans["T0:store mb0", "D2H"] == (2.0, 4.0)
    assert spans["T1:store mb0", "D2H"] == (4.0, pytest.approx(6.2))
    assert spans["T2:store mb0", "D2H"] == (pytest.approx(6.2), pytest.approx(8.4))
    assert spans["F3:all mb0", "COMPUTE"] == (pytest.approx(6.2), pytest.approx(8.2)), "waits for block 1's room"
    assert spans["T2:load mb0", "H2D"] == (pytest.approx(8.2), pytest.approx(10.4))
    assert offloaded[0].makespan_s == pytest.approx(plain[0].makespan_s + 0.4), (
        "block 1's room and block 2's exit were late by 0.2 s each"
    )
    kept = [int(profile.alive_bytes[:, MemoryClass.ACTIVATIONS].max()) for _, profile in (plain, offloaded)]
    assert kept[0] - kept[1] == SAVED + SAVED + OUT, "those of blocks 0 and 1 have gone when the last block runs"


def test_a_link_without_end_costs_nothing() -> None:
    operations = keep_all(5)
    endless = replace(
        LANES, to_device_bytes_per_s=1e15, to_host_bytes_per_s=1e15, both_bytes_per_s=1e15, update_bytes_per_s=1e15
    )
    found = outcome(operations, shares(5, activations=1.0, weights=1.0, optimizer=1.0), endless)[0].makespan_s
    assert found == pytest.approx(5 * (2 + 3), rel=1e-6), "even the update is the host's"


@given(rate=st.floats(1.0, 1e4), faster=st.floats(1.0, 10.0), part=st.sampled_from([0.3, 0.6, 1.0]))
def test_a_faster_link_never_hurts(rate: float, faster: float, part: float) -> None:
    operations, chosen = keep_all(4), shares(4, activations=part, weights=part)
    times = [
        outcome(operations, chosen, replace(LANES, to_device_bytes_per_s=r, to_host_bytes_per_s=r, both_bytes_per_s=2 * r))[
            0
        ].makespan_s
        for r in (rate, rate * faster)
    ]
    assert times[1] <= times[0] * (1 + 1e-9)


@given(fractions=st.tuples(*[st.floats(0.0, 1.0)] * 3), num_microbatches=st.integers(1, 3))
def test_bytes_return_to_the_resident_level(fractions: tuple[float, float, float], num_microbatches: int) -> None:
    workload, operations = chain(4), checkpoint_blocks(4, (1, 2), ["all"] * 4)
    host = host_schedule(workload, operations, shares(4, *fractions), num_microbatches=num_microbatches, optimizer_states=2)
    program = lower(workload, operations, PassPrices(seconds), num_microbatches=num_microbatches, host=host, lanes=LANES)
    assert int(program.memory_bytes.sum()) == 0


def test_a_device_whose_copies_are_not_known_is_refused() -> None:
    device = replace(load_hardware("h100-sxm"), copy_engine=None)
    with pytest.raises(InputError, match="offloading needs the rate of copies between device and host"):
        host_lanes(device)


def test_lanes_of_a_catalogued_device() -> None:
    lanes = host_lanes(load_hardware("h100-sxm"))
    assert lanes.both_bytes_per_s == pytest.approx(0.72 * (lanes.to_device_bytes_per_s + lanes.to_host_bytes_per_s))
    assert lanes.update_bytes_per_s > lanes.to_device_bytes_per_s
