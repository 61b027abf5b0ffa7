"""Bounds of points before any simulation: no plan of a point takes less time than these say, whatever it recomputes or offloads and however its layers are cut.

**Model.** Rank r cannot begin before the first micro-batch has passed all stages before its first one; it is busy for all of its passes; after its last full backward pass the
gradient still travels back through all stages before the nearest of its own, and the rank's optimizer steps. Where weight gradients are passes of their own, a rank may end
with these, so either they or the way back counts.

    T >= max_r( start_r + m (F_r + B_r) + max(back_r, tail_r) )                           full backward passes
    T >= max_r( start_r + max(m (F_r + B_r) + tail_r, m (F_r + B_r - W_r) + back_r) )     split ones

The least over all cuts: for one chunk a rank, each stage in turn takes as many pieces as a time allows (more pieces behind a stage never make the next one's share smaller), and
that time is halved; for several chunks, and for stages on two ranks, the mean over ranks counts, and one micro-batch's way through all stages.

**Not counted**: gradients between replicas, parameters that are gathered, waiting for messages, slow-down under overlap, the host, memory. All of these only add.
"""

from __future__ import annotations

from dataclasses import dataclass

from search.joint.bounds_kernels import least_over_cuts
from search.joint.layer_tables import LayerTable

SPLIT = frozenset({"zb-h1", "zb-h2", "zb-1p", "zb-2p", "zb-v", "v-half", "v-min", "dualpipe", "dualpipe-v"})
"""Schedules with weight gradients as passes of their own."""
TWO_WAYS = frozenset({"chimera", "dualpipe"})
"""Schedules that keep each stage on two ranks, each for half of the micro-batches."""
VEES = frozenset({"zb-v", "v-half", "v-min", "dualpipe-v"})
"""Schedules whose second chunk comes back the way of the first."""


@dataclass(frozen=True, slots=True, kw_only=True)
class PipelineShape:
    """What of a pipeline a time bound depends on."""

    schedule: str
    num_ranks: int
    chunks: int
    """Of a rank."""
    num_microbatches: int


def time_bound(table: LayerTable, shape: PipelineShape, *, message_s: float, update_s: float) -> float:
    """Seconds that no step is below, however the layers are cut into stages (module docstring).

    Args:
        table: of the layers.
        shape: of the pipeline.
        message_s: from one rank to the next.
        update_s: of the optimizer, for each parameter.
    """
    split, share = shape.schedule in SPLIT, float(shape.num_microbatches)
    whole_s = table.forward_s + table.backward_s
    returned_s = table.backward_s - table.weight_s if split else table.backward_s
    tail_s = update_s * table.elements
    if shape.schedule not in TWO_WAYS and shape.chunks == 1:
        columns = (table.forward_s, returned_s, whole_s, table.weight_s, tail_s)
        return float(least_over_cuts(*columns, share, message_s, shape.num_ranks, split))
    one_s = float(table.forward_s[-1] + returned_s[-1])
    return max(one_s, (share * float(whole_s[-1]) + float(tail_s[-1])) / shape.num_ranks)
