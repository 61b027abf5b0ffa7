"""Small requests for tests of the joint search, and all plans of a request."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster_file import load_cluster
from hardware_models.profile import DeviceProfile
from search.joint.memory_variants import memory_variants
from search.joint.space import JointRequest, JointSpace
from search.trainers import TRAINERS, violations
from simulator.model_source import ModelSource
from simulator.plan import Plan
from simulator.presets import TransformerConfig, preset

CLUSTER = "dgx-a100-80gb"


def small_config(model: str = "gpt2", *, layers: int) -> TransformerConfig:
    return replace(preset(model), name=f"{model} of {layers} layers", layers=layers)


def small_request(
    *, layers: int = 3, gpus: int = 2, batch: int = 4, trainer: str = "any", seq_len: int = 128, budget_bytes: int | None = None, model: str = "gpt2"
) -> JointRequest:  # fmt: skip
    return JointRequest(
        config=small_config(model, layers=layers), seq_len=seq_len, global_batch=batch, cluster=load_cluster(CLUSTER).with_gpus(gpus),
        trainer=TRAINERS[trainer], budget_bytes=budget_bytes,
    )  # fmt: skip


def source_of(request: JointRequest) -> ModelSource:
    return ModelSource(name=request.config.name, config=request.config, batch=request.global_batch, seq_len=request.seq_len)


def device_of(request: JointRequest) -> DeviceProfile:
    return load_hardware(request.cluster.device)


def all_plans(space: JointSpace) -> Iterator[Plan]:
    request = space.request
    for index in range(len(space)):
        plain = space.plan(index)
        for memory in memory_variants(request.trainer, plain):
            plan = replace(plain, memory=memory)
            if not violations(plan, request.trainer, layers=request.config.layers):
                yield plan
