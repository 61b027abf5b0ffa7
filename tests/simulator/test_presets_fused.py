"""Fused operators: bytes that a layer keeps against counts by hand, and that fusing never costs memory or FLOPs."""

from __future__ import annotations

from dataclasses import replace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from simulator.parallel.framework import OPERATORS
from simulator.presets import TransformerConfig, build_workload, preset
from simulator.presets.operators import EAGER, Operators
from simulator.workload import Block, Workload

MEGATRON = OPERATORS["megatron-core"]
TORCHTITAN = OPERATORS["torchtitan"]
SEQ = 1024


def build(config: TransformerConfig, operators: Operators, **changes: object) -> Workload:
    return build_workload(config, operators=operators, **{"micro_batch": 1, "seq_len": SEQ, "dtype": "bfloat16", **changes})  # type: ignore[arg-type]


def named(workload: Workload, name: str) -> Block:
    return next(block for block in workload.blocks if block.name == name)


def kept_bytes(block: Block) -> int:
    return sum(tensor.size_bytes for tensor in block.options[0].saved)


def test_a_llama_layer_keeps_16_75_times_its_stream() -> None:
    """70B, one token, in elements of the stream h = 8192.

    Attention 1 (input) + 1 (normed) + 1 (query) + 2/8 (key, value) + 1 (mixed);
    network 1 + 1 + 2 * 3.5 (gate and up) + 3.5 (their product). Besides: two rows' roots of norms and 64 of attention in float32.
    """
    workload = build(replace(preset("llama3-70b"), layers=2), MEGATRON)
    stream = SEQ * 8192 * 2
    assert kept_bytes(named(workload, "attention")) == stream * 17 // 4 + SEQ * (1 + 64) * 4
    assert kept_bytes(named(workload, "network")) == stream * 25 // 2 + SEQ * 4


def test_inputs_in_eight_bits_by_hand() -> None:
    """70B, bytes a token over h = 8192.

    Attention: input 2, normed 1, query 2, key and value 1/2, mixed 2 for attention itself and 1 for the product behind it; network: input 2, normed 1, gate and up 14, their
    product 3.5 in place of 7.
    """
    config = replace(preset("llama3-70b"), layers=2)
    workload = build(config, replace(MEGATRON, eight_bit_inputs=True))
    row = SEQ * 8192
    assert kept_bytes(named(workload, "attention")) == row * 17 // 2 + SEQ * (1 + 64) * 4
    assert kept_bytes(named(workload, "network")) == row * 41 // 2 + SEQ * 4
    plain = build(config, MEGATRON)
    assert kept_bytes(named(workload, "head")) == kept_bytes(named(plain, "head"))


@given(st.sampled_from(["llama3-8b", "mixtral-8x7b", "gpt3-175b"]), st.sampled_from([1, 2, 4]))
def test_eight_bits_never_keep_more_of_a_network(name: str, tp: int) -> None:
    changes = {"tp": tp, "sequence_parallel": tp > 1}
    plain, packed = (
        build(replace(preset(name), layers=1), replace(MEGATRON, eight_bit_inputs=flag), **changes) for flag in (False, True)
    )
    for before, after in zip(plain.blocks, packed.blocks, strict=True):
        if before.name in {"network", "experts"}:
            assert kept_bytes(after) <= kept_bytes(before)
        assert before.options[0].forward.kernels == after.options[0].forward.kernels


def test_sequence_parallel_ranks_keep_their_share_of_it() -> None:
    whole, split = (build(replace(preset("llama3-70b"), layers=2), MEGATRON, tp=tp, sequence_parallel=tp > 1) for tp in (1, 4))
    for name in ("attention", "network"):
        assert kept_bytes(named(whole, name)) == 4 * kept_bytes(named(split, name))


def test_the_loss_keeps_probabilities_in_float32_and_no_logits() -> None:
    workload = build(replace(preset("llama3-8b"), layers=2), MEGATRON)
    head = named(workload, "head")
    sizes = sorted(tensor.size_bytes for tensor in head.options[0].saved)
    assert sizes[-1] == SEQ * 128256 * 4
    assert sum(sizes[:-1]) <= SEQ * (4096 * 2 + 16)


