"""The same steps on a GPU: gradients of the plain module, less memory, spans on every lane. Not run where there is none."""

from __future__ import annotations

from functools import partial

import pytest
import torch

from simulator.host_schedule import HostShares
from simulator.tracing.traced_model import TracedModel
from tests.small_models import BATCH, build
from tests.small_steps import sequences
from validation.session import ReplaySession

pytestmark = pytest.mark.gpu
REORDERED = 1e-2
"""A GPU adds up in another order where blocks run on their own."""


@pytest.mark.parametrize("precision", ["fp32", "bf16"])
@pytest.mark.parametrize("model", ["residual-mlp", "transformer"])
def test_everything_on_the_host_gives_the_plain_gradients(model: str, precision: str) -> None:
    session = ReplaySession(TracedModel(name=model, factory=partial(build, model)), device="cuda", precision=precision)
    count = len(session.traced(BATCH).workload.blocks)
    shares = HostShares(activations=(1.0,) * count, weights=(1.0,) * count, optimizer=0.5)
    for label, operations in sequences(session.traced(BATCH)).items():
        run = session.scheduled(operations, BATCH, shares)
        (match,) = session.match([(run, BATCH)])[0]
        assert match.max_rel < REORDERED, label
        found = session.peak(run)
        assert found.allocated_bytes < session.peak(session.plain()).allocated_bytes, label
        assert found.host_bytes > 0
        streams = {span.stream.name for span in session.timeline(run).spans}
        assert {"COMPUTE", "H2D", "D2H", "HOST"} <= streams, label
    assert all(
        parameter.device.type == "cuda" and parameter.untyped_storage().nbytes() for parameter in session.module.parameters()
    )
    assert torch.cuda.memory_allocated() > 0
