"""Presets: published parameter counts, closed forms of FLOPs and saved bytes, sharding, memory that balances, messages."""

from __future__ import annotations

import subprocess
import sys

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InputError, UnknownNameError
from simulator.presets import PRESETS, Experts, TransformerConfig, build_workload, preset
from simulator.workload import Block, Pass, Workload

PUBLISHED_PARAMETERS = {
    "gpt2": 124_439_808, "gpt2-medium": 354_823_168, "gpt2-large": 774_030_080, "gpt2-xl": 1_557_611_200,
    "llama2-7b": 6_738_415_616, "llama2-13b": 13_015_864_320, "llama2-70b": 68_976_648_192,
    "llama3-8b": 8_030_261_248, "llama3-70b": 70_553_706_496, "llama3-405b": 405_853_388_800,
    "mistral-7b": 7_241_732_096, "mixtral-8x7b": 46_702_792_704, "mixtral-8x22b": 140_620_634_112,
    "deepseek-v3": 671_026_404_352, "bert-base": 109_514_298, "bert-large": 335_174_458,
    "vit-s16": 22_050_664, "vit-b16": 86_567_656, "vit-l16": 304_326_632,
}  # fmt: skip
NAMED_SIZES = {"gpt3-175b": 175e9, "megatron-22b": 22e9, "megatron-175b": 175e9, "megatron-530b": 530e9, "megatron-1t": 1008e9}
SIZE_TOLERANCE = 0.005
KORTHIKANTI_TOLERANCE = 0.01


def build(name: str, **changes: object) -> Workload:
    config = PRESETS[name]
    return build_workload(config, **{"micro_batch": 1, "seq_len": min(config.max_positions, 2048), **changes})  # type: ignore[arg-type]


def saved_per_layer(workload: Workload) -> int:
    """Bytes that one layer leaves for its backward pass: both halves' own, and the boundaries before them where they are kept."""
    halves = workload.blocks[1:3]
    return sum(half.options[0].saved_internal_bytes + half.input_bytes * half.options[0].keeps_input for half in halves)


@pytest.mark.parametrize(("name", "expected"), PUBLISHED_PARAMETERS.items())
def test_parameters_are_the_published_ones(name: str, expected: int) -> None:
    assert build(name).parameter_elements == expected
    assert sum(build(name).optimizer_tensors) == expected


@pytest.mark.parametrize(("name", "expected"), NAMED_SIZES.items())
def test_models_without_published_counts_have_their_named_size(name: str, expected: float) -> None:
    assert build(name).parameter_elements == pytest.approx(expected, rel=SIZE_TOLERANCE)


def test_every_preset_cites_its_source() -> None:
    assert all(config.source for config in PRESETS.values())


def test_flops_of_a_gpt_layer_follow_the_closed_form() -> None:
    """Narayanan et al. 2021, appendix: 24 B s h^2 + 4 B s^2 h per layer forward, 2 B s h V for the head."""
    config, batch, s = PRESETS["megatron-22b"], 2, 2048
    h = config.hidden
    workload = build("megatron-22b", micro_batch=batch)
    layer = 24 * batch * s * h**2 + 4 * batch * s**2 * h
    assert workload.forward_flops == config.layers * layer + 2 * batch * s * h * config.vocab
    assert workload.model_flops == 3 * workload.forward_flops


@pytest.mark.parametrize("name", ["megatron-22b", "megatron-175b", "megatron-530b", "megatron-1t"])
@pytest.mark.parametrize(("tp", "sequence_parallel"), [(1, False), (8, False), (8, True)])
def test_saved_bytes_follow_korthikanti(name: str, tp: int, sequence_parallel: bool) -> None:
    """Korthikanti et al. 2022, equations 1, 2 and 4: activations of a layer in 16 bits without flash attention."""
    config, s, b = PRESETS[name], 2048, 1
    h, a = config.hidden, config.heads
    scores = 5 * a * s / h
    expected = {
        (1, False): s * b * h * (34 + scores),
        (8, False): s * b * h * (10 + 24 / 8 + scores / 8),
        (8, True): s * b * h / 8 * (34 + scores),
    }[tp, sequence_parallel]
    workload = build(name, tp=tp, sequence_parallel=sequence_parallel, flash_attention=False)
    assert saved_per_layer(workload) == pytest.approx(expected, rel=KORTHIKANTI_TOLERANCE)