def test_an_expert_layer_of_deepseek_keeps_what_a_hand_count_says() -> None:
    """Per token.

    8 copies of h = 7168 before experts, 8 * 2 * 2048 behind their first product, 8 * 2048 before the second; the shared expert's 3 * 2048;
    stream and normed stream. Routing: 256 scores and 8 weights thrice in float32, 5 indices of 8 bytes for each choice.
    """
    base = preset("deepseek-v3")
    assert base.experts is not None
    workload = build(replace(base, layers=3, experts=replace(base.experts, dense_first_layers=1)), MEGATRON, ep=8)
    large = 2 * SEQ * (8 * (7168 + 3 * 2048) + 3 * 2048 + 2 * 7168)
    small = SEQ * (256 * 4 + 8 * 3 * 4 + 8 * 5 * 8 + 2 * 4)
    assert large < kept_bytes(named(workload, "experts")) <= large + small


def test_latent_attention_keeps_heads_and_bottlenecks() -> None:
    """Per token, in two bytes.

    Stream and normed stream (7168), both bottlenecks as made and normed (1536; 512 + 64 and 512), queries and keys of
    128 * 192, values and results of 128 * 128.
    """
    workload = build(replace(preset("deepseek-v3"), layers=1), MEGATRON)
    elements = 2 * 7168 + 2 * 1536 + 576 + 512 + 2 * 128 * 192 + 2 * 128 * 128
    assert kept_bytes(named(workload, "attention")) == pytest.approx(2 * SEQ * elements, rel=0.01)


def test_a_mixtral_layer_keeps_no_results_of_experts() -> None:
    """Per token: 2 of 8 experts, h = 4096, width 14336."""
    workload = build(replace(preset("mixtral-8x7b"), layers=2), MEGATRON)
    large = 2 * SEQ * (2 * (4096 + 3 * 14336) + 2 * 4096)
    assert large < kept_bytes(named(workload, "experts")) < large * 1.01


@given(
    name=st.sampled_from(["llama3-8b", "mixtral-8x7b", "deepseek-v3", "gpt2"]), tp=st.sampled_from([1, 2, 4]),
    flags=st.fixed_dictionaries({field: st.booleans() for field in ("norm", "gated", "rotary", "routed", "attention_inputs", "loss")}),
)  # fmt: skip
def test_fusing_keeps_flops_and_parameters_and_costs_no_memory(name: str, tp: int, flags: dict[str, bool]) -> None:
    config = replace(preset(name), layers=4, experts=None if name != "mixtral-8x7b" else preset(name).experts)
    plain, fused = (build(config, operators, tp=tp, seq_len=256) for operators in (EAGER, Operators(**flags)))
    assert fused.model_flops == plain.model_flops
    assert fused.parameter_elements == plain.parameter_elements
    slack = 256 * 4096 * 4 * 16  # values that are copied out of a common product may come on top of it
    assert sum(map(kept_bytes, fused.blocks)) <= sum(map(kept_bytes, plain.blocks)) + slack


def test_each_pass_returns_memory_to_where_it_was() -> None:
    for name in ("llama3-8b", "mixtral-8x7b", "deepseek-v3"):
        for block in build(replace(preset(name), layers=4), MEGATRON).blocks:
            for option in block.options:
                left = sum(event.delta_bytes for event in option.forward.memory if event.buffer in {"internal", "transient"})
                back = sum(event.delta_bytes for event in option.backward.memory if event.buffer in {"internal", "transient"})
                assert left == -back


def kept_by_layers(operators: Operators, **changes: object) -> tuple[int, int]:
    """Bytes that ``selective`` keeps of an attention half and of a network of Llama 3 8B."""
    workload = build(replace(preset("llama3-8b"), layers=2), operators, **changes)
    attention, network = (
        sum(tensor.size_bytes for tensor in named(workload, name).option("selective").saved)
        for name in ("attention", "network")
    )
    return attention, network


