"""Volumes of collectives and messages worked out by hand, priced by the same cluster."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.network.cluster import CommGroup
from hardware_models.network.collectives import collective_seconds
from hardware_models.network.overlap import OverlapFactors
from simulator.parallel.communication import Behind, Communication, Exposed, StageCommunication
from simulator.parallel.early_stop import with_early_stop
from simulator.parallel.mesh import mesh_of
from simulator.parallel.stages import stages_of
from simulator.plan import Plan
from simulator.presets import TransformerConfig, build_workload, preset
from simulator.workload import Block
from tests.simulator.parallel.step_cases import NO_SLOWDOWN, SEQ_LEN, cluster_of, plan_of, small_config

HIDDEN, BF16 = 1024, 2
STREAM = SEQ_LEN * HIDDEN * BF16
"""Bytes of one sample's residual stream."""
FACTORS = OverlapFactors(
    compute_under_collectives=1.2,
    compute_under_copies=1.0,
    collectives_under_compute=1.5,
    evidence="published",
    source="a test",
)


def communication(plan: Plan, config: TransformerConfig | None = None) -> Communication:
    return Communication(
        plan, mesh_of(plan, cluster_of(plan)), config or small_config(), dtype="bfloat16", seq_len=SEQ_LEN, factors=NO_SLOWDOWN
    )


def blocks(plan: Plan, config: TransformerConfig | None = None) -> dict[str, Block]:
    split = plan.parallel
    workload = build_workload(
        config or small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16", tp=split.tp, cp=split.cp, ep=split.ep,
        sequence_parallel=split.sequence_parallel,
    )  # fmt: skip
    return {block.name: block for block in workload.blocks}


def seconds(plan: Plan, collective: str, size_bytes: float, **group: int) -> float:
    return collective_seconds(collective, size_bytes, CommGroup(**group), cluster_of(plan))


def exposed(
    plan: Plan, name: str, *, backward: bool = False, attention_s: float = 0.0, config: TransformerConfig | None = None
) -> Exposed:
    return communication(plan, config).block(blocks(plan, config)[name], attention_s, backward=backward)


@pytest.mark.parametrize("name", ["attention", "network"])
def test_tensor_parallel_halves_reduce_the_stream_each_way(name: str) -> None:
    plan = plan_of(tp=8)
    one_s = seconds(plan, "all_reduce", STREAM, num_ranks=8, ranks_per_node=8)
    assert exposed(plan, name) == exposed(plan, name, backward=True) == Exposed(tp_s=one_s)


@pytest.mark.parametrize("name", ["attention", "network"])
def test_sequence_parallelism_gathers_and_scatters_the_same_bytes(name: str) -> None:
    plan = plan_of(tp=8, sequence_parallel=True)
    gather_s, scatter_s = (
        seconds(plan, kind, STREAM, num_ranks=8, ranks_per_node=8) for kind in ("all_gather", "reduce_scatter")
    )
    assert exposed(plan, name).tp_s == exposed(plan, name, backward=True).tp_s == gather_s + scatter_s


def test_the_embedding_is_reduced_forward_only() -> None:
    plan = plan_of(tp=8)
    assert exposed(plan, "embedding").tp_s == seconds(plan, "all_reduce", STREAM, num_ranks=8, ranks_per_node=8)
    assert exposed(plan, "embedding", backward=True) == Exposed()
    split = plan_of(tp=8, sequence_parallel=True)
    assert exposed(split, "embedding").tp_s == seconds(split, "reduce_scatter", STREAM, num_ranks=8, ranks_per_node=8)
    assert exposed(split, "embedding", backward=True).tp_s == seconds(
        split, "all_gather", STREAM, num_ranks=8, ranks_per_node=8
    )


def test_the_head_reduces_three_numbers_a_token_and_the_gradient() -> None:
    plan = plan_of(tp=8)
    assert exposed(plan, "head").tp_s == 3 * seconds(plan, "all_reduce", 4 * SEQ_LEN, num_ranks=8, ranks_per_node=8)
    assert exposed(plan, "head", backward=True).tp_s == seconds(plan, "all_reduce", STREAM, num_ranks=8, ranks_per_node=8)


