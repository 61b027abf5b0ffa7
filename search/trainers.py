"""What trainers can run: one table of limits with their sources, and the rules that a plan breaks for one of them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hardware_models.errors import UnknownNameError
from search.trainer_rules import SPECIAL_RULES, Violation
from simulator.parallel.partition import even_partition
from simulator.plan import FILE_PREFIX, Plan
from simulator.plan_sections import OFFLOADS, RECOMPUTES, SCHEDULES, plan_refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Trainer:
    """A trainer's limits; what is not limited here or in `search.trainer_rules` is limited by the simulator's own rules only."""

    name: str
    framework: str
    """Whose kernels and overlaps the plan is simulated with (``runtime.framework``)."""
    schedules: tuple[str, ...]
    """Pipeline orders that it runs; ``file:`` stands for any order of one direction from a CSV."""
    zero_stages: tuple[int, ...]
    """Without pipeline stages."""
    zero_stages_pipelined: tuple[int, ...]
    """With them."""
    cp_methods: tuple[str, ...]
    """Empty: no context parallelism."""
    expert_parallel: bool
    even_stages: bool
    """Each stage must hold equally many layers."""
    recomputes: tuple[str, ...]
    """Of a layer, where they keep what is simulated."""
    offloads: tuple[str, ...]
    """Keys of ``[memory]`` that may be above 0."""
    orders: tuple[str, ...]
    """Placements of the axes (``parallel.order``), innermost first."""
    computes: tuple[str, ...]
    """Number formats of products."""
    grads: tuple[str, ...]
    """Formats in which gradients accumulate."""
    optimizers: tuple[str, ...]
    source: str
    """Version that was read."""
    sources: Mapping[str, str]
    """Where each limit is from, by its name here."""


_SYNCHRONOUS = tuple(name for name in SCHEDULES if name != "pipedream-2bw")
"""Orders that change no gradient; pipedream-2bw computes with older weights and must be allowed by name."""
_ONE_DIRECTION = tuple(name for name in _SYNCHRONOUS if name not in {"chimera", "dualpipe"})
_ORDER = "tp-cp-ep-dp-pp"

TRAINERS: Mapping[str, Trainer] = MappingProxyType(
    {
        "any": Trainer(
            name="any", framework="pytorch", schedules=(*_SYNCHRONOUS, FILE_PREFIX), zero_stages=(0, 1, 2, 3), zero_stages_pipelined=(0, 1, 2, 3),
            cp_methods=("ring", "all-to-all"), expert_parallel=True, even_stages=False, recomputes=RECOMPUTES,
            offloads=OFFLOADS, orders=(), computes=(), grads=(), optimizers=(), source="all that the simulator runs", sources=MappingProxyType({}),
        ),
        "megatron": Trainer(
            name="megatron", framework="megatron-core", schedules=("1f1b", "interleaved"), zero_stages=(0, 1, 2, 3), zero_stages_pipelined=(0, 1),
            cp_methods=("ring", "all-to-all"), expert_parallel=True, even_stages=False, recomputes=("none", "selective", "full"),
            offloads=("optimizer_offload",), orders=(_ORDER, "tp-cp-ep-pp-dp"), computes=("fp32", "bf16", "fp16", "fp8"), grads=("fp32", "bf16"),
            optimizers=("adamw", "sgd"), source="megatron-core 0.16.1; Megatron-LM megatron/training/arguments.py at 000c4ac",
            sources=MappingProxyType({
                "schedules": "core/pipeline_parallel/schedules.py, get_forward_backward_func: 1F1B without and with interleaving; combined_1f1b.py only overlaps experts' messages",
                "zero_stages": "--use-distributed-optimizer (1); --use-megatron-fsdp with --data-parallel-sharding-strategy optim_grads (2), optim_grads_params (3)",
                "zero_stages_pipelined": "--use-torch-fsdp2 refuses pipelines (arguments.py); core/distributed/fsdp names no pipeline stages among what it combines with",
                "cp_methods": "--cp-comm-type p2p, a2a", "expert_parallel": "--expert-model-parallel-size, --expert-tensor-parallel-size",
                "even_stages": "--pipeline-model-parallel-layout (core/transformer/pipeline_parallel_layer_layout.py): any number of layers a stage",
                "recomputes": "--recompute-granularity full with --recompute-method uniform, selective with --recompute-modules core_attn",
                "offloads": "--optimizer-cpu-offload, --optimizer-offload-fraction; activations leave by whole layers or modules (--cpu-offloading-num-layers, fine-grained offload), not by fraction",
                "orders": "--use-tp-pp-dp-mapping", "computes": "--bf16, --fp16, --fp8-format", "grads": "--grad-reduce-in-bf16", "optimizers": "--optimizer adam, sgd",
            }),
        ),
        "torchtitan": Trainer(
            name="torchtitan", framework="torchtitan", schedules=(*_ONE_DIRECTION, FILE_PREFIX), zero_stages=(0, 2, 3), zero_stages_pipelined=(0, 1),
            cp_methods=(), expert_parallel=True, even_stages=False, recomputes=("none", "full"),
            offloads=("weight_offload", "grad_offload", "optimizer_offload"), orders=(_ORDER,), computes=("fp32", "bf16", "fp8"), grads=("fp32",),
            optimizers=("adamw",), source="torchtitan 0.3.0, torch 2.13",
            sources=MappingProxyType({
                "schedules": "parallelism.pipeline_parallel_schedule, and any order that places a stage on one rank by pipeline_parallel_schedule_csv (distributed/pipeline_parallel.py)",
                "zero_stages": "data_parallel_replicate_degree (0); data_parallel_shard_degree with fsdp_reshard_after_forward never (2), always (3); gradients are scattered at each micro-batch",
                "zero_stages_pipelined": "torch/distributed/pipelining/stage.py: gradients stay whole until a stage's last micro-batch, so fsdp_reshard_after_forward never is ZeRO 1",
                "cp_methods": "distributed/context_parallel/api.py: language models run FlexAttention on keys and values gathered whole, neither a ring nor an exchange of heads",
                "expert_parallel": "parallelism.expert_parallel_degree", "even_stages": "parallelism.module_fqns_per_model_part",
                "recomputes": "distributed/activation_checkpoint.py: FullAC; SelectiveAC chooses by operator and keeps every second product, which is not what selective means here",
                "offloads": "training.enable_cpu_offload", "orders": "distributed/parallel_dims.py: pp, dp_replicate, dp_shard, cp, tp from outside",
                "computes": "training.mixed_precision_param; Float8LinearConverter", "grads": "training.mixed_precision_reduce: float32 only",
                "optimizers": "components/optimizer/optimizer.py, default_adamw",
            }),
        ),
        "pytorch": Trainer(
            name="pytorch", framework="pytorch", schedules=(*_ONE_DIRECTION, FILE_PREFIX), zero_stages=(0, 1, 2, 3), zero_stages_pipelined=(0, 1),
            cp_methods=(), expert_parallel=False, even_stages=False, recomputes=("none", "full"),
            offloads=("weight_offload", "grad_offload", "optimizer_offload"), orders=(_ORDER,), computes=("fp32", "tf32", "bf16"), grads=("fp32",),
            optimizers=("adamw", "sgd"), source="torch 2.13, as search/export_pytorch.py uses it",
            sources=MappingProxyType({
                "schedules": "torch.distributed.pipelining: any order that places a stage on one rank, by _PipelineScheduleRuntime._load_csv",
                "zero_stages": "fully_shard with reshard_after_forward (3), set_reshard_after_backward (2) and set_requires_gradient_sync (1) off; one rank a shard (0)",
                "zero_stages_pipelined": "torch/distributed/pipelining/stage.py: gradients stay whole until a stage's last micro-batch",
                "cp_methods": "none in a plain module", "expert_parallel": "none in a plain module", "even_stages": "stages are the caller's modules",
                "recomputes": "checkpoint_wrapper of a whole block", "offloads": "CPUOffloadPolicy", "orders": "init_device_mesh", "computes": "MixedPrecisionPolicy(param_dtype)",
                "grads": "MixedPrecisionPolicy(reduce_dtype); sharded parameters are float32, and so are their gradients", "optimizers": "torch.optim",
            }),
        ),
        "deepspeed": Trainer(
            name="deepspeed", framework="deepspeed", schedules=("1f1b",), zero_stages=(0, 1, 2, 3), zero_stages_pipelined=(0, 1), cp_methods=("all-to-all",),
            expert_parallel=True, even_stages=True, recomputes=("none", "full"), offloads=("weight_offload", "grad_offload", "optimizer_offload"),
            orders=(_ORDER,), computes=("fp32", "bf16", "fp16"), grads=("fp32", "bf16"), optimizers=("adamw", "sgd"), source="DeepSpeed 0.19.8",
            sources=MappingProxyType({
                "schedules": "runtime/pipe/schedule.py, TrainSchedule; DualPipeVSchedule keeps weight gradients inside the backward pass, which is not dualpipe-v here",
                "zero_stages": "runtime/zero/config.py, stage", "zero_stages_pipelined": "runtime/pipe/engine.py asserts a stage below 2",
                "cp_methods": "sequence_parallel_size: Ulysses (sequence/layer.py)", "expert_parallel": "expert_parallel (module_inject/auto_ep_config.py)",
                "even_stages": "runtime/pipe/module.py, _partition_layers: uniform, by parameters or by type, no list of layers",
                "recomputes": "PipelineModule(activation_checkpoint_interval=1), deepspeed.checkpointing.checkpoint",
                "offloads": "zero_optimization.offload_param, offload_optimizer; activation_checkpointing.cpu_checkpointing copies in step, not overlapped as simulated",
                "orders": "runtime/pipe/topology.py, PipeModelDataParallelTopology: pipe, data, model from outside", "computes": "bf16, fp16",
                "grads": "data_types.grad_accum_dtype", "optimizers": "runtime/engine.py, _configure_basic_optimizer",
            }),
        ),
    }
)  # fmt: skip


def trainer_of(name: str) -> Trainer:
    """The trainer of a name.

    Raises:
        UnknownNameError: lists the known ones.
    """
    if name not in TRAINERS:
        raise UnknownNameError(source="--trainer", key="", value=name, known=tuple(TRAINERS))
    return TRAINERS[name]


def violations(plan: Plan, trainer: Trainer, *, layers: int | None = None) -> tuple[str, ...]:
    """The rules of a trainer that a plan breaks, as text; empty: it is legal there.

    Args:
        plan: with its batch resolved.
        trainer: whose rules.
        layers: of the model; None where they are unknown: an even split is then not checked.
    """
    return tuple(f"{trainer.name}: {found}" for found in broken_rules(plan, trainer, layers=layers))


def check_trainer(plan: Plan, trainer: Trainer, *, layers: int | None = None) -> None:
    """Refuses a plan that a trainer cannot run; arguments as for `violations`.

    Raises:
        InputError: names the first key that breaks a rule, the trainer's limit and what would do.
    """
    for found in broken_rules(plan, trainer, layers=layers):
        raise plan_refusal(found.key, found.value, f"{trainer.name}: {found.rule}", found.remedy)


def broken_rules(plan: Plan, trainer: Trainer, *, layers: int | None = None) -> tuple[Violation, ...]:
    """The rules of a trainer that a plan breaks; arguments as for `violations`."""
    special = (rule(plan) for rule in SPECIAL_RULES[trainer.name])
    found = (*_outside_table(plan, trainer), _uneven(plan, trainer, layers), *special)
    return tuple(one for one in found if one is not None)


def _outside_table(plan: Plan, trainer: Trainer) -> tuple[Violation, ...]:
    """Values that are not among those of the table."""
    parallel, memory, precision = plan.parallel, plan.memory, plan.precision
    schedule = FILE_PREFIX if plan.pipeline.schedule.startswith(FILE_PREFIX) else plan.pipeline.schedule
    stages = "zero_stages_pipelined" if parallel.pp > 1 else "zero_stages"
    recomputes = dict.fromkeys((memory.recompute, *(one.recompute for one in memory.block if one.recompute)))
    used: list[tuple[str, object, str, bool]] = [
        ("pipeline.schedule", schedule, "schedules", parallel.pp > 1),
        ("memory.zero_stage", memory.zero_stage, stages, True),
        ("parallel.cp_method", parallel.cp_method, "cp_methods", parallel.cp > 1),
        *(("memory.recompute", value, "recomputes", True) for value in recomputes),
        ("parallel.order", parallel.order, "orders", bool(trainer.orders)),
        ("precision.compute", precision.compute, "computes", bool(trainer.computes)),
        ("precision.grads", precision.grads, "grads", bool(trainer.grads)),
        ("precision.optimizer", precision.optimizer, "optimizers", bool(trainer.optimizers)),
    ]
    found = [
        Violation(key=key, value=value, rule=_limit(trainer, limit), remedy=_choices(getattr(trainer, limit)))
        for key, value, limit, concerned in used
        if concerned and value not in getattr(trainer, limit)
    ]
    if parallel.ep > 1 and not trainer.expert_parallel:
        found.append(
            Violation(key="parallel.ep", value=parallel.ep, rule=_limit(trainer, "expert_parallel"), remedy="take ep = 1")
        )
    exceptions = [(f"memory.block[{n}]", one) for n, one in enumerate(memory.block)]
    for name in OFFLOADS:
        for place, section in (("memory", memory), *exceptions):
            amount = getattr(section, name, None)
            if amount and name not in trainer.offloads:
                found.append(
                    Violation(key=f"{place}.{name}", value=amount, rule=_limit(trainer, "offloads"), remedy="leave it at 0")
                )
    return tuple(found)


def _limit(trainer: Trainer, limit: str) -> str:
    """What a limit of the table is, and its source."""
    given = getattr(trainer, limit)
    shown = ", ".join(map(str, given if isinstance(given, tuple) else (given,))) or "none"
    source = trainer.sources.get(limit)
    return f"{limit.replace('_', ' ')}: {shown}" + (f" ({trainer.source}: {source})" if source else "")


def _choices(values: tuple[object, ...]) -> str:
    return "take " + " or ".join(map(str, values)) if values else "leave it out"


def _uneven(plan: Plan, trainer: Trainer, layers: int | None) -> Violation | None:
    """Stages of unequal length where the trainer makes equal ones."""
    given = plan.pipeline.partition
    if not trainer.even_stages or plan.parallel.pp == 1 or (given is None and layers is None):
        return None
    lengths = given if given is not None else even_partition(layers or 0, plan.num_stages)
    if len(set(lengths)) == 1:
        return None
    rule = f"layers % (pp * virtual_stages) == 0 must hold, and stages be equal, but got {lengths}; {_limit(trainer, 'even_stages')}"
    return Violation(
        key="pipeline.partition", value=given, rule=rule, remedy="take a pp that divides the layers, and leave partition out"
    )