def test_every_second_linear_layer_runs_again() -> None:
    """Llama 3 8B, h = 4096, one token: of the attention half the input, query (h), values (h / 4), mixed values (h) and 32 sums stay; of the network gate (3.5 h), down (h).

    The stream between the halves is made again (one product more), since both are one checkpoint; the head has no such option.
    """
    stream = SEQ * 4096 * 2
    assert kept_by_layers(TORCHTITAN) == (stream * 13 // 4 + SEQ * 32 * 4, stream * 9 // 2)
    workload = build(replace(preset("llama3-8b"), layers=2), TORCHTITAN)
    option = named(workload, "network").option("selective")
    assert sum(kernel.kernel_class == "gemm" for kernel in option.backward.kernels) == 8
    assert not option.keeps_input
    assert [one.name for one in named(workload, "head").options] == ["all"]


def test_what_no_backward_pass_reads_is_not_kept_by_a_compiled_layer() -> None:
    """The result of the network's last product (h)."""
    stream = SEQ * 4096 * 2
    compiled = replace(TORCHTITAN, unread=False)
    assert kept_by_layers(compiled) == (stream * 13 // 4 + SEQ * 32 * 4, stream * 7 // 2)


def test_a_scattered_sum_is_kept_between_the_halves() -> None:
    """Two ranks with sequence parallelism: the network's input is half of the stream, gate and down half of 3.5 h and all of h (whose sum is scattered)."""
    stream = SEQ * 4096 * 2
    _, network = kept_by_layers(TORCHTITAN, tp=2, sequence_parallel=True)
    assert network == stream // 2 + stream * 7 // 4 + stream


def test_gathered_inputs_stay_where_they_are_gathered_once() -> None:
    """70B over 4 ranks, in elements of the stream a token: what the norms make is kept by the rank's quarter, or whole, once for each half."""
    config, split = replace(preset("llama3-70b"), layers=2), {"tp": 4, "sequence_parallel": True}
    again, once = (build(config, Operators(norm=True, gathers_once=flag), **split) for flag in (False, True))
    for name in ("attention", "network"):
        more = sum(one.size_bytes for one in named(once, name).options[0].saved) - sum(
            one.size_bytes for one in named(again, name).options[0].saved
        )
        assert more == SEQ * 8192 * 2 * 3 // 4


@pytest.mark.parametrize(("tp", "most"), [(1, 3), (2, 4)])
def test_a_loss_over_a_split_vocabulary_needs_four_tensors_of_logits(tp: int, most: int) -> None:
    """Log-probabilities, and in torch's kernel two gradients; written out: the labels' tensor, exponentials and their sum."""
    workload = build(replace(preset("llama3-8b"), layers=2), TORCHTITAN, tp=tp, sequence_parallel=tp > 1)
    option = named(workload, "head").options[0]
    logits = SEQ * 128256 // tp * 4
    kept = max(tensor.size_bytes for tensor in option.saved)
    assert kept == logits
    alive = rise = 0
    for event in option.backward.memory:
        alive += event.delta_bytes
        rise = max(rise, alive)
    assert kept + rise == pytest.approx(most * logits, rel=1e-4)


@given(st.sampled_from([2, 4]), st.sampled_from([256, 512, 1024]))
def test_a_finer_split_of_the_vocabulary_never_needs_more(tp: int, seq_len: int) -> None:
    def rise(degree: int) -> int:
        config = replace(preset("llama3-8b"), layers=1)
        workload = build(config, TORCHTITAN, tp=degree, seq_len=seq_len, sequence_parallel=True)
        alive = most = 0
        for event in named(workload, "head").options[0].backward.memory:
            alive += event.delta_bytes
            most = max(most, alive)
        return most

    assert rise(2 * tp) < rise(tp)


def test_gathered_logits_cost_each_rank_the_whole_loss() -> None:
    """Two ranks: of a vocabulary of 128256 each keeps log-probabilities in float32 and the logits in two bytes; the loss's passes are as long as on one rank."""
    own = OPERATORS["aa-scaling"]
    config = replace(preset("llama3-8b"), layers=2)
    head = named(build(config, own, tp=2), "head")
    large = sorted(tensor.size_bytes for tensor in head.options[0].saved)[-2:]
    assert large == [SEQ * 128256 * 2, SEQ * 128256 * 4]
    alone = named(build(config, own), "head")
    loss = {kernel.op: kernel for kernel in alone.discard.kernels if kernel.op in {"_log_softmax", "argmax"}}
    assert {op: next(one for one in head.discard.kernels if one.op == op) for op in loss} == loss
    assert sum(kernel.op == "cat" for kernel in head.discard.kernels) == 1
    assert not any(kernel.op == "cat" for kernel in alone.discard.kernels)


def test_repeated_keys_are_copied_for_each_head_and_their_gradients_summed() -> None:
    """70B: keys and values of 8 heads become those of 64; attention keeps 1 + 1 of the stream in place of 2/8, and its kernel knows no groups."""
    config = replace(preset("llama3-70b"), layers=2)
    shared, repeated = (named(build(config, Operators(repeated_keys=flag)), "attention").options[0] for flag in (False, True))
    kept = [sum(tensor.size_bytes for tensor in option.saved) for option in (shared, repeated)]
    assert kept[1] - kept[0] == SEQ * 8192 * 2 * 2 * 7 // 8
    (kernel,) = [one for one in repeated.forward.kernels if one.kernel_class == "attention"]
    assert kernel.shape[1:3] == (64, 64)
    summed = [one for one in repeated.backward.kernels if one.op == "sum" and one not in shared.backward.kernels]
    assert [one.shape for one in summed] == [(SEQ * 1024, 8)] * 2
