"""Model states per rank against Rajbhandari et al. 2020, figure 1 and table 1."""

from __future__ import annotations

import pytest

from simulator.parallel.memory import static_memory
from simulator.program import MemoryClass
from tests.simulator.parallel.step_cases import plan_of

PARAMETERS = 7.5e9


@pytest.mark.parametrize(("stage", "gigabytes"), [(0, 120.0), (1, 31.4), (2, 16.6), (3, 1.88)])
def test_the_papers_figure_of_7_5_billion_parameters_on_64_ranks(stage: int, gigabytes: float) -> None:
    memory = static_memory(PARAMETERS, 0.0, plan_of(dp=64, zero_stage=stage, grads="bf16"), dtype="bfloat16")
    assert (memory.parameters + memory.gradients + memory.states) / 1e9 == pytest.approx(gigabytes, abs=0.05)


def test_a_parameter_has_2_2_and_12_bytes() -> None:
    memory = static_memory(1.0, 0.0, plan_of(grads="bf16"), dtype="bfloat16")
    assert (memory.parameters, memory.gradients, memory.states) == (2.0, 2.0, 12.0)


@pytest.mark.parametrize(
    ("dtype", "grads", "optimizer", "expected"),
    [
        ("bfloat16", "fp32", "adamw", (2, 4, 12)),
        ("float32", "fp32", "adamw", (4, 4, 8)),
        ("float16", "fp32", "sgd", (2, 4, 4)),
        ("bfloat16", "bf16", "adamw8bit", (2, 2, 6)),
    ],
)
def test_bytes_follow_the_precision(dtype: str, grads: str, optimizer: str, expected: tuple[int, int, int]) -> None:
    memory = static_memory(1.0, 0.0, plan_of(grads=grads, optimizer=optimizer), dtype=dtype)
    assert (memory.parameters, memory.gradients, memory.states) == expected


def test_each_stage_holds_no_more_than_the_one_before() -> None:
    totals = []
    for stage in range(4):
        memory = static_memory(1e9, 1e8, plan_of(dp=8, cp=2, zero_stage=stage), dtype="bfloat16")
        totals.append(memory.parameters + memory.gradients + memory.states)
    assert totals == sorted(totals, reverse=True)
    assert len(set(totals)) == len(totals)


def test_context_parallel_ranks_shard_too() -> None:
    """16 ranks hold the same parameters."""
    memory = static_memory(16.0, 0.0, plan_of(dp=8, cp=2, zero_stage=3), dtype="bfloat16")
    assert (memory.parameters, memory.gradients, memory.states) == (2.0, 4.0, 12.0)


def test_experts_have_fewer_replicas() -> None:
    """Dp 8 and ep 4: two replicas of an expert's parameter, eight of a dense one; stage 1 shards states only."""
    memory = static_memory(8.0, 2.0, plan_of(dp=8, ep=4, zero_stage=1), dtype="bfloat16")
    assert memory.states == 12.0 * (8 / 8 + 2 / 2)
    assert memory.parameters == 2.0 * 10


def test_copies_and_gathered_parameters_count() -> None:
    memory = static_memory(8.0, 0.0, plan_of(dp=4, zero_stage=3), dtype="bfloat16", copies=2.0, working=3.0)
    assert memory.parameters == 2.0 * 2 * 8 / 4 + 3 * 2
    assert static_memory(8.0, 0.0, plan_of(dp=4), dtype="bfloat16", working=3.0).parameters == 16.0


def test_classes_are_in_their_places() -> None:
    sizes = static_memory(10.0, 0.0, plan_of(), dtype="bfloat16").by_class(7)
    assert sizes[MemoryClass.PARAMETERS] == 20
    assert sizes[MemoryClass.GRADIENTS] == 40
    assert sizes[MemoryClass.OPTIMIZER_STATES] == 120
    assert sizes[MemoryClass.BATCH] == 7
    assert sum(sizes) == 187


T5_3B, T5_LARGEST_LAYER, NUM_GPUS = 2851e6, 32e6, 8
"""Parameters of DeepSpeed's worked example (docs/code-docs/source/memory.rst), in its own rounding."""
GIB = 2**30


def test_deepspeeds_estimate_of_zero_3_is_ours() -> None:
    """18 bytes of each parameter over all ranks, and two layers gathered: 4 bytes of the largest. Printed: 6.10 "GB", which are GiB."""
    memory = static_memory(T5_3B, 0.0, plan_of(dp=NUM_GPUS, zero_stage=3), dtype="float16", working=2 * T5_LARGEST_LAYER)
    assert (memory.parameters + memory.gradients + memory.states) / GIB == pytest.approx(6.10, abs=0.01)


def test_deepspeeds_estimate_of_zero_2_counts_the_half_precision_gradients_besides() -> None:
    """It prints 15.93: 4 P + 16 P / N. Ours is 2 P + 16 P / N: the other 2 P are all gradients in half precision, which a bucketed reduction does not keep."""
    memory = static_memory(T5_3B, 0.0, plan_of(dp=NUM_GPUS, zero_stage=2), dtype="float16")
    ours = memory.parameters + memory.gradients + memory.states
    assert ours == pytest.approx(2 * T5_3B + 16 * T5_3B / NUM_GPUS)
    assert (ours + 2 * T5_3B) / GIB == pytest.approx(15.93, abs=0.01)


@pytest.mark.parametrize("framework", ["pytorch", "torchtitan"])
def test_fsdp_shards_its_master_copy(framework: str) -> None:
    """16 bytes of each parameter over the ranks (4 + 4 + 8), and what is gathered in two."""
    memory = static_memory(800.0, 0.0, plan_of(dp=8, zero_stage=3, framework=framework), dtype="bfloat16", working=10.0)
    assert (memory.parameters, memory.gradients, memory.states) == (400.0 + 20.0, 400.0, 800.0)
    ours = static_memory(800.0, 0.0, plan_of(dp=8, zero_stage=3), dtype="bfloat16", working=10.0)
    assert ours.parameters + ours.states == memory.parameters + memory.states + 200.0