def test_nothing_is_sent_on_one_device() -> None:
    assert {exposed(plan_of(), name, backward=backward) for name in blocks(plan_of()) for backward in (False, True)} == {
        Exposed()
    }


def test_a_ring_of_keys_hides_behind_attention() -> None:
    """Three rounds of keys and values of a quarter of the sequence; backward twice the bytes behind 2.5 times the time."""
    plan = plan_of(cp=4)
    message = 2 * SEQ_LEN // 4 * HIDDEN * BF16
    forward_s = seconds(plan, "send_recv", message, num_ranks=2, ranks_per_node=2)
    assert exposed(plan, "attention").cp_s == pytest.approx(3 * forward_s, rel=1e-12)
    part_s = forward_s / 2
    assert exposed(plan, "attention", attention_s=4 * part_s).cp_s == pytest.approx(3 * (forward_s - part_s), rel=1e-12)
    assert exposed(plan, "attention", attention_s=1.0).cp_s == 0.0
    backward_s = seconds(plan, "send_recv", 2 * message, num_ranks=2, ranks_per_node=2)
    assert exposed(plan, "attention", backward=True).cp_s == pytest.approx(3 * backward_s, rel=1e-12)


def test_all_to_all_context_parallelism_moves_query_key_value_and_result() -> None:
    plan = plan_of(cp=4, cp_method="all-to-all")
    one_s = seconds(plan, "all_to_all", SEQ_LEN // 4 * HIDDEN * BF16, num_ranks=4, ranks_per_node=4)
    assert exposed(plan, "attention").cp_s == pytest.approx(4 * one_s, rel=1e-12)


def routed_config(*, imbalance: float = 1.0, capacity_factor: float = 0.0) -> TransformerConfig:
    """Two layers of eight experts, two a token."""
    base = preset("mixtral-8x7b")
    assert base.experts is not None
    experts = replace(base.experts, ffn=2048, imbalance=imbalance, capacity_factor=capacity_factor)
    return replace(base, layers=2, hidden=HIDDEN, heads=16, kv_heads=16, ffn=2048, vocab=4096, experts=experts)


def test_experts_dispatch_and_combine() -> None:
    """Top 2 of 8 experts: each token's stream goes out twice and comes back twice."""
    plan = plan_of(dp=8, ep=8)
    one_s = seconds(plan, "all_to_all", 2 * STREAM, num_ranks=8, ranks_per_node=8)
    assert exposed(plan, "experts", config=routed_config()) == Exposed(ep_s=pytest.approx(2 * one_s, rel=1e-12))  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("imbalance", "capacity_factor", "load"), [(1.5, 0.0, 1.5), (8.0, 0.0, 8.0), (1.5, 1.25, 1.25), (1.0, 2.0, 2.0)]
)
def test_experts_wait_for_the_busiest_rank(imbalance: float, capacity_factor: float, load: float) -> None:
    plan, config = plan_of(dp=8, ep=8), routed_config(imbalance=imbalance, capacity_factor=capacity_factor)
    one_s = seconds(plan, "all_to_all", 2 * STREAM * load, num_ranks=8, ranks_per_node=8)
    assert exposed(plan, "experts", config=config).ep_s == pytest.approx(2 * one_s, rel=1e-12)


@pytest.mark.parametrize("size", [1e4, 1e9])
def test_deepspeed_exchanges_inside_nodes_first_where_that_is_faster(size: float) -> None:
    """Over four nodes 31 messages become 7 and 3; the same bytes travel twice."""
    steps = ({"num_ranks": 8, "ranks_per_node": 8}, {"num_ranks": 4, "ranks_per_node": 1, "concurrent_groups": 8})
    for framework in ("deepspeed", "megatron-core"):
        plan = plan_of(dp=32, ep=32, framework=framework)
        flat_s = seconds(plan, "all_to_all", size, num_ranks=32, ranks_per_node=8)
        twice_s = sum(seconds(plan, "all_to_all", size, **step) for step in steps)
        expected = min(flat_s, twice_s) if framework == "deepspeed" else flat_s
        assert communication(plan).routed_seconds(size) == pytest.approx(expected, rel=1e-12)


