"""Blocks run for real: what a graph holds, repeated runs that change nothing twice, and failures that leave the module usable."""

from __future__ import annotations

import gc
import weakref
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

from simulator.sequence import runs_twice
from simulator.tracing.block_run import MicroBatch
from simulator.tracing.trace import Traced
from tests.small_models import build, traced
from tests.small_steps import plain_step, sequences
from validation.run_step import ScheduledStep


def micro_batch(module: Any, inputs: Any, trace_of: Traced, rerun: tuple[int, ...] = ()) -> MicroBatch:
    return MicroBatch(
        parameters=dict(module.named_parameters()), buffers=dict(module.named_buffers()), inputs=inputs, shared=trace_of.shared,
        rerun=frozenset(trace_of.chain.blocks[index].name for index in rerun),
    )  # fmt: skip


def test_a_graph_keeps_its_input_only_where_an_operator_saved_it() -> None:
    module, inputs = build("residual-mlp")
    trace_of = traced("residual-mlp")
    run = micro_batch(module, inputs, trace_of)
    y, _tape = run.save(trace_of.chain.blocks[0], None, "all")
    z, _kept = run.save(trace_of.chain.blocks[1], y, "all")
    held, gone = weakref.ref(y.untyped_storage()), weakref.ref(z.untyped_storage())
    del y, z
    gc.collect()
    assert held() is not None, "layer norm saved it"
    assert gone() is None, "an addition saves nothing"


def test_a_forward_pass_without_a_graph_needs_no_gradient() -> None:
    module, inputs = build("residual-mlp")
    trace_of = traced("residual-mlp")
    y = micro_batch(module, inputs, trace_of).discard(trace_of.chain.blocks[0], None)
    assert not y.requires_grad
    assert torch.equal(y, module.first(inputs["x"]))


def test_running_statistics_and_random_numbers_repeat_in_a_second_run() -> None:
    module, inputs = build("convolution-net")
    trace_of = traced("convolution-net")
    stem, layer = trace_of.chain.blocks[:2]
    run = micro_batch(module, inputs, trace_of, rerun=(1,))
    x = run.discard(stem, None)
    first = run.discard(layer, x)
    once = {name: value.clone() for name, value in module.named_buffers()}
    again, _ = run.save(layer, x, "all")
    assert torch.equal(first, again)
    assert all(torch.equal(value, once[name]) for name, value in module.named_buffers())
    assert module.layers[0].norm.num_batches_tracked.item() == 1

    module, inputs = build("residual-mlp")
    trace_of = traced("residual-mlp")
    run = micro_batch(module, inputs, trace_of, rerun=(1,))
    x = run.discard(trace_of.chain.blocks[0], None)
    first = run.discard(trace_of.chain.blocks[1], x)
    state = torch.get_rng_state()
    assert torch.equal(first, run.save(trace_of.chain.blocks[1], x, "selective")[0])
    assert torch.equal(state, torch.get_rng_state())
    other = micro_batch(module, inputs, trace_of)
    assert not torch.equal(first, other.discard(trace_of.chain.blocks[1], x)), "dropout draws anew where nothing repeats"


def test_a_block_hands_on_gradients_and_lets_go_of_its_tape() -> None:
    module, inputs = build("residual-mlp")
    trace_of = traced("residual-mlp")
    run = micro_batch(module, inputs, trace_of)
    x = torch.randn_like(run.discard(trace_of.chain.blocks[0], None))
    y, tape = run.save(trace_of.chain.blocks[1], x, "all")
    grad = run.backward(tape, torch.ones_like(y))
    assert grad is not None
    assert grad.shape == x.shape
    assert not tape.inbox
    assert module.layers[0].up.weight.grad is not None
    assert module.layers[1].up.weight.grad is None
    _, tape = run.save(trace_of.chain.blocks[0], None, "all")
    assert run.backward(tape, grad) is None, "the batch gets no gradient"


def test_shared_gradients_are_summed_before_they_meet_the_parameters() -> None:
    module, inputs = build("shared-layer")
    trace_of = traced("shared-layer")
    run = micro_batch(module, inputs, trace_of)
    block = trace_of.chain.blocks[1]
    x = run.discard(trace_of.chain.blocks[0], None)
    for _ in range(2):
        y, tape = run.save(block, x, "all")
        run.backward(tape, torch.ones_like(y))
    weight = module.shared.weight
    assert weight.grad is None
    total = run.aliases["shared.weight"].grad
    run.finish()
    assert weight.grad is total
    run = micro_batch(module, inputs, trace_of)
    y, tape = run.save(block, x, "all")
    run.backward(tape, torch.ones_like(y))
    before = weight.grad.clone()
    run.finish()
    torch.testing.assert_close(weight.grad, before * 1.5)
    assert not run.aliases


class StopError(RuntimeError):
    """Raised in the middle of a step."""


def fail_in(trace_of: Traced, index: int, run_number: int) -> Traced:
    """The same chain, one block of which raises after its operators in its n-th run."""
    block = trace_of.chain.blocks[index]
    calls = []

    def graph(*arguments: Any) -> Any:
        calls.append(1)
        result = block.graph(*arguments)
        if len(calls) == run_number:
            raise StopError
        return result

    blocks = list(trace_of.chain.blocks)
    blocks[index] = replace(block, graph=graph)
    return replace(trace_of, chain=replace(trace_of.chain, blocks=tuple(blocks)))


def states(module: torch.nn.Module) -> dict[str, Tensor]:
    return {name: value.detach().clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("name", ["convolution-net", "residual-mlp", "transformer"])
@pytest.mark.parametrize("run_number", [1, 2])
def test_a_failure_in_the_middle_leaves_the_module_usable(name: str, run_number: int) -> None:
    trace_of = traced(name)
    operations = sequences(trace_of)["full"]
    assert 2 in runs_twice(operations)
    module, inputs = build(name)
    hooks = [(len(part._forward_hooks), len(part._backward_hooks), part.training) for part in module.modules()]
    with pytest.raises(StopError):
        ScheduledStep(module=module, traced=fail_in(trace_of, 2, run_number), operations=operations)([inputs])
    assert [(len(part._forward_hooks), len(part._backward_hooks), part.training) for part in module.modules()] == hooks
    assert all(value.requires_grad and value.is_leaf for value in module.parameters())
    if run_number == 2:
        reference, _ = build(name)
        torch.manual_seed(0)
        reference(**inputs)
        expected, found = states(reference), states(module)
        assert all(torch.equal(value, found[key]) for key, value in expected.items()), "each statistic is updated once"
    module.zero_grad()
    fresh, _ = build(name)
    fresh.load_state_dict(module.state_dict())
    torch.manual_seed(3)
    expected_loss = plain_step(fresh, [inputs])
    torch.manual_seed(3)
    loss = ScheduledStep(module=module, traced=trace_of, operations=operations)([inputs])
    assert torch.equal(loss, expected_loss)
    assert all(
        torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
        for one, other in zip(module.parameters(), fresh.parameters(), strict=True)
    )


def test_random_state_is_the_present_one_after_a_failed_second_run() -> None:
    trace_of = traced("residual-mlp")
    module, inputs = build("residual-mlp")
    torch.manual_seed(1)
    reference, _ = build("residual-mlp")
    torch.manual_seed(1)
    reference(**inputs)
    after = torch.get_rng_state()
    torch.manual_seed(1)
    with pytest.raises(StopError):
        ScheduledStep(module=module, traced=fail_in(trace_of, 2, 2), operations=sequences(trace_of)["full"])([inputs])
    assert torch.equal(after, torch.get_rng_state())
