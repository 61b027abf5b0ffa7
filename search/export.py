"""A plan as the flags or files of the trainer that shall run it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import replace
from types import MappingProxyType

from search.export_case import Case, Exported, checked
from search.export_deepspeed import deepspeed_json
from search.export_megatron import megatron_arguments
from search.export_pytorch import pytorch_script
from search.export_torchtitan import torchtitan_module
from search.trainers import trainer_of

EXPORTERS: Mapping[str, Callable[[Case], Exported]] = MappingProxyType(
    {"megatron": megatron_arguments, "torchtitan": torchtitan_module, "deepspeed": deepspeed_json, "pytorch": pytorch_script}
)
"""By trainer."""


def export_plan(case: Case, to: str) -> Exported:
    """The files by which a trainer runs a plan.

    Args:
        case: the plan, its order and its model's layers.
        to: one of `EXPORTERS`.

    Raises:
        InputError: the trainer cannot run it: names key, value, the trainer's limit and what would do.
    """
    trainer = trainer_of(to)
    made = EXPORTERS[trainer.name](checked(case, trainer))
    framework = case.plan.runtime.framework
    if framework == trainer.framework:
        return made
    note = f'the plan is predicted with runtime.framework = "{framework}": simulate it with "{trainer.framework}" for this trainer\'s kernels and cut of layers'
    return replace(made, notes=(*made.notes, note))