def test_a_ring_and_attention_slow_each_other() -> None:
    """A block and a transfer of the same length: both at 1/1.2 and 1/1.5 until the block has ended."""
    plan = plan_of(cp=4)
    own = communication(plan)
    message = 2 * SEQ_LEN // 4 * HIDDEN * BF16
    step_s = seconds(plan, "send_recv", message, num_ranks=2, ranks_per_node=2)
    own.factors = FACTORS
    block = blocks(plan)["attention"]
    together_s = 1.2 * step_s + (step_s - 1.2 * step_s / 1.5)
    assert own.block(block, 4 * step_s).cp_s == pytest.approx(3 * (together_s - step_s), rel=1e-9)


def of_stage(plan: Plan, index: int) -> StageCommunication:
    workload = build_workload(
        small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16", tp=plan.parallel.tp, sequence_parallel=plan.parallel.sequence_parallel
    )  # fmt: skip
    return communication(plan).stage(stages_of(workload, plan)[index], recomputed=(), attention_s=0.0)


@pytest.mark.parametrize(
    ("framework", "sequence_parallel", "parts"),
    [("megatron-core", False, 1), ("megatron-core", True, 8), ("megatron-lm@2021", False, 8), ("megatron-lm@2021", True, 8)],
)
def test_messages_are_split_over_tp(framework: str, sequence_parallel: bool, parts: int) -> None:
    plan = plan_of(tp=8, pp=2, framework=framework, sequence_parallel=sequence_parallel)
    assert of_stage(plan, 0).message_bytes == STREAM / parts


def test_scattered_messages_are_gathered_where_they_arrive() -> None:
    """Stage 1 of 3 gathers what comes from both sides, stage 0 only gradients."""
    plans = {framework: plan_of(tp=8, pp=4, framework=framework) for framework in ("megatron-core", "megatron-lm@2021")}
    gather_s = seconds(plans["megatron-core"], "all_gather", STREAM, num_ranks=8, ranks_per_node=8)
    for index, (forward, backward) in enumerate([(0, 1), (1, 1), (1, 1), (1, 0)]):
        plain, scattered = (of_stage(plans[name], index) for name in ("megatron-core", "megatron-lm@2021"))
        assert scattered.forward.tp_s - plain.forward.tp_s == pytest.approx(forward * gather_s, rel=1e-9)
        assert scattered.backward.tp_s - plain.backward.tp_s == pytest.approx(backward * gather_s, rel=1e-9)


def test_recomputed_blocks_communicate_again() -> None:
    plan = plan_of(tp=8, pp=2)
    workload = build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16", tp=8)
    stage = stages_of(workload, plan)[1]
    own = communication(plan)
    plain, again = (own.stage(stage, recomputed=blocks, attention_s=0.0) for blocks in ((), (0, 1)))
    reduce_s = seconds(plan, "all_reduce", STREAM, num_ranks=8, ranks_per_node=8)
    assert again.forward == plain.forward
    assert again.backward.tp_s - plain.backward.tp_s == pytest.approx(2 * reduce_s, rel=1e-9)


def test_gradients_are_reduced_over_context_parallel_ranks_too() -> None:
    plan = plan_of(cp=4)
    own = communication(plan)
    expected = seconds(plan, "all_reduce", 1e8, num_ranks=4, ranks_per_node=4)
    assert own.over("all_reduce", 1e8, own.mesh.gradient_group()) == expected > 0
    alone = communication(plan_of(tp=8))
    assert alone.over("all_reduce", 1e8, alone.mesh.gradient_group()) == 0.0