def test_flash_attention_saves_what_selective_recomputation_of_scores_does() -> None:
    """Korthikanti et al. 2022, equation 6: 34 s b h / t with sequence parallelism."""
    config, s = PRESETS["megatron-175b"], 2048
    workload = build("megatron-175b", tp=8, sequence_parallel=True)
    assert saved_per_layer(workload) == pytest.approx(34 * s * config.hidden / 8, rel=KORTHIKANTI_TOLERANCE)


@pytest.mark.parametrize("name", ["megatron-22b", "llama3-8b", "mixtral-8x7b", "deepseek-v3", "bert-base"])
@pytest.mark.parametrize("tp", [2, 4])
def test_tensor_parallel_ranks_share_the_products(name: str, tp: int) -> None:
    """Each rank does 1/tp of the FLOPs of the layers, routers and low-rank projections aside."""
    whole, shard = build(name), build(name, tp=tp)
    replicated = whole.forward_flops - tp * shard.forward_flops
    assert abs(replicated) <= 0.2 * whole.forward_flops * tp
    if PRESETS[name].experts is None and PRESETS[name].head == "causal_lm":
        assert shard.forward_flops * tp == whole.forward_flops
    assert whole.parameter_elements / tp <= shard.parameter_elements < 1.3 * whole.parameter_elements / tp


def test_expert_parallelism_splits_the_experts_and_not_the_work() -> None:
    whole, shard = build("mixtral-8x7b"), build("mixtral-8x7b", ep=4)
    config = PRESETS["mixtral-8x7b"]
    experts = config.layers * 8 * 3 * config.hidden * config.ffn
    assert whole.parameter_elements - shard.parameter_elements == experts * 3 // 4
    assert whole.forward_flops == shard.forward_flops


def test_context_parallelism_splits_tokens_and_attends_to_all() -> None:
    whole, shard = build("llama3-8b", seq_len=8192), build("llama3-8b", seq_len=8192, cp=4)
    assert 4 * shard.forward_flops == whole.forward_flops
    assert saved_per_layer(whole) == 4 * saved_per_layer(shard)
    attention = next(k for k in shard.blocks[1].discard.kernels if k.kernel_class == "attention")
    assert attention.shape == (1, 32, 8, 2048, 8192, 128, 1)


def test_fewer_key_value_heads_than_ranks_are_replicated() -> None:
    attention = next(k for k in build("llama3-8b", tp=16).blocks[1].discard.kernels if k.kernel_class == "attention")
    assert attention.shape[1:3] == (2, 1)


def test_a_padded_vocabulary_is_said() -> None:
    assert "vocabulary padded from 50257 to 50260 for tp=4" in build("gpt2", tp=4).notes


def test_identical_layers_are_one_object() -> None:
    workload = build("gpt2")
    assert [block.name for block in workload.blocks] == ["embedding", *["attention", "network"] * 12, "head"]
    assert len({id(block) for block in workload.blocks}) == 5
    assert workload.blocks[-2] is not workload.blocks[2]


def nets(run: Pass) -> dict[str, int]:
    total: dict[str, int] = {}
    for event in run.memory:
        total[event.buffer] = total.get(event.buffer, 0) + event.delta_bytes
    return total


def check_balance(block: Block, first: bool) -> None:
    for option in block.options:
        forward = nets(option.forward)
        assert forward["output"] == block.output_bytes
        assert forward.get("transient", 0) == 0
        for run in (option.backward, option.backward_accumulate):
            backward = nets(run)
            assert backward.get("internal", 0) == -option.saved_internal_bytes
            assert backward.get("saved_input", 0) == -block.input_bytes * option.keeps_input
            assert backward.get("transient", 0) == 0
            assert first or backward["grad_input"] == block.input_bytes
            assert all(0 <= event.kernel <= len(run.kernels) for event in run.memory)
        assert nets(option.backward).get("gradient", 0) == block.gradient_bytes
        assert "gradient" not in nets(option.backward_accumulate)
    assert "internal" not in nets(block.discard)


@pytest.mark.parametrize("name", PRESETS)
def test_memory_balances(name: str) -> None:
    workload = build(name)
    for index, block in enumerate(workload.blocks):
        check_balance(block, first=index == 0)
    shared = sum(nets(block.options[0].backward).get("shared_gradient", 0) for block in workload.blocks)
    assert shared == workload.shared_gradient_bytes


