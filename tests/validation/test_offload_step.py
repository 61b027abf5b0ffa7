"""What lives on the host changes neither loss, gradients, buffers nor random numbers, and memory is as predicted to the byte."""

from __future__ import annotations

from collections import Counter
from functools import cache, partial
from types import MappingProxyType

import pytest
import torch

from hardware_models.errors import InputError, UnknownNameError
from simulator.host_planner import host_schedule
from simulator.host_schedule import HostShares
from simulator.lower import PassPrices, lower
from simulator.lower_host import HostLanes
from simulator.optimizer_states import OPTIMIZER_STATES
from simulator.program import Program, Stream
from simulator.sequence import Operation
from simulator.simulate import static_peak_bytes
from simulator.tracing.traced_model import TracedModel
from tests.small_models import BATCH, build, traced
from tests.small_steps import nested, sequences, unit_times
from validation.measure import SpanRecorder
from validation.session import ReplaySession

LANES = HostLanes(
    to_device_bytes_per_s=1e6, to_host_bytes_per_s=1e6, both_bytes_per_s=2e6, latency_s=0.0, compute_slowdown=1.0, copy_slowdown=1.0,
    update_bytes_per_s=1e6,
)  # fmt: skip
SHARES = MappingProxyType({
    "activations": (1.0, 0.0, 0.0), "some-activations": (0.4, 0.0, 0.0), "weights": (0.0, 1.0, 0.0), "optimizer": (0.0, 0.0, 1.0),
    "weights-updated-there": (0.0, 1.0, 1.0), "everything": (1.0, 1.0, 0.5),
})  # fmt: skip
"""Fractions of activations, weights and optimizer states."""
MODELS = ("residual-mlp", "transformer", "convolution-net", "spectral", "shared-layer", "frozen-middle", "class-token")


def shares_of(name: str, num_blocks: int) -> HostShares:
    activations, weights, optimizer = SHARES[name]
    return HostShares(activations=(activations,) * num_blocks, weights=(weights,) * num_blocks, optimizer=optimizer)


@cache
def session_of(model: str, precision: str = "fp32") -> ReplaySession:
    return ReplaySession(TracedModel(name=model, factory=partial(build, model)), precision=precision)


def program_of(
    model: str, operations: tuple[Operation, ...], shares: HostShares, num_microbatches: int, optimizer: str = "adamw"
) -> Program:
    workload = traced(model, num_microbatches).workload
    host = host_schedule(
        workload, operations, shares, num_microbatches=num_microbatches, optimizer_states=OPTIMIZER_STATES[optimizer]
    )
    return lower(
        workload,
        operations,
        PassPrices(unit_times),
        num_microbatches=num_microbatches,
        optimizer=optimizer,
        host=host,
        lanes=LANES,
    )


MIXED_TOLERANCE = 0.01
"""A CPU's layer norm of bfloat16 with float32 weights keeps its statistics in float32, the fake one in bfloat16."""
FAST = {("residual-mlp", "everything", 3)}
ALL = [
    pytest.param(model, name, splits, marks=() if (model, name, splits) in FAST else pytest.mark.slow)
    for model in MODELS
    for name in SHARES
    for splits in (1, 3)
]