@pytest.mark.parametrize(
    ("collective_s", "product_s", "exposed_s"),
    [
        (2.0, 6.0, 3.0 - 3.0 / 1.2),  # 3 s together, in which the product does 2.5 s of its 6
        (6.0, 5.0, 6.0 + 2.0 - 5.0),  # 6 s together, in which the collective does 4 s of its 6
        (1.0, 0.0, 1.0),
        (0.0, 5.0, 0.0),
    ],
)
def test_a_sum_behind_a_product_shows_what_both_lose(collective_s: float, product_s: float, exposed_s: float) -> None:
    behind = Behind(product_s={"attention": product_s}, factors=FACTORS)
    assert behind.exposed_s("attention", collective_s) == pytest.approx(exposed_s, abs=1e-12)
    assert behind.exposed_s("network", collective_s) == pytest.approx(collective_s, abs=1e-12)


@pytest.mark.parametrize("sequence_parallel", [False, True])
def test_megatron_core_hides_the_sum_of_input_gradients(sequence_parallel: bool) -> None:
    """The gathering before it is waited for; forward passes and Megatron-LM of 2021 hide nothing."""
    plan = plan_of(tp=8, sequence_parallel=sequence_parallel)
    gather_s = seconds(plan, "all_gather", STREAM, num_ranks=8, ranks_per_node=8) if sequence_parallel else 0.0
    summed_s = seconds(plan, "reduce_scatter" if sequence_parallel else "all_reduce", STREAM, num_ranks=8, ranks_per_node=8)
    own = communication(plan)
    own.behind = Behind(product_s={"attention": 1.0}, factors=FACTORS)
    block = blocks(plan)["attention"]
    lost_s = 1.5 * summed_s * (1 - 1 / 1.2)
    assert own.block(block, 0.0, backward=True).tp_s == pytest.approx(gather_s + lost_s, rel=1e-9)
    assert own.block(block, 0.0).tp_s == pytest.approx(gather_s + summed_s, rel=1e-12)


def test_logits_may_be_gathered_in_place_of_three_sums() -> None:
    plan = plan_of(tp=8, framework="aa-scaling")
    whole = float(SEQ_LEN * small_config().vocab * BF16)
    assert exposed(plan, "head").tp_s == seconds(plan, "all_gather", whole, num_ranks=8, ranks_per_node=8)
    assert exposed(plan, "head", backward=True).tp_s == seconds(plan, "all_reduce", STREAM, num_ranks=8, ranks_per_node=8)


@pytest.mark.parametrize(
    ("framework", "compute", "width"),
    [("torchtitan", "fp8", 1), ("torchtitan", "bf16", 2), ("megatron-core", "fp8", 1), ("pytorch", "fp8", 2)],
)
def test_streams_are_gathered_in_the_format_that_products_read(framework: str, compute: str, width: int) -> None:
    plan = plan_of(tp=8, sequence_parallel=True)
    plan = replace(plan, runtime=replace(plan.runtime, framework=framework), precision=replace(plan.precision, compute=compute))  # type: ignore[arg-type]
    gather_s = seconds(plan, "all_gather", STREAM * width / BF16, num_ranks=8, ranks_per_node=8)
    scatter_s = seconds(plan, "reduce_scatter", STREAM, num_ranks=8, ranks_per_node=8)
    assert exposed(plan, "network").tp_s == pytest.approx(gather_s + scatter_s)
    assert exposed(plan, "network", backward=True).tp_s == pytest.approx(gather_s + scatter_s)


def test_selective_checkpointing_of_torchtitan_gathers_inputs_again() -> None:
    plan = plan_of(tp=8, sequence_parallel=True)
    plan = replace(plan, runtime=replace(plan.runtime, framework="torchtitan"))
    gather_s = seconds(plan, "all_gather", STREAM, num_ranks=8, ranks_per_node=8)
    kept = exposed(plan, "network", backward=True).tp_s
    again = exposed(replace(plan, memory=replace(plan.memory, recompute="selective")), "network", backward=True).tp_s
    assert again == pytest.approx(kept + gather_s)


