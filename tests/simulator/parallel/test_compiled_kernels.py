"""Fusion on passes of a few kernels worked out by hand, and on generated layers."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from simulator.parallel.compiled_kernels import compiled_pass, compiled_workload
from simulator.plan_parallel import check_parallel
from simulator.presets import build_workload
from simulator.workload import MemoryEvent, Pass, Workload
from tests.simulator.parallel.step_cases import SEQ_LEN, plan_of, simulated, small_config


def light(op: str, kernel_class: str = "pointwise", *, read: int = 8, written: int = 8) -> Kernel:
    return Kernel(
        kernel_class=kernel_class, op=op, shape=(4,), dtype="bfloat16", flops=0, read_bytes=read, written_bytes=written
    )  # type: ignore[arg-type]


PRODUCT = Kernel(kernel_class="gemm", op="mm", shape=(2, 2, 2), dtype="bfloat16", flops=16, read_bytes=16, written_bytes=8)


def change(kernel: int, delta_bytes: int, buffer: str = "transient") -> MemoryEvent:
    return MemoryEvent(kernel=kernel, buffer=buffer, delta_bytes=delta_bytes)  # type: ignore[arg-type]


def test_a_chain_reads_its_input_and_writes_its_result() -> None:
    """X -> a (freed) -> b (kept): 8 bytes in, 8 bytes out, and a takes no memory."""
    run = Pass(kernels=(light("mul"), light("gelu")), memory=(change(0, 8), change(1, 8, "output"), change(2, -8)))
    fused = compiled_pass(run)
    assert [(kernel.op, kernel.read_bytes, kernel.written_bytes) for kernel in fused.kernels] == [("fused", 8, 8)]
    assert fused.memory == (change(0, 8, "output"),)


def test_what_the_graph_keeps_is_written() -> None:
    run = Pass(kernels=(light("mul"), light("gelu")), memory=(change(0, 8, "internal"), change(1, 8, "output")))
    assert [(kernel.read_bytes, kernel.written_bytes) for kernel in compiled_pass(run).kernels] == [(8, 16)]


def test_products_sorting_and_gradients_of_parameters_stay() -> None:
    kernels = (
        light("mul"),
        PRODUCT,
        light("add"),
        light("sort", "reduction"),
        light("add"),
        light("sum", "reduction"),
        light("mul"),
    )
    run = Pass(kernels=kernels, memory=(change(5, 8, "gradient"),))
    fused = compiled_pass(run)
    assert fused.kernels == kernels
    assert fused.memory == (change(5, 8, "gradient"),)


def test_a_reduction_ends_a_run() -> None:
    run = Pass(kernels=(light("mul"), light("sum", "reduction"), light("mul"), light("add")), memory=())
    assert [kernel.op for kernel in compiled_pass(run).kernels] == ["fused", "fused"]


def workload(**changes: object) -> Workload:
    return build_workload(small_config(**changes), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16")


@pytest.mark.parametrize("activation", ["gelu", "swiglu"])
def test_compiled_layers_move_and_keep_less_and_compute_the_same(activation: str) -> None:
    plain, compiled = workload(activation=activation), compiled_workload(workload(activation=activation))
    assert compiled.model_flops == plain.model_flops
    for old, new in zip(plain.blocks, compiled.blocks, strict=True):
        assert new.options[0].saved_internal_bytes <= old.options[0].saved_internal_bytes
        for before, after in ((old.discard, new.discard), (old.option(new.options[0].name).backward, new.options[0].backward)):
            assert len(after.kernels) <= len(before.kernels)
            assert sum(kernel.moved_bytes for kernel in after.kernels) <= sum(kernel.moved_bytes for kernel in before.kernels)
            assert sum(event.delta_bytes for event in after.memory) == sum(event.delta_bytes for event in before.memory)
            assert [event.kernel for event in after.memory] == sorted(event.kernel for event in after.memory)


def test_equal_layers_stay_one_object() -> None:
    compiled = compiled_workload(workload())
    assert compiled.blocks[1] is compiled.blocks[3]


def test_a_compiled_step_is_shorter_and_smaller() -> None:
    plan = plan_of(pp=2, framework="torchtitan")
    eager, compiled = (simulated(replace(plan, runtime=replace(plan.runtime, compile=chosen))) for chosen in (False, True))
    assert compiled.step_time_s < eager.step_time_s
    assert max(compiled.peak_memory_bytes) < max(eager.peak_memory_bytes)
    assert compiled.model_flops == eager.model_flops


@pytest.mark.parametrize("framework", ["megatron-core", "megatron-lm@2021"])
def test_megatron_compiles_no_layers(framework: str) -> None:
    plan = plan_of(pp=2, framework=framework)
    with pytest.raises(InputError, match="compiles no layers"):
        check_parallel(replace(plan, runtime=replace(plan.runtime, compile=True)), compute=("bf16",))
