"""A Plan that breaks a rule cannot be made, and the message holds the whole relation."""

from __future__ import annotations

import re
from collections.abc import Callable
from dataclasses import FrozenInstanceError, fields, replace
from inspect import getsource
from typing import get_type_hints

import pytest

from hardware_models.errors import InputError, UnknownNameError
from simulator import plan_sections
from simulator.plan import (
    Batch,
    Memory,
    MemoryBlock,
    Parallel,
    Pipeline,
    Plan,
    Precision,
    Runtime,
    check_gpus,
    check_model,
    check_single_device,
    expand_ranges,
    resolve_batch,
)
from simulator.plan_parallel import check_parallel


def test_defaults_are_the_plain_module_on_one_device() -> None:
    plan = Plan()
    check_single_device(plan)
    check_gpus(plan, 1)
    assert (plan.num_gpus, plan.num_stages, plan.num_microbatches) == (1, 1, 1)


def test_counts() -> None:
    plan = Plan(parallel=Parallel(tp=8, pp=8, dp=16, virtual_stages=3), batch=Batch(global_batch=1536, micro_batch=1),
                pipeline=Pipeline(schedule="interleaved"))  # fmt: skip
    assert (plan.num_gpus, plan.num_stages, plan.num_microbatches) == (1024, 24, 96)


def test_every_key_has_a_default_and_a_docstring() -> None:
    for section in (plan_sections.Parallel, Batch, Pipeline, MemoryBlock, Memory, Precision, Runtime, Plan):
        lines = getsource(section).splitlines()
        for one in fields(section):
            declared = next(number for number, line in enumerate(lines) if line.startswith(f"    {one.name}: "))
            assert " = " in lines[declared], f"{section.__name__}.{one.name} has no default"
            assert lines[declared + 1].startswith('    """'), f"{section.__name__}.{one.name} has no docstring"


