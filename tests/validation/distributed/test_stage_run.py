"""Stages run in any order of one direction leave the gradients of the plain module, random numbers included."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from hardware_models.errors import InputError
from simulator.plan import Pipeline
from simulator.sequence import Operation, keep_all, parse_sequence
from simulator.tracing.plan_stages import plan_stages
from simulator.tracing.trace import trace
from simulator.tracing.traced_model import micro_batches
from tests.small_models import BATCH, build, traced
from tests.validation.distributed.in_one_process import gradients_of, order_for, plan_of, play, runs_of
from validation.distributed.pipeline_runtime import layout_of, wire
from validation.distributed.reference import compare, plain_reference

SCHEDULES = [("gpipe", 1), ("1f1b", 1), ("interleaved", 2), ("looped-bfs", 2), ("zb-h1", 1), ("zb-v", 2)]
SPLIT = 3
ROUNDING = 1e-5


@pytest.mark.parametrize(("schedule", "chunks"), SCHEDULES)
@pytest.mark.parametrize(("model", "recompute"), [("residual-mlp", "full"), ("transformer", "none")])
def test_gradients_are_the_plain_modules(model: str, recompute: str, schedule: str, chunks: int) -> None:
    plan = plan_of(schedule, chunks=chunks, recompute=recompute, num_microbatches=SPLIT)
    order = order_for(plan)
    module, inputs = build(model)
    pieces = micro_batches(inputs, BATCH // SPLIT)
    whole = traced(model, SPLIT)
    reference = plain_reference(module, whole, pieces, seed=3)
    assert reference.random_states
    runs = runs_of(module, plan_stages(whole, plan, order), SPLIT)
    for run in runs:
        run.random_states = reference.random_states
    play(order, runs, pieces)
    match = compare(gradients_of(module), reference.gradients)
    assert match.max_rel < ROUNDING
    reordered = schedule == "looped-bfs" or model == "transformer"
    assert (
        match.bitwise or reordered
    )  # a tied table's two parts are summed in another order, as are micro-batches from last to first


def test_buffers_are_left_as_the_plain_step_leaves_them() -> None:
    plan = plan_of("1f1b", recompute="full", num_microbatches=SPLIT)
    module, inputs = build("convolution-net")
    pieces = micro_batches(inputs, BATCH // SPLIT)
    whole = traced("convolution-net", SPLIT)
    before = {name: value.clone() for name, value in module.named_buffers()}
    reference = plain_reference(module, whole, pieces, seed=3)
    assert all(torch.equal(value, before[name]) for name, value in module.named_buffers())
    play(order_for(plan), runs_of(module, plan_stages(whole, plan, order_for(plan)), SPLIT), pieces)
    assert compare(gradients_of(module), reference.gradients).max_rel < ROUNDING
    twin, _ = build("convolution-net")
    for piece in pieces:
        twin(**piece)
    assert all(torch.equal(value, dict(twin.named_buffers())[name]) for name, value in module.named_buffers())


def test_a_gradient_that_is_missing_is_no_match() -> None:
    one = torch.ones(2)
    assert compare({"a": None}, {"a": None}).bitwise
    assert compare({"a": one}, {"a": None}).max_rel == float("inf")
    assert not compare({"a": 2 * one}, {"a": one}).bitwise
    assert compare({"a": 2 * one}, {"a": one}).max_rel == pytest.approx(1.0)


def test_a_message_is_the_memory_of_its_tensor() -> None:
    tensor = torch.randn(3, 4).t()
    assert layout_of(tensor).stride == (1, 4)
    assert wire(tensor).untyped_storage().data_ptr() == tensor.untyped_storage().data_ptr()
    assert wire(tensor).numel() == 48
    part = torch.randn(3, 4)[:, :2]
    layout = layout_of(part)
    assert layout.stride == (2, 1)
    assert torch.equal(layout.fitted(part), part)
    assert layout.fitted(part).untyped_storage().nbytes() == 24


def test_stages_follow_a_sequence_of_the_whole_model() -> None:
    """A nested sequence: the first stage runs its blocks again from their first input, and one of them a third time."""
    sequence = parse_sequence(
        "F_ck 0\nF_e 1\nF_all 2:all\nF_all 3:all\nF_all 4:all\nB 4\nB 3\nB 2\nF_ck 0\nF_all 1:all\nB 1\nF_all 0:all\nB 0\n"
    )
    plan = replace(plan_of("1f1b", num_microbatches=SPLIT), pipeline=Pipeline(schedule="1f1b", partition=(3, 2)))
    order = order_for(plan)
    module, inputs = build("residual-mlp")
    pieces = micro_batches(inputs, BATCH // SPLIT)
    whole = traced("residual-mlp", SPLIT)
    reference = plain_reference(module, whole, pieces, seed=3)
    planned = plan_stages(whole, plan, order, sequence=sequence)
    assert [operation.kind for operation in planned[0].stage.operations].count("F_ck") == 2
    assert planned[1].stage.operations == keep_all(2)
    runs = runs_of(module, planned, SPLIT)
    for run in runs:
        run.random_states = reference.random_states
    play(order, runs, pieces)
    assert compare(gradients_of(module), reference.gradients).bitwise
    with pytest.raises(InputError, match="0 <= block < 5 must hold"):
        plan_stages(whole, plan, order, sequence=[*sequence, Operation("B", 5)])


@pytest.mark.slow
def test_stages_in_bfloat16_are_the_plain_module_under_autocast() -> None:
    plan = plan_of("zb-v", chunks=2, recompute="full", num_microbatches=SPLIT)
    order = order_for(plan)
    module, inputs = build("residual-mlp")
    pieces = micro_batches(inputs, BATCH // SPLIT)
    whole = trace(module, pieces[0], precision="bf16")
    reference = plain_reference(module, whole, pieces, seed=3)
    runs = runs_of(module, plan_stages(whole, plan, order), SPLIT)
    for run in runs:
        run.random_states = reference.random_states
    play(order, runs, pieces)
    assert compare(gradients_of(module), reference.gradients).bitwise
    module.zero_grad()
    exact = plain_reference(module, traced("residual-mlp", SPLIT), pieces, seed=3)
    assert 1e-4 < compare(reference.gradients, exact.gradients).max_rel < 0.1
