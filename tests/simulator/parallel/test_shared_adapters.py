"""Gradients and messages on one adapter, by hand; which collectives leave a node."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.network.cluster_file import load_cluster
from simulator import engine_compiled, engine_simpy
from simulator.parallel.communication import Exposed, StageCommunication
from simulator.parallel.gradient_sync import GradientSync
from simulator.parallel.mesh import mesh_of
from simulator.parallel.orders import order_of
from simulator.parallel.shared_adapters import crossing_streams, on_adapters
from simulator.parallel.template import Link, TemplateWriter
from simulator.program import Kind, Stream
from tests.simulator.parallel.step_cases import lowered, parts_of, plan_of

RATE = 50.0


def test_a_collective_alone_takes_as_long_as_before() -> None:
    writer = TemplateWriter()
    writer.issue(Kind.FORWARD, Stream.COMPUTE, 3.0)
    writer.issue(Kind.TRANSFER, Stream.TP, 1.0)
    writer.issue(Kind.TRANSFER, Stream.DP, 2.0, label="reduce")
    writer.issue(Kind.TRANSFER, Stream.DP, 0.0, label="reduced")
    before = writer.template()
    after = on_adapters(before, {Stream.DP}, RATE)
    assert after.instructions[:2] == before.instructions[:2]
    assert after.instructions[3] == before.instructions[3]
    flow = after.instructions[2]
    assert (flow.duration_s, flow.transfer, flow.label) == (0.0, (100.0, RATE, (Link.OUT, Link.INTO_OWN)), "reduce")


@pytest.mark.parametrize(("shared", "expected_s"), [(False, 26.0), (True, 28.0)])
@pytest.mark.parametrize("engine", [engine_compiled, engine_simpy])
def test_gradients_and_a_message_halve_each_others_rate(engine: object, shared: bool, expected_s: float) -> None:
    """Forward 3, message 2, forward 3, backward 7; then the gradient's message and the sum of gradients, 2 each alone, both on the last rank's adapter: 4 together; backward 7, sum 2."""
    order = order_of(plan_of(pp=2, num_microbatches=1))
    sync = GradientSync(chunks=1, reduce_s=2.0, gather_s=0.0)
    sent = StageCommunication(forward=Exposed(), backward=Exposed(), message_bytes=100.0)
    parts = parts_of(order, communication=[sent] * 2, sync=[sync] * 2, rate=RATE)
    program = lowered(replace(parts, adapter_streams=frozenset({Stream.DP} if shared else ())))
    timeline, _ = engine.run(program)  # type: ignore[attr-defined]
    assert max(span.end_s for span in timeline.spans) == pytest.approx(expected_s, rel=1e-12)


@pytest.mark.parametrize(
    ("tp", "dp", "pp", "expected"),
    [(8, 4, 4, {Stream.DP}), (8, 4, 1, set()), (2, 4, 4, set()), (1, 2, 4, set()), (2, 16, 2, {Stream.DP})],
)
def test_what_leaves_the_node_beside_messages(tp: int, dp: int, pp: int, expected: set[Stream]) -> None:
    plan = plan_of(tp=tp, dp=dp, pp=pp)
    mesh = mesh_of(plan, load_cluster("selene").with_gpus(tp * dp * pp))
    assert crossing_streams(mesh) == expected
