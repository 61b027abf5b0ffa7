"""A scheduled step is the plain step: loss, gradients, buffers and random numbers bitwise, memory as predicted."""

from __future__ import annotations

from functools import cache
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from simulator.sequence import Operation, check_sequence, keep_all
from simulator.simulate import static_peak_bytes
from simulator.tracing.trace import Traced, trace
from simulator.tracing.traced_model import micro_batches
from tests.small_models import BATCH, SMALL_MODELS, CachedAttribute, build, traced
from tests.small_steps import measured_step, nested, plain_step, program_of, sequences
from validation.run_step import ScheduledStep

MEMORY_TOLERANCE = 1e-3
SPLITS = (1, 3)
SOME = {1: ("none", "nested"), 3: ("selective", "mixed")}
"""Sequences at each split for the models whose trait lies elsewhere."""
ALL_SEQUENCES = (
    "residual-mlp",
    "convolution-net",
    "transformer",
    "own-function",
    "no-grad-region",
    "skip-over-everything",
    "spectral",
)
SEED = 5

Result = tuple[Tensor, dict[str, Tensor | None], dict[str, Tensor], Tensor]


def outcome(module: nn.Module, loss: Tensor) -> Result:
    """Loss, gradients, buffers and the generator's state after a step."""
    gradients = {name: value.grad for name, value in module.named_parameters()}
    return loss, gradients, dict(module.named_buffers()), torch.get_rng_state()


def chosen(name: str, num_microbatches: int) -> dict[str, tuple[Operation, ...]]:
    found = sequences(traced(name, num_microbatches))
    return found if name in ALL_SEQUENCES else {label: found[label] for label in SOME[num_microbatches]}


