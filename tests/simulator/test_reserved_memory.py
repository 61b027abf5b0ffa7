"""Reserved memory of a step: profiles read as tensors, steps repeated, by hand and on traced models."""

from __future__ import annotations

from typing import Any

import numpy as np
import pytest

from hardware_models.caching_allocator import parse_alloc_conf
from hardware_models.catalogue import load_hardware
from hardware_models.units import MIB
from simulator.program import Kind, MemoryClass
from simulator.reserved_memory import ResidentTensors, reserved_peaks, resident_tensors, step_calls
from simulator.simulate import StepSetting, simulate
from simulator.timeline import MemoryProfile
from tests.small_models import traced
from tests.small_steps import sequences

ACT, TRA, GRA = MemoryClass.ACTIVATIONS, MemoryClass.TRANSIENT, MemoryClass.GRADIENTS
NOTHING = ResidentTensors(parameters=(), batch=(), optimizer_states=())


def profile(*changes: tuple[float, int, MemoryClass]) -> MemoryProfile:
    """Bytes over time from changes (time, MiB, class)."""
    rows = np.zeros((len(changes) + 1, len(MemoryClass)), np.int64)
    for index, (_, delta, memory_class) in enumerate(changes):
        rows[index + 1, memory_class] = delta * MIB
    return MemoryProfile(
        device=0, time_s=np.array([0.0, *(time_s for time_s, _, _ in changes)]), alive_bytes=rows.cumsum(axis=0)
    )


def calls(*changes: tuple[float, int, MemoryClass]) -> list[tuple[str, Any]]:
    found, _ = step_calls(profile(*changes), update_s=1e9)
    return [("allocate" if size else "free", name) for name, size in zip(*(part.tolist() for part in found), strict=True)]


def test_a_fall_frees_the_tensor_of_its_size() -> None:
    assert calls((1, 5, ACT), (1, 7, ACT), (2, -5, ACT), (3, -7, ACT))[2:] == [("free", 0), ("free", 1)]


def test_of_equal_tensors_the_oldest_transient_and_the_youngest_activation_goes() -> None:
    assert calls((1, 5, TRA), (2, 5, TRA), (3, -5, TRA), (3, 1, ACT))[2] == ("free", 0)
    assert calls((1, 5, ACT), (2, 5, ACT), (3, -5, ACT), (3, 1, TRA))[2] == ("free", 1)


def test_a_fall_that_no_tensors_explain_waits_for_the_next() -> None:
    # 5, 6, 7 alive; 10 go: 7 fits, 6 does not (3 left), nor 5; the 3 are owed. The next 3 free what fits 6: the 6.
    found = calls((1, 5, ACT), (1, 6, ACT), (1, 7, ACT), (2, -10, ACT), (3, -3, ACT), (4, 1, TRA))
    assert found[3:5] == [("free", 2), ("free", 1)]


def test_a_fall_of_several_tensors_frees_those_that_sum_to_it() -> None:
    assert calls((1, 5, ACT), (1, 6, ACT), (1, 7, ACT), (2, -12, ACT), (3, 1, TRA))[3:5] == [("free", 2), ("free", 0)]
    assert calls((1, 5, ACT), (1, 6, ACT), (1, 7, ACT), (2, -11, ACT), (3, 1, TRA))[3:5] == [("free", 1), ("free", 0)]


def test_classes_do_not_mix_and_all_is_free_at_the_end() -> None:
    found = calls((1, 5, ACT), (1, 5, GRA), (2, -5, GRA))
    assert found == [("allocate", 0), ("allocate", 1), ("free", 1), ("free", 0)]


def test_optimizer_states_take_what_the_first_step_left() -> None:
    # A step of 24 MiB of activations; states of 20 MiB come at its end into the freed 24 (rest 4), so that the second step needs
    # 24 anew: 48. Were they there before the step, 20 + 24 would do.
    step = profile((1, 24, ACT), (2, -24, ACT), (4, 1, GRA), (4, -1, GRA))
    resident = ResidentTensors(parameters=(), batch=(), optimizer_states=(20 * MIB,))
    assert reserved_peaks(step, resident, update_s=3.0).peak_reserved_bytes == (48 + 2) * MIB
    before = ResidentTensors(parameters=(20 * MIB,), batch=(), optimizer_states=())
    assert reserved_peaks(step, before, update_s=3.0).peak_reserved_bytes == (44 + 2) * MIB


