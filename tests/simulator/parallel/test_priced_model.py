"""Plans of one split share their priced model, and nothing that differs is shared."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster_file import load_cluster
from simulator.model_source import model_source
from simulator.parallel.orders import order_of
from simulator.parallel.priced_model import priced_model
from simulator.parallel.simulate_parallel import simulate_parallel
from simulator.plan import Batch, Memory, Parallel, Plan, Precision, Runtime
from simulator.presets import TransformerConfig

PLAN = Plan(
    parallel=Parallel(tp=2, pp=2, dp=2, sequence_parallel=True), batch=Batch(global_batch=8, micro_batch=1, seq_len=256), precision=Precision(compute="bf16")
)  # fmt: skip
CLUSTER = load_cluster("dgx-a100-80gb").with_gpus(8)
DEVICE = load_hardware(CLUSTER.device)


@pytest.fixture(scope="module")
def config() -> TransformerConfig:
    found = model_source("gpt2", device=DEVICE).config
    assert found is not None
    return found


def test_degrees_that_do_not_touch_a_layer_share_it(config: TransformerConfig) -> None:
    own = priced_model(config, PLAN, DEVICE, seq_len=256)
    wider = replace(PLAN, parallel=replace(PLAN.parallel, pp=4, dp=1), memory=Memory(zero_stage=1))
    assert priced_model(config, wider, DEVICE, seq_len=256) is own


@pytest.mark.parametrize(
    "changed",
    [
        replace(PLAN, batch=replace(PLAN.batch, micro_batch=2)),
        replace(PLAN, parallel=replace(PLAN.parallel, sequence_parallel=False)),
        replace(PLAN, precision=Precision(compute="fp16")),
        replace(PLAN, runtime=Runtime(framework="megatron-core")),
        replace(PLAN, memory=Memory(recompute="selective")),
    ],
)
def test_what_changes_a_layer_is_not_shared(config: TransformerConfig, changed: Plan) -> None:
    assert priced_model(config, changed, DEVICE, seq_len=256) is not priced_model(config, PLAN, DEVICE, seq_len=256)


def test_another_device_of_the_same_name_is_not_shared(config: TransformerConfig) -> None:
    faster = DEVICE.changed(memory_bandwidth_bytes_per_s=2.0 * DEVICE.memory_bandwidth_bytes_per_s)
    order = order_of(PLAN)
    slow, fast = (simulate_parallel(config, PLAN, CLUSTER, own, order, seq_len=256).step_time_s for own in (DEVICE, faster))
    again = simulate_parallel(config, PLAN, CLUSTER, DEVICE, order, seq_len=256).step_time_s
    assert fast < slow == again