def test_sections_are_frozen() -> None:
    with pytest.raises(FrozenInstanceError):
        Plan().parallel.tp = 2  # type: ignore[misc]
    assert set(get_type_hints(Plan)) == {"parallel", "batch", "pipeline", "memory", "precision", "runtime"}


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: Parallel(tp=0), "plan: parallel.tp = 0: tp > 0 must hold"),
        (lambda: Parallel(dp=4, cp=2, ep=3), "parallel.ep = 3: ep must divide cp * dp, but got 2*4 % 3 = 2"),
        (lambda: Parallel(dp=4, dp_shard=3), "parallel.dp_shard = 3: dp_shard must divide cp * dp, but got 1*4 % 3 = 1"),
        (lambda: Parallel(order="tp-cp-dp-pp"), "parallel.order = 'tp-cp-dp-pp': order is a permutation of tp-cp-ep-dp-pp"),
        (lambda: Parallel(cp_method="rings"), "parallel.cp_method = 'rings': unknown name; known are ring, all-to-all"),
        (lambda: Batch(micro_batch=-1), "batch.micro_batch = -1: micro_batch > 0 must hold"),
        (lambda: Plan(parallel=Parallel(dp=4), batch=Batch(global_batch=36, micro_batch=2)),
         "batch.global_batch = 36: global_batch % (dp * micro_batch) == 0 must hold, but got 36 % (4*2) = 4"),
        (lambda: Pipeline(schedule="1f1b2"), "pipeline.schedule = '1f1b2': unknown name; known are gpipe, 1f1b"),
        (lambda: Pipeline(schedule="file:"), "pipeline.schedule = 'file:': unknown name"),
        (lambda: Pipeline(memory_limit=0.0), "pipeline.memory_limit = 0.0: memory_limit > 0 must hold"),
        (lambda: Pipeline(memory_limit=float("nan")), "pipeline.memory_limit = nan: memory_limit > 0 must hold"),
        (lambda: Batch(seq_len=10**10), "batch.seq_len = 10000000000: seq_len <= 1e+09 must hold"),
        (lambda: Plan(batch=Batch(global_batch=10**7, micro_batch=1)), "global_batch / (dp * micro_batch) <= 1000000 must hold, but got 10000000"),
        (lambda: Pipeline(partition=(1, -1)), "pipeline.partition = (1, -1): layers >= 0 must hold, but got -1"),
        (lambda: Plan(parallel=Parallel(pp=2), pipeline=Pipeline(partition=(1, 2, 3))),
         "pp * virtual_stages entries must be given, but got 3 != 2*1"),
        (lambda: Plan(parallel=Parallel(pp=2, virtual_stages=2)), "schedule 1f1b runs virtual_stages == 1, but got 2"),
        (lambda: Plan(parallel=Parallel(pp=2), pipeline=Pipeline(schedule="zb-v")), "schedule zb-v runs virtual_stages == 2, but got 1"),
        (lambda: Memory(zero_stage=4), "memory.zero_stage = 4: 0 <= zero_stage <= 3 must hold"),
        (lambda: Memory(recompute="some"), "memory.recompute = 'some': unknown name; known are none, selective, full, optimal, file:PATH"),
        (lambda: Memory(grad_offload=1.5), "memory.grad_offload = 1.5: 0 <= fraction <= 1 must hold"),
        (lambda: Memory(weight_offload="all"), "memory.weight_offload = 'all': 0 <= fraction <= 1 must hold; write a fraction or \"optimal\""),
        (lambda: Memory(budget_bytes=0), "memory.budget_bytes = 0: budget_bytes > 0 must hold"),
        (lambda: MemoryBlock(blocks="3-1"), "memory.block.blocks = '3-1': low <= high must hold, but got 3 > 1"),
        (lambda: MemoryBlock(microbatches="first"), "memory.block.microbatches = 'first': indices are \"all\" or ranges"),
        (lambda: MemoryBlock(recompute="optimal"), "memory.block.recompute = 'optimal': unknown name; known are none, selective, full"),
        (lambda: Plan(memory=Memory(block=(MemoryBlock(), MemoryBlock(stage=1)))),
         "memory.block[1].stage = 1: stage < pp * virtual_stages must hold, but got 1 >= 1*1"),
        (lambda: Precision(compute="fp12"), "precision.compute = 'fp12': unknown name; known are fp32, tf32, bf16"),
        (lambda: Precision(optimizer="lion"), "precision.optimizer = 'lion': unknown name; known are adamw, sgd, adamw8bit"),
        (lambda: Runtime(framework="caffe"), "runtime.framework = 'caffe': unknown name; known are pytorch, megatron-lm@2021"),
        (lambda: Runtime(prefetch_blocks=-1), "runtime.prefetch_blocks = -1: prefetch_blocks >= 0 must hold"),
    ],
)  # fmt: skip
def test_a_broken_rule_is_named_with_its_values(make: Callable[[], object], message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        make()


def test_files_and_optimal_are_values() -> None:
    memory = Memory(recompute="file:best.seq", activation_offload="optimal")
    assert Plan(memory=memory, pipeline=Pipeline(schedule="file:order.csv")).memory is memory


def test_number_of_microbatches_needs_a_batch() -> None:
    plan = Plan(batch=Batch(micro_batch=2))
    with pytest.raises(InputError, match=r"batch\.global_batch: the number of micro-batches needs it"):
        _ = plan.num_microbatches
    assert resolve_batch(plan, batch=8, seq_len=None).num_microbatches == 4


def test_resolving_the_batch_splits_only_where_the_plan_says() -> None:
    resolved = resolve_batch(Plan(parallel=Parallel(dp=2)), batch=8, seq_len=256)
    assert resolved.batch == Batch(global_batch=8, micro_batch=4, seq_len=256)
    given = Plan(batch=Batch(global_batch=6, micro_batch=3, seq_len=128))
    assert resolve_batch(given, batch=8, seq_len=256) == given


def test_resolving_refuses_a_batch_that_does_not_split() -> None:
    with pytest.raises(InputError, match=re.escape("but got 7 % (1*2) = 1")):
        resolve_batch(Plan(batch=Batch(micro_batch=2)), batch=7, seq_len=None)


def test_gpus_are_the_product() -> None:
    plan = Plan(parallel=Parallel(tp=2, pp=2, dp=4))
    check_gpus(plan, 16)
    with pytest.raises(InputError, match=re.escape("tp * cp * pp * dp == gpus must hold, but got 2*1*2*4 = 16 != 8")):
        check_gpus(plan, 8)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(parallel=Parallel(tp=2)), "parallel.tp = 2: not simulated yet on a single device; leave it at 1"),
        (Plan(parallel=Parallel(dp=2)), "parallel.dp = 2"),
        (Plan(memory=Memory(activation_offload="optimal")), "memory.activation_offload = 'optimal'"),
        (Plan(memory=Memory(grad_offload=0.5)), "memory.grad_offload = 0.5: gradients leave a single device only with optimizer_offload"),
        (Plan(memory=Memory(block=(MemoryBlock(microbatches="0", weight_offload=0.5),))), "memory.block[0].microbatches = '0': what goes to the host is the same for all"),
        (Plan(memory=Memory(offload_target="nvme")), "memory.offload_target = 'nvme'"),
        (Plan(precision=Precision(compute="fp8")), "precision.compute = 'fp8': not simulated yet on a single device; leave it at fp32"),
        (Plan(precision=Precision(compute="bf16")), "precision.compute = 'bf16'"),
        (Plan(precision=Precision(optimizer="adamw8bit")), "precision.optimizer = 'adamw8bit': not simulated yet on a single device; leave it at adamw or sgd"),
        (Plan(runtime=Runtime(compile=True)), "runtime.compile = True"),
        (Plan(runtime=Runtime(framework="deepspeed")), "runtime.framework = 'deepspeed'"),
        (Plan(pipeline=Pipeline(schedule="file:order.csv")), "pipeline.schedule = 'file:order.csv': orders from files are not simulated yet"),
    ],
)  # fmt: skip
def test_what_is_not_simulated_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_single_device(plan)


