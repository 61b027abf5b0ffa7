"""Chrome traces: what Perfetto needs is there, in microseconds and bytes."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster_file import load_cluster
from simulator.chrome_trace import trace_events, write_chrome_trace
from simulator.parallel.orders import order_of
from simulator.parallel.simulate_parallel import simulate_parallel
from simulator.plan import Batch, Parallel, Plan, Precision, Runtime
from simulator.presets import preset
from simulator.program import Kind, MemoryClass, Stream
from simulator.timeline import MemoryProfile, Message, Span, Timeline


def span(start_s: float, end_s: float, *, device: int = 0, stream: Stream = Stream.COMPUTE, kind: Kind = Kind.FORWARD) -> Span:
    return Span(device=device, stream=stream, kind=kind, name="F1 mb0", micro_batch=0, block=1, start_s=start_s, end_s=end_s)


PREDICTED = (
    Timeline(spans=(span(0.0, 0.5), span(0.5, 2.0, stream=Stream.D2H), span(0.5, 1.0, device=1, kind=Kind.BACKWARD))),
    (
        MemoryProfile(
            device=0, time_s=np.array([0.0, 0.5]), alive_bytes=np.array([[1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 0, 0, 7]])
        ),
        MemoryProfile(device=1, time_s=np.array([0.0]), alive_bytes=np.zeros((1, len(MemoryClass)), dtype=np.int64)),
    ),
)
MEASURED = (Timeline(spans=(span(0.0, 0.75),)), (MemoryProfile(device=0, time_s=np.array([0.0]), alive_bytes=np.array([[7]])),))


def test_a_process_for_each_run_and_device_and_a_thread_for_each_stream() -> None:
    events = trace_events({"predicted": PREDICTED, "measured": MEASURED})
    named = [event for event in events if event["ph"] == "M"]
    processes = {event["pid"]: event["args"]["name"] for event in named if event["name"] == "process_name"}
    assert processes == {0: "predicted: device 0", 1: "predicted: device 1", 2: "measured: device 0"}
    threads = {(event["pid"], event["tid"]): event["args"]["name"] for event in named if event["name"] == "thread_name"}
    assert threads == {(0, 0): "compute", (0, 2): "d2h", (1, 0): "compute", (2, 0): "compute"}


def test_spans_are_complete_events_in_microseconds() -> None:
    events = trace_events({"predicted": PREDICTED})
    spans = [event for event in events if event["ph"] == "X"]
    assert [(one["pid"], one["tid"], one["ts"], one["dur"], one["cat"]) for one in spans] == [
        (0, 0, 0.0, 0.5e6, "forward"), (0, 2, 0.5e6, 1.5e6, "forward"), (1, 0, 0.5e6, 0.5e6, "backward"),
    ]  # fmt: skip
    assert spans[0]["args"] == {"block": 1, "micro_batch": 0}


def test_memory_is_a_counter_in_bytes_by_class() -> None:
    events = trace_events({"predicted": PREDICTED, "measured": MEASURED})
    counters = [event for event in events if event["ph"] == "C"]
    assert counters[1]["ts"] == 0.5e6
    assert counters[0]["args"] == {
        "parameters": 1, "gradients": 2, "optimizer_states": 3, "batch": 4, "activations": 5, "transient": 6, "framework": 7,
    }  # fmt: skip
    assert counters[-1]["args"] == {"all": 7}


def test_a_message_is_an_arrow_from_its_transfer_to_what_waits_for_it() -> None:
    sent, awaited_by = span(0.5, 1.0, stream=Stream.SEND, kind=Kind.TRANSFER), span(1.0, 2.0, device=1)
    timeline = Timeline(spans=(sent, awaited_by), messages=(Message(sent=sent, awaited_by=awaited_by),))
    flows = [event for event in trace_events({"one": (timeline, ()), "other": (timeline, ())}) if event["ph"] in "sf"]
    assert [(one["ph"], one["id"], one["pid"], one["tid"], one["ts"]) for one in flows] == [
        ("s", 0, 0, 8, 0.5e6), ("f", 0, 1, 0, 1e6), ("s", 1, 2, 8, 0.5e6), ("f", 1, 3, 0, 1e6),
    ]  # fmt: skip
    assert [one.get("bp") for one in flows] == [None, "e", None, "e"]


def test_a_step_over_a_cluster_has_streams_messages_and_memory_of_each_rank() -> None:
    plan = Plan(
        parallel=Parallel(tp=8, pp=2), batch=Batch(global_batch=3, micro_batch=1), precision=Precision(compute="bf16"), runtime=Runtime(framework="megatron-core")
    )  # fmt: skip
    cluster = load_cluster("selene").with_gpus(plan.num_gpus)
    step = simulate_parallel(
        preset("megatron-22b"), plan, cluster, load_hardware(cluster.device), order_of(plan), seq_len=2048
    )  # fmt: skip
    events = json.loads(json.dumps(trace_events({"predicted": (step.timeline, step.profiles)})))
    spans = {(one["pid"], one["tid"], one["ts"]) for one in events if one["ph"] == "X"}
    flows = {phase: {one["id"]: one for one in events if one["ph"] == phase} for phase in "sf"}
    assert {one["pid"] for one in events if one["ph"] == "C"} == {pid for pid, _, _ in spans} == {0, 1}
    assert {tid for _, tid, _ in spans} >= {Stream.COMPUTE, Stream.TP, Stream.SEND}
    assert flows["s"].keys() == flows["f"].keys()
    sends = {(one["pid"], one["ts"]) for one in flows["s"].values() if one["tid"] == Stream.SEND}
    assert len(sends) == 2 * plan.num_microbatches  # activations one way, gradients the other
    for number, start in flows["s"].items():
        end = flows["f"][number]
        assert start["pid"] != end["pid"]
        assert start["ts"] < end["ts"]
        assert {(one["pid"], one["tid"], one["ts"]) for one in (start, end)} <= spans


def test_the_file_is_json(tmp_path: Path) -> None:
    write_chrome_trace(tmp_path / "trace.json", {"predicted": PREDICTED})
    document = json.loads((tmp_path / "trace.json").read_text())
    assert document["traceEvents"] == trace_events({"predicted": PREDICTED})
