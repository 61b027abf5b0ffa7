"""Casts of operands of products in eight bits, counted by hand on generated layers."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import replace

import pytest

from hardware_models.aliases import known_devices
from hardware_models.catalogue import load_hardware
from hardware_models.kernel import Kernel
from hardware_models.kernel_tables import gemm_kernel
from hardware_models.pricing import price
from simulator.parallel.eight_bit import (
    eight_bit_workload,
    kept_weight_bytes,
    recipe_of,
    weight_cast_seconds,
    weight_elements,
    without_timed_casts,
)
from simulator.parallel.framework import operators_of
from simulator.parallel.priced_model import priced_model
from simulator.plan import Plan
from simulator.precision import price_in
from simulator.presets import build_workload, preset
from simulator.workload import Block
from tests.simulator.parallel.step_cases import SEQ_LEN, plan_of, small_config

H100, B200 = load_hardware("h100-sxm"), load_hardware("b200")
LLAMA = replace(preset("llama3-8b"), layers=1)
HIDDEN, FFN, KV = 4096, 14336, 1024
TOKENS = SEQ_LEN


def of(framework: str, *, tp: int = 1) -> Plan:
    plan = plan_of(tp=tp, sequence_parallel=tp > 1, framework=framework)
    return replace(plan, precision=replace(plan.precision, compute="fp8"))


def blocks(framework: str, *, tp: int = 1) -> dict[str, Block]:
    plan = of(framework, tp=tp)
    made = build_workload(
        LLAMA, micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16", tp=tp, sequence_parallel=tp > 1, operators=operators_of(plan)
    )
    cast = eight_bit_workload(made, plan, LLAMA, H100, tokens=TOKENS)
    return {block.name: block for block in cast.blocks}


def moved(kernels: Iterable[Kernel]) -> list[tuple[str, int, int]]:
    """Operator, bytes read and written of what casts."""
    return [(kernel.op, kernel.read_bytes, kernel.written_bytes) for kernel in kernels if kernel.op in {"amax", "to_float8"}]


def scaled(elements: int, orders: int) -> list[tuple[str, int, int]]:
    return [("amax", 2 * elements, 4), ("to_float8", 2 * elements, orders * elements)]


def test_transformer_engine_casts_each_operand_once_in_both_orders() -> None:
    """Gate and up are one product: its input and the activation forward, one gradient for each product backward, no weights."""
    network = blocks("megatron-core")["network"]
    forward, backward = network.options[0].forward.kernels, network.options[0].backward.kernels
    assert moved(forward) == [*scaled(TOKENS * HIDDEN, 2), *scaled(TOKENS * FFN, 2)]
    assert moved(network.discard.kernels) == [*scaled(TOKENS * HIDDEN, 1), *scaled(TOKENS * FFN, 1)]
    assert moved(backward) == [*scaled(TOKENS * HIDDEN, 2), *scaled(2 * TOKENS * FFN, 2)]


def test_torchao_casts_weights_in_each_pass_and_transposes_inputs_later() -> None:
    """Gate and up are two products that share one cast of their input, forward and for their weights' gradients."""
    network = blocks("torchtitan")["network"]
    weight, stream, inner = HIDDEN * FFN, TOKENS * HIDDEN, TOKENS * FFN
    forward = moved(network.options[0].forward.kernels)
    assert forward == [*scaled(stream, 1), *scaled(weight, 1), *scaled(weight, 1), *scaled(inner, 1), *scaled(weight, 1)]
    backward = moved(network.options[0].backward.kernels)
    later = [("to_float8", 2 * inner, inner), ("to_float8", 2 * stream, stream)]
    outputs = [*scaled(stream, 2), *scaled(inner, 2), *scaled(inner, 2)]
    assert sorted(backward) == sorted([*later, *outputs, *[("to_float8", 2 * weight, weight)] * 3])


