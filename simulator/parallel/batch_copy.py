"""The batch's way to the devices: samples to the first pipeline stage, labels to the last one."""

from __future__ import annotations

from hardware_models.network.cluster import Cluster
from simulator.pipeline.action import Order

_LATENCY_S = 1e-5
"""Of one copy from pinned memory: 10 us, the order of magnitude that copies of a few bytes take (the device profiles' ``copy_engine.latency_s``, 6 to 12 us)."""


def copy_seconds(order: Order, cluster: Cluster, batch_bytes: int) -> tuple[float, ...]:
    """Seconds, per pipeline rank, that the copy of the first micro-batch's inputs takes before the rank's first pass; 0 where a rank takes none.

    **Model**: bytes over the host link, and a latency. The copies of later micro-batches are asked for ahead and run beside compute on a copy engine.

    **Not modelled**: reading and decoding by the loader's processes; that copies beside compute take longer than it.

    Args:
        order: which ranks hold the first and the last stage.
        cluster: its host link.
        batch_bytes: of one micro-batch, inputs and labels; each end is taken to need all of it.
    """
    one_s = _LATENCY_S + batch_bytes / cluster.fabric.host_link.achieved_bytes_per_s.value
    ends = {0, order.num_stages - 1}
    return tuple(one_s if ends & set(stages) else 0.0 for stages in order.stages_of_rank)
