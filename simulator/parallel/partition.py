"""Which layers each pipeline stage takes where the plan does not say: as the framework cuts, or the cut whose slowest stage is fastest."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from simulator.parallel.framework import AA_SCALING
from simulator.parallel.partition_kernels import Spans, best_cuts

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


@lru_cache(maxsize=16384)
def best_partition(problem: PartitionProblem, num_stages: int) -> tuple[int, ...]:
    """Layers per stage.

    **Model**: of all cuts into stages of consecutive layers that exceed their room least (not at all, where any fits), those whose slowest stage is fastest, and of these
    the one with the least sum of squared times. Dynamic programming over (stages, layers), three times: O(stages layers^2), exact (`partition_kernels`).

    **Source**: the linear partition problem; PipeDream (Narayanan et al. 2019), section 3.1, for pipelines.

    **Not modelled**: what stages send to each other (as much at every cut); stages without layers, which are never faster.

    Args:
        problem: times and bytes.
        num_stages: pp * virtual_stages, at most the layers.
    """
    return tuple(np.diff(best_cuts(_spans(problem, num_stages), num_stages)).tolist())


def _spans(problem: PartitionProblem, num_stages: int) -> Spans:
    count = len(problem.layer_s)

    def sums(values: Sequence[float]) -> NDArray[np.float64]:
        return np.concatenate(([0.0], np.cumsum(np.array(values or (0.0,) * count, np.float64))))

    return Spans(
        seconds=sums(problem.layer_s), fixed_bytes=sums(problem.layer_bytes), kept_bytes=sums(problem.kept_bytes), front_s=float(problem.front_s),
        back_s=float(problem.back_s), front_bytes=float(problem.front_bytes), back_bytes=float(problem.back_bytes),
        in_flight=np.array(problem.in_flight or (0.0,) * num_stages, np.float64), room_bytes=float(problem.room_bytes) if problem.layer_bytes else np.inf,
    )  # fmt: skip
