"""The outer space: legal plans only, exactly the devices asked for, none twice."""

from __future__ import annotations

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError
from hardware_models.network.cluster_file import load_cluster
from search.joint.space import JointRequest, JointSpace, joint_space
from search.trainers import TRAINERS, violations
from simulator.model_source import model_source
from simulator.plan import check_gpus, check_model


def space_of(
    model: str, gpus: int, batch: int, *, trainer: str = "any", seq_len: int = 2048, cluster: str = "selene"
) -> JointSpace:
    wired = load_cluster(cluster).with_gpus(gpus)
    config = model_source(model, device=load_hardware(wired.device)).config
    assert config is not None
    return joint_space(
        JointRequest(config=config, seq_len=seq_len, global_batch=batch, cluster=wired, trainer=TRAINERS[trainer])
    )  # fmt: skip


@pytest.mark.parametrize("trainer", sorted(TRAINERS))
@pytest.mark.parametrize(("model", "gpus", "batch"), [("gpt3-175b", 16, 16), ("mixtral-8x7b", 8, 12), ("llama3-8b", 24, 24)])
def test_every_plan_is_legal_and_uses_all_devices(model: str, gpus: int, batch: int, trainer: str) -> None:
    space = space_of(model, gpus, batch, trainer=trainer)
    config = space.request.config
    rng = np.random.default_rng(0)
    for index in rng.choice(len(space), size=min(len(space), 60), replace=False):
        plan = space.plan(int(index))
        check_gpus(plan, gpus)
        check_model(
            plan, heads=config.heads, kv_heads=config.num_kv_heads, layers=config.layers, experts=config.experts.num_experts if config.experts else None,
            seq_len=space.request.seq_len,
        )  # fmt: skip
        assert violations(plan, TRAINERS[trainer], layers=config.layers) == ()


def test_no_plan_comes_twice() -> None:
    space = space_of("gpt2", 8, 16, seq_len=512)
    plans = [space.plan(index) for index in range(len(space))]
    assert len({repr(plan) for plan in plans}) == len(plans)


@pytest.mark.slow
def test_the_space_of_the_largest_example_is_large() -> None:
    assert len(space_of("gpt3-175b", 512, 512)) >= 100_000


def test_a_batch_that_nothing_divides_is_infeasible() -> None:
    with pytest.raises(InfeasibleError, match="batch"):
        space_of("gpt2", 7 * 8, 5, seq_len=512, trainer="deepspeed")