def test_a_layer_that_stops_early_gathers_but_does_not_scatter() -> None:
    plan = plan_of(tp=8, sequence_parallel=True)
    plan = replace(plan, runtime=replace(plan.runtime, framework="torchtitan"), memory=replace(plan.memory, recompute="full"))
    made = blocks(plan)
    stopping = with_early_stop(
        build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16", tp=8, sequence_parallel=True)
    )
    network = next(block for block in stopping.blocks if block.name == "network")
    gather_s = seconds(plan, "all_gather", STREAM, num_ranks=8, ranks_per_node=8)
    assert communication(plan).block(network, 0.0, again=True).tp_s == pytest.approx(gather_s)
    assert communication(plan).block(network, 0.0).tp_s == communication(plan).block(made["network"], 0.0).tp_s > gather_s


def test_bf16_on_the_wire_keeps_gathers_wide() -> None:
    plan = plan_of(tp=8, sequence_parallel=True, framework="torchtitan")
    eight = replace(plan, precision=replace(plan.precision, compute="fp8"))
    wide = replace(eight, precision=replace(eight.precision, comm="bf16"))
    assert exposed(wide, "network").tp_s == exposed(plan, "network").tp_s > exposed(eight, "network").tp_s


def test_streams_split_inside_samples_are_copied_into_order() -> None:
    """Of two samples; one gather and one scatter a half, forward and backward."""

    def waited(plan: Plan, *, backward: bool) -> float:
        made = Communication(
            plan, mesh_of(plan, cluster_of(plan)), small_config(), dtype="bfloat16", seq_len=SEQ_LEN, factors=NO_SLOWDOWN, copy_s=lambda size: size / 1e12
        )  # fmt: skip
        return made.block(blocks(plan)["network"], 0.0, backward=backward).tp_s

    plan = plan_of(tp=8, sequence_parallel=True, micro_batch=2, framework="torchtitan")
    for backward in (False, True):
        copied = waited(plan, backward=backward) - exposed(plan, "network", backward=backward).tp_s
        assert copied == pytest.approx(2 * 2 * STREAM / 1e12)
    for other in (
        plan_of(tp=8, sequence_parallel=True, framework="torchtitan"),
        replace(plan, runtime=replace(plan.runtime, framework="pytorch")),
        replace(plan, parallel=replace(plan.parallel, sequence_parallel=False)),
    ):
        assert waited(other, backward=False) == exposed(other, "network").tp_s


@pytest.mark.parametrize(
    ("framework", "activation", "sums"), [("aa-scaling", "swiglu", 2), ("aa-scaling", "gelu", 1), ("pytorch", "swiglu", 1)]
)
def test_gate_and_up_sum_their_input_gradients_each_where_the_trainer_does(framework: str, activation: str, sums: int) -> None:
    config = replace(small_config(), activation=activation)  # type: ignore[arg-type]
    plan = plan_of(tp=8, framework=framework, sequence_parallel=False)
    assert exposed(plan, "network", backward=True, config=config).tp_s == pytest.approx(
        sums * exposed(plan, "network", config=config).tp_s
    )
    split = plan_of(tp=8, framework=framework, sequence_parallel=True)
    assert exposed(split, "network", backward=True, config=config).tp_s == pytest.approx(
        exposed(split, "network", config=config).tp_s
    )


def test_torchs_ring_gathers_keys_of_all_heads_and_passes_gradients_in_float32() -> None:
    """Nothing to hide behind and copies for nothing: the gather of four ranks' keys and values; backward that and four messages of twice the bytes."""
    plan = plan_of(cp=4, framework="torchtitan")
    keys = 2 * SEQ_LEN // 4 * HIDDEN * BF16
    gather_s = seconds(plan, "all_gather", 4 * keys, num_ranks=4, ranks_per_node=4)
    pass_s = seconds(plan, "send_recv", 2 * keys, num_ranks=2, ranks_per_node=2)
    assert exposed(plan, "attention").cp_s == pytest.approx(gather_s, rel=1e-12)
    assert exposed(plan, "attention", backward=True).cp_s == pytest.approx(gather_s + 4 * pass_s, rel=1e-12)
    assert exposed(plan, "attention", attention_s=10.0, backward=True).cp_s == pytest.approx(pass_s, rel=1e-9)
