"""What an export starts from and gives, and what no trainer can be told."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from math import prod

from search.trainers import Trainer, check_trainer
from simulator.parallel.partition import ENDS_AS_LAYERS, ends_as_layers, even_partition
from simulator.pipeline.action import Order
from simulator.plan import Plan, resolve_batch
from simulator.plan_sections import plan_refusal


@dataclass(frozen=True, slots=True, kw_only=True)
class Case:
    """A plan to export."""

    plan: Plan
    """With its batch and sequence length resolved (`resolved_plan`)."""
    layers: int | None = None
    """Of the model; None: unknown."""
    model: str | None = None
    """Its name; None: unknown."""
    order: Order | None = None
    """Of the pipeline; None without one."""
    partition: tuple[int, ...] | None = None
    """Layers of each stage; None without a pipeline or where they are unknown (`own_partition`)."""

    @property
    def summary(self) -> str:
        """One line that says how the GPUs and the batch are made up."""
        split, batch = self.plan.parallel, self.plan.batch
        degrees = " x ".join(f"{name} {getattr(split, name)}" for name in ("tp", "cp", "dp", "pp"))
        made = f"{batch.micro_batch} x {self.plan.num_microbatches} micro-batches x dp {split.dp}"
        return f"{self.plan.num_gpus} GPUs = {degrees}; global batch {batch.global_batch} = {made}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Exported:
    """A plan in a trainer's form."""

    files: tuple[tuple[str, str], ...]
    """Names and texts; the first is what the trainer is given."""
    notes: tuple[str, ...]
    """What the files cannot say: how they are used, what the model's own code or the launcher must do."""


def resolved_plan(plan: Plan, *, seq_len: int | None) -> Plan:
    """The plan with every size of the batch; without ``micro_batch`` a pipeline takes single samples, others the replica's whole share.

    Args:
        plan: to export.
        seq_len: of the model, where the plan leaves it open.

    Raises:
        InputError: the global batch is given nowhere.
    """
    if plan.batch.global_batch is None:
        raise plan_refusal("batch.global_batch", None, "a trainer needs the samples of a step", "give it")
    whole = resolve_batch(plan, batch=plan.batch.global_batch, seq_len=seq_len)
    if plan.batch.micro_batch is None and plan.parallel.pp > 1:
        whole = replace(whole, batch=replace(whole.batch, micro_batch=1))
    return whole


def checked(case: Case, trainer: Trainer) -> Case:
    """The case with its partition, if the trainer can run its plan and the plan holds nothing that trainers cannot be told.

    Raises:
        InputError: names the first key that breaks a rule.
    """
    plan = case.plan
    check_trainer(plan, trainer, layers=case.layers)
    refused: tuple[tuple[str, object, object, str], ...] = (
        ("memory.delayed_update", plan.memory.delayed_update, False, "updates every step before the next one"),
        ("precision.comm", plan.precision.comm, "same", "sends gradients as they are"),
        (
            "runtime.optimizer_sync",
            plan.runtime.optimizer_sync,
            "pre",
            "agrees on the gradient norm before the optimizer steps",
        ),
    )
    for key, value, wanted, rule in refused:
        if value != wanted:
            raise plan_refusal(key, value, f"{trainer.name}: {rule}", f"leave it at {wanted!r}")
    if plan.batch.seq_len is None and trainer.name in {"megatron", "torchtitan"}:
        raise plan_refusal("batch.seq_len", None, f"{trainer.name} needs the tokens of a sample", "give it, or --model")
    cut = own_partition(case, trainer)
    if cut is not None and case.layers is not None and sum(cut) != case.layers:
        rule = f"sum of partition == layers must hold, but got {sum(cut)} != {case.layers}"
        raise plan_refusal("pipeline.partition", cut, rule)
    assert prod((plan.batch.micro_batch or 0, plan.num_microbatches, plan.parallel.dp)) == plan.batch.global_batch
    return replace(case, partition=cut)


def own_partition(case: Case, trainer: Trainer) -> tuple[int, ...] | None:
    """Layers of each stage: the plan's, else as the trainer cuts unasked; None without a pipeline or where the layers are unknown."""
    stages, layers = case.plan.num_stages, case.layers
    if case.plan.parallel.pp == 1:
        return None
    if case.plan.pipeline.partition is not None or layers is None:
        return case.plan.pipeline.partition
    own = None
    if trainer.framework in ENDS_AS_LAYERS:
        own = ends_as_layers(layers, stages, back=ENDS_AS_LAYERS[trainer.framework])
    return own or even_partition(layers, stages)


def refuse_unless(case: Case, key: str, wanted: object, rule: str) -> None:
    """Refuses another value of a key than the one that a trainer can be told.

    Args:
        case: of the plan.
        key: section and name.
        wanted: the value that needs no telling.
        rule: the trainer's limit, its name first.

    Raises:
        InputError: the plan's value is another.
    """
    section, name = key.split(".")
    value = getattr(getattr(case.plan, section), name)
    if value != wanted:
        remedy = "leave it out" if wanted in (None, ()) else f"leave it at {wanted!r}"
        raise plan_refusal(key, value, rule, remedy)


def needed_partition(case: Case, trainer: str) -> tuple[int, ...]:
    """Layers of each stage.

    Raises:
        InputError: neither the plan nor a model gives them.
    """
    if case.partition is None:
        rule = f"{trainer} is told which layers each stage holds"
        raise plan_refusal("pipeline.partition", None, rule, "give it, or --model")
    return case.partition


def python_table(name: str, table: Mapping[str, object]) -> str:
    """Python that assigns a table: a key a line; of a list of lists, an inner list a line."""
    lines = [f"{name} = {{"]
    for key, value in table.items():
        if isinstance(value, list) and value and isinstance(value[0], list):
            lines += [f'    "{key}": [', *(f"        {inner!r}," for inner in value), "    ],"]
        else:
            lines.append(f'    "{key}": {value!r},')
    return "\n".join((*lines, "}")).replace("'", '"')
