"""Experts' plans: what the papers print, legal for the trainer, on exactly the devices of the request."""

from __future__ import annotations

import pytest

from hardware_models.network.cluster_file import load_cluster
from search.joint.experts import experts
from search.joint.published_plans import PUBLISHED, PublishedPlan
from search.joint.space import JointRequest
from search.trainers import TRAINERS, violations
from simulator.plan import Plan, check_gpus, check_model
from simulator.presets import preset


def request(
    model: str, gpus: int, batch: int, *, trainer: str = "any", seq_len: int = 2048, cluster: str = "selene"
) -> JointRequest:
    return JointRequest(
        config=preset(model), seq_len=seq_len, global_batch=batch, cluster=load_cluster(cluster).with_gpus(gpus), trainer=TRAINERS[trainer]
    )  # fmt: skip


def plans(asked: JointRequest, name: str) -> tuple[Plan, ...]:
    return next((one.plans for one in experts(asked) if one.name.startswith(name)), ())


@pytest.mark.parametrize("trainer", sorted(TRAINERS))
@pytest.mark.parametrize(
    ("model", "gpus", "batch", "seq_len", "cluster"),
    [
        ("gpt3-175b", 768, 1536, 2048, "selene"), ("megatron-530b", 2240, 1920, 2048, "selene"), ("llama3-405b", 16384, 2048, 8192, "hgx-h100"),
        ("mixtral-8x7b", 64, 256, 4096, "hgx-h100"), ("deepseek-v3", 2048, 15360, 4096, "hgx-h100"), ("gpt2-xl", 5, 20, 1024, "selene"), ("gpt2", 7, 7, 1024, "selene"),
    ],
)  # fmt: skip
def test_every_plan_of_an_expert_is_legal_and_uses_all_devices(
    model: str, gpus: int, batch: int, seq_len: int, cluster: str, trainer: str
) -> None:
    asked = request(model, gpus, batch, trainer=trainer, seq_len=seq_len, cluster=cluster)
    found, config = experts(asked), asked.config
    assert len({one.name for one in found}) == len(found)
    assert (
        found or trainer == "pytorch"
    )  # a plain module is not split by tp, cp or ep, so that a batch below the devices leaves it nothing
    for plan in (plan for one in found for plan in one.plans):
        check_gpus(plan, gpus)
        check_model(
            plan, heads=config.heads, kv_heads=config.num_kv_heads, layers=config.layers, experts=config.experts.num_experts if config.experts else None, seq_len=seq_len
        )  # fmt: skip
        assert violations(plan, TRAINERS[trainer], layers=config.layers) == ()
        assert plan.batch.global_batch == batch


def test_mt_nlg_runs_as_its_paper_says() -> None:
    """2,240 devices: 8 tensor ranks, 35 stages of 3 layers, 8 replicas, full recompute, no sequence parallelism; micro-batches of one sample."""
    (plan,) = plans(request("megatron-530b", 2240, 1920), "published plan, MT-NLG")
    split = plan.parallel
    assert (split.tp, split.pp, split.dp, split.virtual_stages, split.sequence_parallel) == (8, 35, 8, 1, False)
    assert (plan.pipeline.schedule, plan.memory.recompute, plan.memory.zero_stage, plan.num_microbatches) == (
        "1f1b",
        "full",
        0,
        240,
    )


def test_gpt3_runs_as_both_papers_say() -> None:
    asked = request("gpt3-175b", 768, 1536)
    (first,), (second,) = plans(asked, "published plan, SC'21"), plans(asked, "published plan, selective")
    assert (first.parallel.tp, first.parallel.pp, first.parallel.dp, first.parallel.virtual_stages) == (8, 12, 8, 4)
    assert (first.memory.recompute, first.parallel.sequence_parallel) == ("full", False)
    assert (second.parallel.tp, second.parallel.pp, second.parallel.dp, second.parallel.virtual_stages) == (8, 8, 12, 3)
    assert (second.memory.recompute, second.parallel.sequence_parallel) == ("selective", True)
    assert plans(request("gpt3-175b", 512, 512), "published plan, SC'21") == ()  # 96 ranks of a replica do not divide 512


@pytest.mark.parametrize(("seq_len", "batch", "cp", "dp"), [(8192, 2048, 1, 128), (131072, 128, 16, 8)])
def test_llama3_spares_a_layer_on_both_ends(seq_len: int, batch: int, cp: int, dp: int) -> None:
    found = plans(request("llama3-405b", 16384, batch, seq_len=seq_len, cluster="hgx-h100"), "published plan")
    assert [plan.parallel.virtual_stages for plan in found] == [1, 2, 4, 8]
    for plan in found:
        chunk = 8 // plan.parallel.virtual_stages
        assert plan.pipeline.partition == (chunk - 1, *(chunk,) * (plan.num_stages - 2), chunk - 1)
        assert (plan.parallel.tp, plan.parallel.cp, plan.parallel.pp, plan.parallel.dp, plan.memory.zero_stage) == (
            8,
            cp,
            16,
            dp,
            2,
        )


def test_mixtures_spread_their_experts() -> None:
    found = plans(request("mixtral-8x7b", 64, 256, seq_len=4096, cluster="hgx-h100"), "Megatron's rule for mixtures")
    assert {(plan.parallel.ep, plan.parallel.tp) for plan in found} == {(8, 1)}
    assert {plan.parallel.pp for plan in found} >= {1, 2, 4, 8}
    (plan,) = plans(request("deepseek-v3", 2048, 15360, seq_len=4096, cluster="hgx-h100"), "published plan")
    assert (plan.parallel.pp, plan.parallel.ep, plan.parallel.dp, plan.pipeline.schedule, plan.memory.zero_stage) == (
        16,
        64,
        128,
        "dualpipe",
        1,
    )
    assert plans(request("gpt3-175b", 64, 64), "Megatron's rule for mixtures") == ()


def test_full_sharding_comes_with_and_without_the_host() -> None:
    asked = request("gpt2-xl", 8, 64, seq_len=1024)
    for name, recompute, away in [
        ("full sharding, each block", "full", (0.0, 0.0)), ("full sharding, nothing", "none", (0.0, 0.0)), ("full sharding, optimizer", "full", (1.0, 0.0)),
        ("full sharding, model states", "full", (1.0, 1.0)),
    ]:  # fmt: skip
        found = plans(asked, name)
        assert [plan.batch.micro_batch for plan in found] == [1, 2, 4, 8]
        assert {(plan.parallel.dp, plan.memory.zero_stage, plan.memory.recompute) for plan in found} == {(8, 3, recompute)}
        assert {(plan.memory.optimizer_offload, plan.memory.weight_offload) for plan in found} == {away}
    only_whole = request("gpt2-xl", 8, 64, seq_len=1024, trainer="torchtitan")
    assert plans(only_whole, "full sharding, optimizer") == ()  # CPUOffloadPolicy moves parameters too
    assert plans(only_whole, "full sharding, model states")


def test_a_cut_without_room_for_spared_layers_is_none() -> None:
    paper = PUBLISHED["llama3-405b"][0]
    assert isinstance(paper, PublishedPlan)
    assert paper.partition(125, 1) is None  # 127 places on 16 stages
    assert paper.partition(14, 1) == (0, *(1,) * 14, 0)