@pytest.mark.parametrize(("model", "name", "num_microbatches"), ALL)
def test_offloading_changes_no_bit_and_memory_is_as_predicted(model: str, name: str, num_microbatches: int) -> None:
    trace_of = traced(model, num_microbatches)
    shares = shares_of(name, len(trace_of.workload.blocks))
    session = session_of(model)
    for label in ("none", "full", "nested"):
        operations = sequences(trace_of)[label]
        run = session.scheduled(operations, BATCH // num_microbatches, shares)
        (matches,) = session.match([(run, BATCH // num_microbatches)])
        assert next(match for match in matches if match.reference == "same micro-batches" or num_microbatches == 1).bitwise, (
            label
        )
        program = program_of(model, operations, shares, num_microbatches)
        assert session.peak(run).allocated_bytes == static_peak_bytes(program), label


@pytest.mark.parametrize(
    ("model", "precision", "dtype"),
    [
        ("residual-mlp", "bf16", "bfloat16"),
        pytest.param("residual-mlp", "pure-bf16", "bfloat16", marks=pytest.mark.slow),
        pytest.param("residual-mlp", "fp8", "bfloat16", marks=pytest.mark.slow),
        pytest.param("residual-mlp", "fp16", "float16", marks=pytest.mark.slow),
        pytest.param("transformer", "bf16", "bfloat16", marks=pytest.mark.slow),
    ],
)
def test_mixed_precision_is_the_modules_own_bitwise_and_memory_is_as_predicted(model: str, precision: str, dtype: str) -> None:
    session = session_of(model, precision)
    workload = session.traced(BATCH).workload
    dtypes = {tensor.dtype for block in workload.blocks for tensor in block.options[0].saved}
    assert dtype in dtypes
    assert workload.loss_scaled == (session.optimizer.loss_scale > 1) == (precision == "fp16")
    shares = shares_of("everything", len(workload.blocks))
    for label, operations in sequences(session.traced(BATCH)).items():
        for chosen in (None, shares):
            run = session.scheduled(operations, BATCH, chosen)
            host = (
                None if chosen is None else host_schedule(workload, operations, chosen, num_microbatches=1, optimizer_states=2)
            )
            program = lower(workload, operations, PassPrices(unit_times), host=host, lanes=LANES)
            assert session.match([(run, BATCH)])[0][0].bitwise, label
            assert session.peak(run).allocated_bytes == pytest.approx(static_peak_bytes(program), rel=MIXED_TOLERANCE), label


def test_pure_bf16_keeps_parameters_gradients_and_states_in_two_bytes() -> None:
    session = session_of("residual-mlp", "pure-bf16")
    run = session.scheduled(sequences(session.traced(BATCH))["full"], BATCH)
    session.peak(run)
    states = [tensor for tensor in session.optimizer.state_tensors if tensor.ndim]
    assert {tensor.dtype for tensor in (*session.module.parameters(), *states, *session.batch.values())} == {torch.bfloat16}
    wide, narrow = traced("residual-mlp").workload, session.traced(BATCH).workload
    assert (narrow.parameter_bytes, narrow.gradient_bytes) == (wide.parameter_bytes // 2, wide.gradient_bytes // 2)
    with pytest.raises(InputError, match=r"precision.master = .bf16.: .* is complex"):
        session_of("spectral", "pure-bf16")


def test_an_unknown_precision_is_named() -> None:
    with pytest.raises(
        UnknownNameError, match=r"precision.compute = 'fp4': unknown name; known are fp32, tf32, bf16, fp16, fp8, int8"
    ):
        session_of("residual-mlp", "fp4").traced(BATCH)


def test_the_host_holds_as_many_bytes_as_predicted() -> None:
    session, trace_of = session_of("residual-mlp"), traced("residual-mlp")
    operations, shares = nested(len(trace_of.workload.blocks)), shares_of("everything", len(trace_of.workload.blocks))
    host = host_schedule(trace_of.workload, operations, shares, num_microbatches=1, optimizer_states=2)
    assert host is not None
    found = session.peak(session.scheduled(operations, BATCH, shares)).host_bytes
    step_counts = 4 * sum(len(members) for members in host.hosted)
    assert found == host.host_bytes + step_counts


def test_a_measured_step_has_a_span_for_each_errand() -> None:
    session, trace_of = session_of("residual-mlp"), traced("residual-mlp")
    shares = shares_of("everything", len(trace_of.workload.blocks))
    operations = sequences(trace_of)["none"]
    program = program_of("residual-mlp", operations, shares, 1)
    timeline = session.timeline(session.scheduled(operations, BATCH, shares))
    assert Counter(span.stream for span in timeline.spans) == Counter(
        Stream(stream) for stream, label in zip(program.stream, program.option, strict=True) if label != "end"
    )


class StoppedError(Exception):
    """What goes wrong."""


class FailingRecorder(SpanRecorder):
    """Stops a step after some operations."""

    left = 3

    def end(self, operation: Operation, micro_batch: int) -> None:
        """Counts down."""
        super().end(operation, micro_batch)
        self.left -= 1
        if not self.left:
            raise StoppedError


@pytest.mark.parametrize("last", [1, 5, 8])
@pytest.mark.parametrize("model", ["residual-mlp", pytest.param("convolution-net", marks=pytest.mark.slow)])
def test_a_step_that_fails_leaves_the_module_as_it_was(model: str, last: int) -> None:
    session, trace_of = session_of(model), traced(model)
    shares = shares_of("everything", len(trace_of.workload.blocks))
    run = session.scheduled(sequences(trace_of)["none"][: 2 * len(trace_of.workload.blocks)], BATCH, shares)
    before = {name: value.detach().clone() for name, value in session.module.state_dict().items()}
    kept = next(session.module.parameters())
    kept.grad = gradient = torch.ones_like(kept)
    random = torch.get_rng_state()
    recorder = FailingRecorder(run.lanes)
    recorder.left = last
    with pytest.raises(StoppedError), run.inside():
        run(recorder)
    after = session.module.state_dict()
    assert all(torch.equal(after[name], value) for name, value in before.items())
    assert all(value.untyped_storage().nbytes() for value in after.values())
    assert kept.grad is gradient
    assert torch.equal(torch.get_rng_state(), random)
    kept.grad = None
    assert session.match([(run, BATCH)])[0][0].bitwise, "and it can be run again"


def test_parameters_that_share_their_memory_cannot_travel() -> None:
    module, inputs = build("residual-mlp")
    layer = module.get_submodule("layers.0.up")
    layer.weight = torch.nn.Parameter(torch.randn(200, 48)[:96])
    session = ReplaySession(TracedModel(name="views", factory=lambda: (module, inputs)))
    count = len(session.traced(BATCH).workload.blocks)
    with pytest.raises(
        InputError,
        match="a parameter that lives on the host has memory of its own, but its storage holds 38400 bytes, not 18432",
    ):
        session.scheduled(sequences(session.traced(BATCH))["none"], BATCH, shares_of("weights", count))