def test_static_tensors_are_rounded_one_by_one() -> None:
    resident = ResidentTensors(parameters=(100,) * 10, batch=(1,), optimizer_states=(4,) * 10)
    found = reserved_peaks(profile((1, 1, TRA), (2, -1, TRA)), resident, update_s=0.5)
    assert found.final_allocated_bytes == 21 * 512
    assert found.peak_allocated_bytes == 21 * 512 + MIB


def test_a_step_that_returns_to_its_start_ends_the_run() -> None:
    found = reserved_peaks(profile((1, 30, ACT), (2, -30, ACT)), NOTHING, update_s=3.0)
    assert (found.peak_reserved_bytes, found.final_allocated_bytes, found.out_of_memory_at) == (30 * MIB, 0, None)


def test_too_little_memory_is_a_result() -> None:
    step = profile((1, 30, ACT), (2, -30, ACT), (3, 40, ACT), (4, -40, ACT))
    assert reserved_peaks(step, NOTHING, update_s=9.0).peak_reserved_bytes == 70 * MIB
    assert reserved_peaks(step, NOTHING, update_s=9.0, capacity_bytes=39 * MIB).out_of_memory_at == 2
    limited = reserved_peaks(step, NOTHING, update_s=9.0, capacity_bytes=50 * MIB)  # the 30 are returned for the 40
    assert (limited.out_of_memory_at, limited.peak_reserved_bytes) == (None, 40 * MIB)
    assert limited.num_retries > 0
    expandable = reserved_peaks(step, NOTHING, update_s=9.0, settings=parse_alloc_conf("expandable_segments:True"))
    assert expandable.peak_reserved_bytes == 40 * MIB


@pytest.mark.parametrize("name", ["residual-mlp", "transformer", "convolution-net", "spectral", "shared-layer"])
@pytest.mark.parametrize("optimizer", ["adamw", "sgd"])
def test_resident_tensors_add_up(name: str, optimizer: str) -> None:
    trace_of = traced(name)
    setting = StepSetting(num_microbatches=2, optimizer=optimizer)
    for operations in sequences(trace_of).values():
        found = simulate(trace_of.workload, operations, load_hardware("h100-sxm"), setting)
        (resident_bytes,) = found.program.resident_bytes
        tensors = resident_tensors(trace_of.workload, resident_bytes, num_microbatches=2, optimizer=optimizer)
        assert sum(tensors.parameters) == resident_bytes[MemoryClass.PARAMETERS]
        assert sum(tensors.batch) == resident_bytes[MemoryClass.BATCH]
        assert sum(tensors.optimizer_states) == resident_bytes[MemoryClass.OPTIMIZER_STATES]
        assert len(tensors.parameters) >= len(trace_of.workload.optimizer_tensors)
        (updates,) = [span.start_s for span in found.timeline.spans if span.kind is Kind.OPTIMIZER]
        calls_made, _ = step_calls(found.profiles[0], update_s=updates)
        assert 2 * np.count_nonzero(calls_made.size_bytes) == len(calls_made.names) > 0
        (peaks,) = found.allocators
        assert peaks.peak_requested_bytes == found.peak_memory_bytes[0]


def test_more_parameters_than_known_are_one_tensor() -> None:
    workload = traced("residual-mlp").workload
    tensors = resident_tensors(workload, (10, 0, 20, 3, 0, 0), num_microbatches=1, optimizer="adamw")
    assert (tensors.parameters, tensors.batch, tensors.optimizer_states) == ((10,), (3,), (20,))


def test_a_device_too_small_says_what_would_be_needed() -> None:
    workload = traced("residual-mlp").workload
    device = load_hardware("h100-sxm")
    operations = sequences(traced("residual-mlp"))["none"]
    plain = simulate(workload, operations, device, StepSetting(num_microbatches=2))
    least = plain.peak_allocated_bytes[0]
    found = simulate(
        workload, operations, device.changed(memory_bytes=least - 1, context_bytes=0), StepSetting(num_microbatches=2)
    )
    assert found.allocators == plain.allocators
    assert not found.fits
