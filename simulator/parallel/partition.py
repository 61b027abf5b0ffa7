"""Which layers each pipeline stage takes where the plan does not say: as the framework cuts, or the cut whose slowest stage is fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from itertools import pairwise
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from simulator.parallel.framework import AA_SCALING

EVEN = ("megatron-lm@2021", "megatron-core", "megatron-core@2023", "deepspeed@2021", "deepspeed")
"""Frameworks that cut layers evenly, whatever the ends cost.

**Source**: ``get_num_layers`` / ``get_num_layers_to_build`` (megatron/core/transformer/transformer_block.py, 0.14): layers // stages, unless told otherwise; Megatron-DeepSpeed cuts by ``type:transformer``.
"""
ENDS_AS_LAYERS: Mapping[str, int] = MappingProxyType({"torchtitan": 1, **dict.fromkeys(AA_SCALING, 2)})
"""Frameworks that count the embedding as a layer, and what follows the last layer as so many, the first stages taking what is left over.

**Source**: ``generate_llm_fqn_per_model_part`` (torchtitan/distributed/pipeline_parallel.py, 2025), with its default weights of 1; ``pipe_partition_uniform`` over embedding, layers, norm
and head (Aleph-Alpha/scaling @01b9d21dba src/scaling/core/nn/parallel_module/pipeline_partitioning.py, the default of src/scaling/core/topology/topology_config.py).
"""


@dataclass(frozen=True, slots=True, kw_only=True)
class PartitionProblem:
    """Layers to cut into stages."""

    layer_s: tuple[float, ...]
    """Seconds of each layer, forward and backward."""
    front_s: float
    """Of the embedding, which is on the first stage."""
    back_s: float
    """Of the head, which is on the last one."""
    layer_bytes: tuple[int, ...] = ()
    """Bytes that live through the step for each layer; empty: memory is no matter."""
    kept_bytes: tuple[int, ...] = ()
    """That one micro-batch keeps of each layer."""
    front_bytes: int = 0
    back_bytes: int = 0
    in_flight: tuple[float, ...] = ()
    """Per stage, most micro-batches at once."""
    room_bytes: int = 0
    """Of a stage."""


def even_partition(num_layers: int, num_stages: int) -> tuple[int, ...]:
    """Layers per stage, as even as can be, the longer stages in the middle: the ends also hold embedding and head."""
    least, more = divmod(num_layers, num_stages)
    order = sorted(range(num_stages), key=lambda stage: abs(2 * stage - (num_stages - 1)))
    longer = set(order[:more])
    return tuple(least + (stage in longer) for stage in range(num_stages))


def ends_as_layers(num_layers: int, num_stages: int, *, back: int = 1) -> tuple[int, ...] | None:
    """Layers per stage where the embedding counts as a layer, and what follows the last one as ``back`` of them; None: an end would have none."""
    if num_stages == 1:
        return (num_layers,)
    least, more = divmod(num_layers + 1 + back, num_stages)
    counts = [least + (stage < more) for stage in range(num_stages)]
    counts[0] -= 1
    counts[-1] -= back
    return tuple(counts) if min(counts) > 0 else None


@lru_cache(maxsize=1024)
def best_partition(problem: PartitionProblem, num_stages: int) -> tuple[int, ...]:
    """Layers per stage.

    **Model**: of all cuts into stages of consecutive layers that exceed their room least (not at all, where any fits), those whose slowest stage is fastest, and of these
    the one with the least sum of squared times. Dynamic programming over (stages, layers), three times: O(stages layers^2), exact.

    **Source**: the linear partition problem; PipeDream (Narayanan et al. 2019), section 3.1, for pipelines.

    **Not modelled**: what stages send to each other (as much at every cut); stages without layers, which are never faster.

    Args:
        problem: times and bytes.
        num_stages: pp * virtual_stages, at most the layers.
    """
    times, over = _tables(problem, num_stages)
    _, least_over = _least(np.maximum, over, num_stages)
    times = np.where(over <= least_over, times, np.inf)
    _, slowest = _least(np.maximum, times, num_stages)
    cuts, _ = _least(np.add, np.where(times <= slowest * (1 + 1e-12), times**2, np.inf), num_stages)
    return tuple(int(end - first) for first, end in pairwise(cuts))


def _tables(problem: PartitionProblem, num_stages: int) -> tuple[NDArray[np.float64], NDArray[np.float64]]:
    """Seconds, and bytes beyond the room, of each stage that takes layers first to end - 1; shape (stages, layers + 1, layers + 1), infinite where end <= first."""
    count = len(problem.layer_s)
    spans = _spans(problem.layer_s)
    times = np.repeat(spans[None], num_stages, axis=0)
    times[0] += problem.front_s
    times[-1] += problem.back_s
    over = np.zeros_like(times)
    if problem.layer_bytes:
        fixed, kept = _spans(problem.layer_bytes), _spans(problem.kept_bytes)
        flight = np.array(problem.in_flight)[:, None, None]
        used = fixed[None] + flight * kept[None]
        used[0] += problem.front_bytes
        used[-1] += problem.back_bytes
        over = np.maximum(0.0, used - problem.room_bytes)
    empty = np.tri(count + 1, dtype=bool)[None]
    return np.where(empty, np.inf, times), np.where(empty, np.inf, over)


def _spans(values: Sequence[float]) -> NDArray[np.float64]:
    """Sums over layers first to end - 1, at [first, end]."""
    until = np.concatenate(([0.0], np.cumsum(np.array(values, np.float64))))
    return until[None, :] - until[:, None]


def _least(join: np.ufunc, costs: NDArray[np.float64], num_stages: int) -> tuple[list[int], float]:
    """The cuts whose joined costs are least, and these; ties to the earlier cut."""
    count = costs.shape[1] - 1
    best = np.full((num_stages + 1, count + 1), np.inf)
    before = np.zeros((num_stages + 1, count + 1), np.int64)
    best[0, 0] = 0.0
    for stage in range(num_stages):
        joined = join(best[stage][:, None], costs[stage])
        before[stage + 1] = joined.argmin(axis=0)
        best[stage + 1] = joined.min(axis=0)
    cuts = [count]
    for stage in range(num_stages, 0, -1):
        cuts.append(int(before[stage, cuts[-1]]))
    return cuts[::-1], float(best[num_stages, count])