@settings(deadline=None, max_examples=40)
@given(
    layers=st.integers(1, 3), heads=st.sampled_from([2, 4, 8]), width=st.sampled_from([8, 16]), tp=st.sampled_from([1, 2]),
    batch=st.integers(1, 3), seq_len=st.sampled_from([4, 8, 12]), norm=st.sampled_from(["layer_norm", "rms_norm"]),
    positions=st.sampled_from(["learned", "rotary"]), tied=st.booleans(), moe=st.booleans(), flash=st.booleans(),
    dropout=st.sampled_from([0.0, 0.1]), dtype=st.sampled_from(["float32", "bfloat16"]),
)  # fmt: skip
def test_any_configuration_balances_and_keeps_less_when_selective(
    layers: int, heads: int, width: int, tp: int, batch: int, seq_len: int, norm: str, positions: str, tied: bool, moe: bool,
    flash: bool, dropout: float, dtype: str,
) -> None:  # fmt: skip
    config = TransformerConfig(
        name="any", source="test", layers=layers, hidden=heads * width, heads=heads, ffn=32, vocab=40, max_positions=16, norm=norm,  # type: ignore[arg-type]
        positions=positions, tied=tied, dropout=dropout, experts=Experts(num_experts=4, top_k=2, ffn=16) if moe else None,  # type: ignore[arg-type]
    )  # fmt: skip
    workload = build_workload(
        config, micro_batch=batch, seq_len=seq_len, dtype=dtype, tp=tp, sequence_parallel=tp > 1, flash_attention=flash
    )
    for index, block in enumerate(workload.blocks):
        check_balance(block, first=index == 0)
        saved = [option.saved_internal_bytes for option in block.options]
        assert saved == sorted(saved, reverse=True)
    assert workload.model_flops == 3 * workload.forward_flops


def test_twice_the_micro_batch_is_twice_the_work() -> None:
    one, two = build("llama3-8b"), build("llama3-8b", micro_batch=2)
    assert two.forward_flops == 2 * one.forward_flops
    assert saved_per_layer(two) == 2 * saved_per_layer(one)
    assert two.parameter_elements == one.parameter_elements


@pytest.mark.parametrize(("changes", "message"), [
    ({"tp": 5}, r"model gpt2: tp = 5: heads % tp == 0 must hold, but got 12 % 5 = 2; use tp of 1, 2, 3, 4, 6"),
    ({"cp": 3}, r"seq_len % cp == 0 must hold, but got 1024 % 3 = 1"),
    ({"ep": 2}, r"ep = 2: ep == 1 must hold for a model without experts"),
    ({"seq_len": 4096}, r"seq_len <= max_positions must hold, but got 4096 > 1024"),
    ({"dtype": "bf16"}, r"dtype = 'bf16': must be one of float64, float32, float16, bfloat16"),
    ({"micro_batch": 0}, r"micro_batch = 0: micro_batch >= 1 must hold"),
    ({"cp": 2, "flash_attention": False}, r"flash_attention = False: must be true where cp > 1"),
])  # fmt: skip
def test_broken_rules_say_what_would_do(changes: dict[str, object], message: str) -> None:
    with pytest.raises(InputError, match=message):
        build("gpt2", **changes)


def test_flash_attention_with_dropout_is_refused_on_the_cpu() -> None:
    with pytest.raises(InputError, match=r"must be false on the cpu with dropout = 0\.1.*; trace the model instead"):
        build("gpt2", device="cpu")


def test_experts_must_divide() -> None:
    with pytest.raises(InputError, match=r"experts.num_experts % ep == 0 must hold, but got 8 % 3 = 2; use ep of 1, 2, 4"):
        build("mixtral-8x7b", ep=3)


def test_a_configuration_checks_itself() -> None:
    with pytest.raises(InputError, match="model bad: heads = 3: hidden % heads == 0 must hold, but got 64 % 3 = 1"):
        TransformerConfig(name="bad", source="test", layers=1, hidden=64, heads=3, ffn=8, vocab=8, max_positions=8)


def test_an_unknown_preset_lists_the_known_ones() -> None:
    with pytest.raises(UnknownNameError, match="presets: name = 'gpt5': unknown name; known are gpt2, gpt2-medium"):
        preset("gpt5")


def test_presets_import_no_torch() -> None:
    code = (
        "import sys; from simulator.presets import PRESETS, build_workload; "
        "build_workload(PRESETS['gpt2'], micro_batch=1, seq_len=64); assert 'torch' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)