def test_scales_by_rows_are_looked_for_in_each_order() -> None:
    """Gathers in bfloat16 tell that: outputs' gradients twice, inputs and weights once more."""
    plan = of("torchtitan")
    plan = replace(plan, precision=replace(plan.precision, comm="bf16"))
    made = build_workload(LLAMA, micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16", operators=operators_of(plan))
    cast = eight_bit_workload(made, plan, LLAMA, H100, tokens=TOKENS)
    network = next(block for block in cast.blocks if block.name == "network")
    weight, stream, inner = HIDDEN * FFN, TOKENS * HIDDEN, TOKENS * FFN
    backward = moved(network.options[0].backward.kernels)
    outputs = [*scaled(stream, 1), *scaled(inner, 1), *scaled(inner, 1)]
    assert sorted(backward) == sorted([*outputs, *outputs, *scaled(stream, 1), *scaled(inner, 1), *3 * scaled(weight, 1)])


def test_queries_keys_and_values_share_a_cast_and_the_projection_does_not() -> None:
    attention = blocks("torchtitan")["attention"]
    stream = scaled(TOKENS * HIDDEN, 1)
    weights = [*scaled(HIDDEN * HIDDEN, 1), *scaled(HIDDEN * KV, 1), *scaled(HIDDEN * KV, 1)]
    assert moved(attention.options[0].forward.kernels) == [*stream, *weights, *stream, *scaled(HIDDEN * HIDDEN, 1)]


def test_what_is_gathered_is_cast_on_a_ranks_part() -> None:
    network = blocks("megatron-core", tp=8)["network"]
    stream, inner = TOKENS * HIDDEN, TOKENS * FFN // 8
    gathered = [*scaled(stream // 8, 1), ("to_float8", stream, stream)]
    assert moved(network.options[0].forward.kernels) == [*gathered, *scaled(inner, 2)]
    assert moved(network.options[0].backward.kernels) == [*gathered, *scaled(2 * inner, 2)]


@pytest.mark.parametrize("framework", ["megatron-core", "torchtitan", "pytorch"])
def test_layers_compute_in_eight_bits_and_ends_do_not(framework: str) -> None:
    made = blocks(framework)
    for name, dtype in (("attention", "float8_e4m3fn"), ("network", "float8_e4m3fn"), ("head", "bfloat16")):
        products = [kernel for kernel in made[name].options[0].backward.kernels if kernel.kernel_class == "gemm"]
        assert products
        assert {kernel.dtype for kernel in products} == {dtype}
        assert not moved(made["head"].options[0].backward.kernels)


@pytest.mark.parametrize("framework", ["megatron-core", "torchtitan"])
def test_memory_comes_and_goes_around_the_same_kernels(framework: str) -> None:
    plan = of(framework)
    plain = build_workload(LLAMA, micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16", operators=operators_of(plan))
    cast = eight_bit_workload(plain, plan, LLAMA, H100, tokens=TOKENS)
    for before, after in zip(plain.blocks, cast.blocks, strict=True):
        for old, new in (
            (before.options[0].forward, after.options[0].forward),
            (before.options[0].backward, after.options[0].backward),
        ):
            own = [(kernel.kernel_class, kernel.op, kernel.shape) for kernel in old.kernels]
            there = [(kernel.kernel_class, kernel.op, kernel.shape) for kernel in new.kernels]
            for one, moved_to in zip(old.memory, new.memory, strict=True):
                if one.kernel < len(own):
                    assert there[moved_to.kernel] == own[one.kernel]


def test_routers_stay_as_they_are() -> None:
    config = replace(preset("mixtral-8x7b"), layers=1)
    plan = of("megatron-core")
    made = build_workload(config, micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16", operators=operators_of(plan))
    cast = eight_bit_workload(made, plan, config, H100, tokens=TOKENS)
    experts = next(block for block in cast.blocks if block.name == "experts")
    routers = [kernel for kernel in experts.discard.kernels if kernel.kernel_class == "gemm"]
    assert [kernel.dtype for kernel in routers] == ["bfloat16"]
    assert weight_elements([experts], config) == 0


def test_scales_are_looked_for_where_they_are_not_known() -> None:
    looks = {name: recipe_of(of(name), H100).finds_scale for name in ("megatron-core", "torchtitan", "pytorch")}
    assert looks == {"megatron-core": True, "torchtitan": True, "pytorch": False}
    assert not recipe_of(of("megatron-core"), B200).finds_scale
    assert recipe_of(of("torchtitan"), B200).finds_scale


def test_two_copies_of_weights_stay_where_casts_are_kept() -> None:
    elements = 2 * HIDDEN * HIDDEN + 2 * HIDDEN * KV + 3 * HIDDEN * FFN
    assert weight_elements(blocks("megatron-core").values(), LLAMA) == elements
    assert kept_weight_bytes(of("megatron-core"), H100, elements) == 2 * elements
    assert kept_weight_bytes(of("torchtitan"), H100, elements) == 0
    assert kept_weight_bytes(plan_of(framework="megatron-core"), H100, elements) == 0
    assert weight_cast_seconds(of("torchtitan"), H100, elements) == 0.0
    bandwidth = H100.memory_bandwidth_bytes_per_s
    assert 6 * elements / bandwidth < weight_cast_seconds(of("megatron-core"), H100, elements) < 8 * elements / bandwidth


def test_eight_bits_are_faster_than_sixteen() -> None:
    """Of a layer with many tokens."""
    config = small_config(hidden=4096, heads=32, ffn=16384)
    plan = replace(of("megatron-core"), batch=replace(of("megatron-core").batch, micro_batch=8))
    eight = priced_model(config, plan, H100, seq_len=SEQ_LEN)
    sixteen = priced_model(config, replace(plan, precision=replace(plan.precision, compute="bf16")), H100, seq_len=SEQ_LEN)

    def seconds(model: object) -> float:
        return sum(model.prices.seconds(block.options[0].forward) for block in model.workload.blocks)  # type: ignore[attr-defined]

    assert 0.45 * seconds(sixteen) < seconds(eight) < 0.95 * seconds(sixteen)


def product(m: int, n: int, k: int, dtype: str = "float8_e4m3fn") -> Kernel:
    return gemm_kernel(m, n, k, dtype)


def test_timings_of_whole_layers_hold_a_cast_that_is_taken_off() -> None:
    """Where products are short for what they read, by the cast; never below the peak; products in bfloat16 as they are."""
    own = price_in("bf16", H100)
    short, wide = product(8192, 1024, 1024), product(8192, 1024, 1024, "bfloat16")
    cast = kernel_of_copy(8192 * 1024)
    priced = without_timed_casts(own, H100)([short, wide])
    assert priced[0] == pytest.approx(own([short])[0] - price([cast], H100)[0])
    assert priced[1] == own([wide])[0]
    large = product(131072, 8192, 8192)
    assert without_timed_casts(own, H100)([large])[0] >= large.flops / H100.peak("float8_e4m3fn")


def test_borrowed_curves_hold_the_cast_of_the_board_that_was_timed() -> None:
    """The H100 of 96 GB has slower memory; what its curve holds is the cast on the one of 80 GB."""
    slow = load_hardware("h100-sxm-96gb")
    own, short = price_in("bf16", slow), product(8192, 1024, 1024)
    taken_s = own([short])[0] - without_timed_casts(own, slow)([short])[0]
    assert taken_s == pytest.approx(price([kernel_of_copy(8192 * 1024)], H100)[0])


@pytest.mark.parametrize(
    "name", [name for name in known_devices() if (load_hardware(name).architecture in {"hopper", "ada", "blackwell"})]
)
def test_every_board_with_eight_bits_has_such_a_price(name: str) -> None:
    device = load_hardware(name)
    priced = without_timed_casts(price_in("bf16", device), device)([product(4096, 4096, 4096)])
    assert 0.0 < priced[0] <= price_in("bf16", device)([product(4096, 4096, 4096)])[0]


def kernel_of_copy(elements: int) -> Kernel:
    return Kernel(
        kernel_class="copy",
        op="to_float8",
        shape=(elements,),
        dtype="bfloat16",
        flops=0,
        read_bytes=2 * elements,
        written_bytes=elements,
    )
