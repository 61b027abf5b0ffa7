"""The chain problem of a workload: its times are the program's, its memory never less and hardly more."""

from __future__ import annotations

from functools import partial

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.pricing import price
from search.chain_of_workload import chain_of_workload, overcount_bytes
from search.chain_schedules import evaluate
from simulator.lower import PassPrices, lower, resident_bytes
from simulator.program import Kind
from simulator.simulate import static_peak_bytes
from tests.small_models import SMALL_MODELS, traced
from tests.small_steps import sequences

DEVICE = load_hardware("h100-sxm")


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("first_micro_batch", [True, False], ids=["first", "later"])
def test_time_is_the_programs_and_memory_within_the_overcount(name: str, *, first_micro_batch: bool) -> None:
    trace_of = traced(name)
    workload = trace_of.workload
    problem = chain_of_workload(workload, DEVICE, first_micro_batch=first_micro_batch)
    num_microbatches = 1 if first_micro_batch else 2
    prices = PassPrices(partial(price, profile=DEVICE))
    resident = sum(resident_bytes(workload, num_microbatches=num_microbatches, optimizer="adamw"))
    for label, operations in sequences(trace_of).items():
        time_s, peak_bytes = evaluate(problem, operations)
        program = lower(workload, operations, prices, num_microbatches=num_microbatches)
        last = (program.micro_batch == num_microbatches - 1) & (program.kind != Kind.REDUCE)
        assert time_s == pytest.approx(program.duration_s[last].sum(), rel=1e-9), label
        exact = static_peak_bytes(program) - resident
        lasting_loss = 2 * workload.blocks[-1].output_bytes
        assert exact - lasting_loss <= peak_bytes <= exact + overcount_bytes(workload), label


def test_shapes_of_the_problem() -> None:
    workload = traced("transformer").workload
    problem = chain_of_workload(workload, DEVICE, first_micro_batch=True)
    blocks = workload.blocks
    assert problem.num_stages == len(blocks)
    assert problem.source == "transformer, micro-batch 6"
    assert problem.boundary_bytes == (0, *(block.output_bytes for block in blocks))
    assert problem.boundary_gradient_bytes == (0, *(block.output_bytes for block in blocks[:-1]), 0)
    assert problem.option_names == tuple(tuple(option.name for option in block.options) for block in blocks)
    for stage, block in enumerate(blocks):
        for option, saved in zip(block.options, problem.saved_bytes[stage], strict=True):
            assert saved == option.saved_internal_bytes + block.output_bytes


def test_gradients_come_into_being_from_the_end() -> None:
    workload = traced("residual-mlp").workload
    carried = 0
    first = chain_of_workload(workload, DEVICE, first_micro_batch=True).resident_bytes
    later = chain_of_workload(workload, DEVICE, first_micro_batch=False).resident_bytes
    expected = [sum(block.gradient_bytes for block in workload.blocks[index + 1 :]) + carried for index in range(5)]
    assert list(first) == expected
    assert later == (workload.gradient_bytes,) * 5


def test_carried_tensors_and_states_are_resident() -> None:
    workload = traced("transformer").workload
    carried = sum(event.delta_bytes for event in workload.blocks[0].discard.memory if event.buffer == "carried")
    assert carried > 0
    assert chain_of_workload(workload, DEVICE, first_micro_batch=True).resident_bytes[-1] == carried
    workload = traced("convolution-net").workload
    states = sum(block.state_bytes for block in workload.blocks)
    assert states > 0
    assert chain_of_workload(workload, DEVICE, first_micro_batch=True).resident_bytes[-1] == states
