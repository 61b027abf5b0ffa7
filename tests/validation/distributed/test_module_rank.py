"""FSDP2 and parallel styles: units, orders of rows, what is refused; gradients and memory on real processes."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.distributed.fsdp._fully_shard import _fsdp_param

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, InputError
from simulator.model_source import model_source
from simulator.plan import Batch, Memory, Parallel, Plan, Runtime
from simulator.tracing.live_storages import LiveStorages
from tests.small_models import ResidualMlp
from tests.validation.distributed import split_models
from validation.distributed.check import check_processes
from validation.distributed.checkpointed_units import checkpoint_units, runs_again, units_of
from validation.distributed.fully_sharded import check_sharded, resizes_told
from validation.distributed.job import LinkFacts
from validation.distributed.module_prediction import Collective, CopiesOfGloo, _fake_processes
from validation.distributed.prediction import ModulePrediction
from validation.distributed.replicas import REDUCE_SCATTER
from validation.distributed.tensor_parallel import check_tensor_parallel, rank_order, whole_order

DROPOUT = "tests.small_models:residual_mlp"
MODELS = "tests.validation.distributed.split_models"


def plan_of(*, tp: int = 1, dp: int = 1, zero: int = 0, recompute: str = "none") -> Plan:
    return Plan(
        parallel=Parallel(tp=tp, dp=dp),
        batch=Batch(global_batch=4, micro_batch=1),
        memory=Memory(zero_stage=zero, recompute=recompute),  # type: ignore[arg-type]
    )


@pytest.mark.slow
def test_gathered_parameters_count_and_so_do_limits() -> None:
    device = load_hardware("h100-sxm")
    source = model_source(f"{MODELS}:gpt")

    def prediction(plan: Plan) -> ModulePrediction:
        return ModulePrediction(source, plan, device, cores=2)

    kept, freed, split = (prediction(plan) for plan in (plan_of(dp=2, zero=2), plan_of(dp=2, zero=3), plan_of(tp=2)))
    assert freed.memory().step.peak_bytes < kept.memory().step.peak_bytes
    states = 3 * sum(parameter.numel() * 4 for parameter in source.definition.build()[0].parameters())
    assert states / 2 < split.memory().step.peak_bytes
    split.device = device.changed(memory_bytes=1000, context_bytes=0)
    with pytest.raises(InfeasibleError, match=r"a rank needs .* of "):
        split.memory()


def test_gloo_copies_what_it_sums_in_parts() -> None:
    levels: list[int] = []
    live = LiveStorages(lambda _, delta_bytes: levels.append(delta_bytes))
    with _fake_processes(2):
        part, whole = torch.zeros(8), torch.zeros(16)
        live.add([part, whole])
        levels.clear()
        with live, CopiesOfGloo():
            REDUCE_SCATTER(part, whole)
            torch.distributed.all_reduce(whole)
    assert levels == [64, -64]


def test_a_collective_goes_around_the_ring() -> None:
    link = LinkFacts(latency_s=1e-3, bytes_per_s=1e6)
    assert Collective(axis="dp", size_bytes=4000, name="all_reduce").seconds(4, link) == pytest.approx(2 * 3 * (1e-3 + 1e-3))
    assert Collective(axis="dp", size_bytes=4000, name="all_gather").seconds(2, link) == pytest.approx(1e-3 + 2e-3)
    assert Collective(axis="dp", size_bytes=4000, name="all_reduce").seconds(1, link) == 0.0
    assert Collective(axis="dp", size_bytes=8000, name="all_gather").seconds(2, link) > Collective(
        axis="dp", size_bytes=4000, name="all_gather"
    ).seconds(2, link)


@pytest.mark.parametrize(("parts", "tp"), [(2, 2), (3, 2), (2, 4)])
def test_each_rank_gets_its_heads_of_everything(parts: int, tp: int) -> None:
    heads = 2 * tp
    names = torch.tensor([[part * 100 + head] for part in range(parts) for head in range(heads)])
    ordered = rank_order(names, parts, tp)
    for rank, cut in enumerate(ordered.chunk(tp)):
        expected = [part * 100 + head for part in range(parts) for head in range(2 * rank, 2 * rank + 2)]
        assert cut.flatten().tolist() == expected
    assert torch.equal(whole_order(ordered, parts, tp), names)


def test_units_are_the_outermost_entries_with_parameters() -> None:
    inner = nn.Sequential(nn.Linear(2, 2), nn.ReLU())
    module = nn.ModuleDict(
        {"head": nn.Linear(2, 2), "layers": nn.ModuleList([inner, nn.ReLU(), nn.ModuleList([nn.Linear(2, 2)])])}
    )
    units = units_of(module)
    assert [type(unit) for unit in units] == [nn.Sequential, nn.Linear]
    assert units[0] is inner


def test_what_fsdp_frees_is_told() -> None:
    tensor, changes = torch.zeros(4), list[int]()
    live = LiveStorages(lambda _, delta_bytes: changes.append(delta_bytes))
    live.add([tensor])
    before = _fsdp_param.free_storage
    with live, resizes_told():
        _fsdp_param.free_storage(tensor)
        _fsdp_param.alloc_storage(tensor)
    assert changes == [16, -16, 16]
    assert _fsdp_param.free_storage is before


def test_parameters_that_units_share_are_refused() -> None:
    with pytest.raises(InputError, match=r"two units share weight"):
        check_sharded(split_models.shared()[0], name="shared")
    layers = nn.Sequential(nn.Linear(2, 2))
    module = nn.ModuleDict({"layers": layers, "head": nn.Linear(2, 2)})
    module["head"].weight = layers[0].weight
    with pytest.raises(InputError, match="weight is also used outside its unit"):
        check_sharded(module, name="tied")
    with pytest.raises(InputError, match="parameter weight is complex"):
        check_sharded(nn.Linear(2, 2, bias=False, dtype=torch.complex64), name="complex")
    check_sharded(split_models.gpt()[0], name="gpt")


def test_models_without_a_plan_are_refused() -> None:
    module = split_models.gpt()[0]
    check_tensor_parallel(module, tp=4, name="gpt", draws=False)
    with pytest.raises(InputError, match=r"heads % tp == 0 must hold, but got 4 % 3 = 1"):
        check_tensor_parallel(module, tp=3, name="gpt", draws=False)
    with pytest.raises(InputError, match=r"kv_heads % tp == 0 must hold, but got 2 % 4 = 2"):
        check_tensor_parallel(split_models.llama()[0], tp=4, name="llama", draws=False)
    with pytest.raises(InputError, match=r"Decoder .* and VisionTransformer only, but this is a Linear"):
        check_tensor_parallel(nn.Linear(2, 2), tp=2, name="linear", draws=False)
    with pytest.raises(InputError, match="random numbers for parts"):
        check_tensor_parallel(module, tp=2, name="gpt", draws=True)


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (Plan(parallel=Parallel(tp=2, pp=2)), "tensor parallelism is replayed without a pipeline, but got pp = 2"),
        (Plan(parallel=Parallel(tp=2, sequence_parallel=True)), "parallel.sequence_parallel = True: not replayed"),
        (
            Plan(parallel=Parallel(pp=2), memory=Memory(zero_stage=1)),
            "memory.zero_stage = 1: ZeRO splits what replicas hold alike",
        ),
        (Plan(parallel=Parallel(dp=2), memory=Memory(zero_stage=3, recompute="file:a")), "whose layers all keep alike"),
        (
            Plan(parallel=Parallel(dp=2), memory=Memory(zero_stage=3), runtime=Runtime(prefetch_blocks=2)),
            "runtime.prefetch_blocks = 2: not replayed over several processes yet; leave it at its default",
        ),
    ],
)
def test_plans_that_stay_unsupported_are_refused_by_name(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_processes(plan)


@pytest.mark.parametrize("recompute", ["none", "selective", "full"])
def test_checkpointed_units_give_the_plain_gradients_and_keep_less(recompute: str) -> None:
    def step(recompute: str) -> tuple[dict[str, torch.Tensor | None], int]:
        torch.manual_seed(0)
        module = ResidualMlp()
        checkpoint_units(module, recompute)
        saved: dict[int, int] = {}

        def pack(tensor: torch.Tensor) -> torch.Tensor:
            saved[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
            return tensor

        x = torch.randn(64, 48)
        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            loss = module(x).square().mean()
        loss.backward()
        return {name: parameter.grad for name, parameter in module.named_parameters()}, sum(saved.values())

    (plain, most), (found, kept) = step("none"), step(recompute)
    assert all(torch.equal(found[name], grad) for name, grad in plain.items() if grad is not None)  # type: ignore[arg-type]
    assert kept == most if recompute == "none" else kept < most
    assert not runs_again()