@cache
def plain(name: str, num_microbatches: int) -> Result:
    module, inputs = build(name)
    torch.manual_seed(SEED)
    return outcome(module, plain_step(module, micro_batches(inputs, BATCH // num_microbatches)))


def scheduled(module: nn.Module, inputs: Any, trace_of: Traced, operations: Any, num_microbatches: int = 1) -> Result:
    torch.manual_seed(SEED)
    step = ScheduledStep(module=module, traced=trace_of, operations=tuple(operations))
    return outcome(module, step(micro_batches(inputs, BATCH // num_microbatches)))


def assert_bitwise(found: Result, expected: Result) -> None:
    assert torch.equal(found[0], expected[0]), f"loss {found[0]} != {expected[0]}"
    for kind, mine, theirs in (("gradient", found[1], expected[1]), ("buffer", found[2], expected[2])):
        assert mine.keys() == theirs.keys()
        for name, value in theirs.items():
            own = mine[name]
            assert (own is None) == (value is None), f"{kind} of {name}"
            assert own is None or value is None or torch.equal(own, value), f"{kind} of {name} differs"
    assert torch.equal(found[3], expected[3]), "the generator drew another number of times"


@pytest.mark.parametrize("num_microbatches", SPLITS)
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_a_scheduled_step_is_the_plain_step_bitwise(name: str, num_microbatches: int) -> None:
    trace_of = traced(name, num_microbatches)
    for operations in chosen(name, num_microbatches).values():
        module, inputs = build(name)
        assert_bitwise(scheduled(module, inputs, trace_of, operations, num_microbatches), plain(name, num_microbatches))


@pytest.mark.parametrize("num_microbatches", SPLITS)
@pytest.mark.parametrize("name", SMALL_MODELS)
def test_memory_is_as_predicted_and_returns_to_the_resident_level(name: str, num_microbatches: int) -> None:
    trace_of = traced(name, num_microbatches)
    for label, operations in chosen(name, num_microbatches).items():
        module, inputs = build(name)
        measured = measured_step(module, trace_of, operations, micro_batches(inputs, BATCH // num_microbatches))
        program = program_of(trace_of, operations, num_microbatches)
        assert static_peak_bytes(program) == pytest.approx(measured.peak_bytes, rel=MEMORY_TOLERANCE), label
        assert sum(program.resident_bytes[0]) == measured.before_bytes == measured.after_bytes, label
        assert int(program.memory_bytes.sum()) == 0, label


@pytest.mark.parametrize("name", ["unused-parameter", "transformer", "spectral"])
def test_memory_with_an_optimizer_without_states(name: str) -> None:
    trace_of = traced(name, 3)
    module, inputs = build(name)
    operations = sequences(trace_of)["mixed"]
    measured = measured_step(module, trace_of, operations, micro_batches(inputs, BATCH // 3), optimizer_name="sgd")
    program = program_of(trace_of, operations, 3, optimizer="sgd")
    assert static_peak_bytes(program) == pytest.approx(measured.peak_bytes, rel=MEMORY_TOLERANCE)
    assert sum(program.resident_bytes[0]) == measured.before_bytes


def test_recompute_lowers_the_measured_peak() -> None:
    trace_of = traced("residual-mlp")
    peaks = {}
    for label, operations in sequences(trace_of).items():
        module, inputs = build("residual-mlp")
        peaks[label] = measured_step(module, trace_of, operations, [inputs]).peak_bytes
    assert peaks["nested"] < peaks["full"] < peaks["mixed"] < peaks["none"]
    assert peaks["selective"] < peaks["none"]


def test_sequences_of_the_tests_are_legal_and_nested_runs_blocks_often() -> None:
    operations = nested(8)
    check_sequence(operations, 8)
    runs = [sum(one.block == block and one.kind != "B" for one in operations) for block in range(8)]
    assert runs == [4, 3, 3, 2, 3, 2, 2, 1]


def test_a_batch_that_is_split_differs_from_the_whole_for_a_model_that_mixes_samples() -> None:
    whole, split = plain("convolution-net", 1), plain("convolution-net", 3)
    assert not torch.equal(whole[0], split[0])
    counts = [result[2]["layers.0.norm.num_batches_tracked"].item() for result in (whole, split)]
    assert counts == [1, 3]


def test_against_the_unsplit_module_without_dropout() -> None:
    for num_microbatches in (2, 6):
        module, inputs = build("eval-mlp")
        found = scheduled(module, inputs, traced("eval-mlp", num_microbatches), keep_all(5), num_microbatches)
        expected = plain("eval-mlp", 1)
        torch.testing.assert_close(found[0], expected[0], rtol=1e-5, atol=0)
        for name, value in expected[1].items():
            assert value is not None
            own = found[1][name]
            assert own is not None
            assert ((own - value).norm() / value.norm()).item() < 1e-5, name


def test_gradients_of_earlier_steps_are_added_to() -> None:
    trace_of = traced("eval-mlp")
    module, inputs = build("eval-mlp")
    step = ScheduledStep(module=module, traced=trace_of, operations=sequences(trace_of)["full"])
    reference, _ = build("eval-mlp")
    for _ in range(2):
        step([inputs])
        plain_step(reference, [inputs])
    assert all(
        torch.equal(one.grad, other.grad)  # type: ignore[arg-type]
        for one, other in zip(module.parameters(), reference.parameters(), strict=True)
    )


class Told:
    """Writes down what a step tells."""

    def __init__(self) -> None:
        self.begun, self.ended = 0, list[tuple[Operation, int]]()

    def begin(self) -> None:
        """Counts."""
        assert self.begun == len(self.ended)
        self.begun += 1

    def end(self, operation: Operation, micro_batch: int) -> None:
        """Keeps it."""
        self.ended.append((operation, micro_batch))


def test_each_operation_is_told_in_order() -> None:
    trace_of = traced("residual-mlp", 3)
    module, inputs = build("residual-mlp")
    told = Told()
    operations = sequences(trace_of)["nested"]
    ScheduledStep(module=module, traced=trace_of, operations=operations)(micro_batches(inputs, BATCH // 3), told)
    assert told.ended == [(operation, number) for number in range(3) for operation in operations]
    assert told.begun == len(told.ended)


def test_other_weights_and_inputs_than_those_traced() -> None:
    """The chain holds the computation, not the values."""
    trace_of = traced("transformer")
    module, inputs = build("transformer")
    torch.manual_seed(9)
    with torch.no_grad():
        for value in module.parameters():
            value.add_(torch.randn_like(value) * 0.1)
    inputs = {key: value.roll(1, 1) for key, value in inputs.items()}
    reference, _ = build("transformer")
    reference.load_state_dict(module.state_dict())
    torch.manual_seed(SEED)
    expected = outcome(reference, plain_step(reference, [inputs]))
    assert_bitwise(scheduled(module, inputs, trace_of, sequences(trace_of)["mixed"]), expected)


def test_a_cache_that_was_filled_before_the_trace() -> None:
    torch.manual_seed(0)
    module, reference = CachedAttribute(), CachedAttribute()
    reference.load_state_dict(module.state_dict())
    _, inputs = build("cached-attribute")
    module(**inputs)
    trace_of = trace(module, inputs)
    torch.manual_seed(SEED)
    expected = outcome(reference, plain_step(reference, [inputs]))
    assert_bitwise(scheduled(module, inputs, trace_of, sequences(trace_of)["nested"]), expected)


def library_model(name: str) -> tuple[nn.Module, dict[str, Tensor]]:
    """A real network at a small size, built by the library that users take it from."""
    torch.manual_seed(0)
    tokens = torch.randint(0, 97, (BATCH, 16))
    if name == "gpt2":
        import transformers

        config = transformers.GPT2Config(
            n_layer=2, n_embd=64, n_head=4, vocab_size=97, n_positions=32, bos_token_id=0, eos_token_id=0, use_cache=False
        )
        return transformers.GPT2LMHeadModel(config).train(), {"input_ids": tokens, "labels": tokens.clone()}
    if name == "llama":
        import transformers

        llama = transformers.LlamaConfig(
            num_hidden_layers=2, hidden_size=64, num_attention_heads=4, num_key_value_heads=2, intermediate_size=96, vocab_size=97,
            use_cache=False,
        )  # fmt: skip
        return transformers.LlamaForCausalLM(llama).train(), {"input_ids": tokens, "labels": tokens.clone()}
    import neuralop

    network = neuralop.models.FNO(n_modes=(6, 6), in_channels=1, out_channels=1, hidden_channels=16, n_layers=2)
    return network.train(), {"x": torch.randn(BATCH, 1, 16, 16)}


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("num_microbatches", SPLITS)
@pytest.mark.parametrize("name", ["gpt2", "llama", "fno"])
def test_networks_of_libraries(name: str, num_microbatches: int) -> None:
    module, inputs = library_model(name)
    parts = micro_batches(inputs, BATCH // num_microbatches)
    trace_of = trace(module, parts[0], name=name)
    assert len(trace_of.workload.blocks) > 2
    torch.manual_seed(SEED)
    expected = outcome(module, plain_step(module, parts))
    for label, operations in sequences(trace_of).items():
        module, inputs = library_model(name)
        assert_bitwise(scheduled(module, inputs, trace_of, operations, num_microbatches), expected)
        module.zero_grad()
        measured = measured_step(module, trace_of, operations, micro_batches(inputs, BATCH // num_microbatches))
        predicted = static_peak_bytes(program_of(trace_of, operations, num_microbatches))
        assert predicted == pytest.approx(measured.peak_bytes, rel=MEMORY_TOLERANCE), label