def test_parameters_in_bf16_are_computed_with_and_have_gradients_in_bf16() -> None:
    alone = Plan(precision=Precision(compute="bf16", grads="bf16", master="bf16"))
    assert (alone.precision.mode, Precision(compute="bf16").mode) == ("pure-bf16", "bf16")
    check_single_device(alone, compute=("bf16",))
    with pytest.raises(InputError, match=r"precision.grads = 'bf16': not simulated yet on a single device; leave it at fp32"):
        check_single_device(replace(alone, precision=Precision(compute="bf16", grads="bf16")), compute=("bf16",))
    with pytest.raises(
        InputError, match=r'precision.master = .bf16.: parameters in bf16 .* but got compute = "bf16", grads = "fp32"'
    ):
        Precision(compute="bf16", master="bf16")
    with pytest.raises(InputError, match=r"precision.master = 'bf16': not simulated yet on several devices; leave it at fp32"):
        check_parallel(replace(alone, parallel=Parallel(dp=2)), compute=("bf16",))


def test_priced_precision_passes() -> None:
    check_single_device(Plan(precision=Precision(compute="bf16")), compute=("fp32", "bf16"))


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(parallel=Parallel(tp=5)), "parallel.tp = 5: tp that does not divide heads: 12 % 5 = 2"),
        (Plan(parallel=Parallel(tp=6)), "parallel.tp = 6: tp and kv_heads: one must divide the other, but got 6 and 4"),
        (Plan(parallel=Parallel(pp=24)), "parallel.pp = 24: pp * virtual_stages <= layers must hold, but got 24*1 > 12"),
        (Plan(parallel=Parallel(pp=2), pipeline=Pipeline(partition=(5, 6))), "the sum must be the model's layers, but got 11 != 12"),
        (Plan(parallel=Parallel(dp=3, ep=3)), "parallel.ep = 3: ep that does not divide experts: 8 % 3 = 2"),
        (Plan(parallel=Parallel(cp=3)), "parallel.cp = 3: cp that does not divide seq_len: 256 % 3 = 1"),
        (Plan(parallel=Parallel(cp=4, tp=2, cp_method="all-to-all")), "parallel.tp = 2: tp * cp that does not divide heads: 12 % 8 = 4"),
        (Plan(parallel=Parallel(tp=4, sequence_parallel=True), batch=Batch(seq_len=2)), "cp * tp that does not divide seq_len: 2 % 4 = 2"),
    ],
)  # fmt: skip
def test_what_the_model_cannot_be_cut_by_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=re.escape(message)):
        check_model(plan, heads=12, kv_heads=4, layers=12, experts=8, seq_len=256)


def test_what_the_model_does_not_have_is_not_checked() -> None:
    check_model(Plan(parallel=Parallel(tp=5, dp=3, ep=3)))
    check_model(Plan(parallel=Parallel(pp=2), pipeline=Pipeline(partition=(0, 12))), layers=12)
    check_model(Plan(parallel=Parallel(tp=8)), heads=64, kv_heads=2)


def test_ranges() -> None:
    assert expand_ranges("all", 3, key="memory.block.blocks") == (0, 1, 2)
    assert expand_ranges("5,0-2,1", 6, key="memory.block.blocks") == (0, 1, 2, 5)
    with pytest.raises(InputError, match=re.escape("memory.block.blocks = '0-11': index < 6 must hold, but got 11")):
        expand_ranges("0-11", 6, key="memory.block.blocks")
    with pytest.raises(InputError, match="index < 6 must hold, but got 999999999999"):  # without a set of so many
        expand_ranges("0-999999999999", 6, key="memory.block.blocks")


def test_unknown_names_list_the_known() -> None:
    with pytest.raises(UnknownNameError) as caught:
        Runtime(framework="caffe")
    assert "torchtitan" in caught.value.known
    assert replace(Runtime(), framework="torchtitan").framework == "torchtitan"
