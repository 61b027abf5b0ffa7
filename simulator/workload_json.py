"""Workloads as JSON: what is traced on one machine can be priced on another."""

from __future__ import annotations

from dataclasses import asdict, fields
from typing import Any

from hardware_models.kernel import Kernel
from simulator.workload import Block, BlockOption, MemoryEvent, ParameterTensor, Pass, SavedTensor, Workload

_KERNEL = tuple(field.name for field in fields(Kernel))
_EVENT = tuple(field.name for field in fields(MemoryEvent))


def workload_to_json(workload: Workload) -> dict[str, Any]:
    """A workload as JSON values; blocks that are one object are written once."""
    distinct = list({id(block): block for block in workload.blocks}.values())
    places = {id(block): place for place, block in enumerate(distinct)}
    rest = {field.name: getattr(workload, field.name) for field in fields(Workload)}
    return rest | {
        "blocks": [places[id(block)] for block in workload.blocks], "distinct": [_block_to_json(block) for block in distinct],
        "shared_accumulate": _pass_to_json(workload.shared_accumulate), "notes": list(workload.notes),
        "optimizer_tensors": list(workload.optimizer_tensors), "shared_parameters": [asdict(one) for one in workload.shared_parameters],
    }  # fmt: skip


def workload_from_json(table: dict[str, Any]) -> Workload:
    """The workload that `workload_to_json` wrote."""
    rest = dict(table)
    distinct = [_block_from_json(block) for block in rest.pop("distinct")]
    return Workload(**rest | {
        "blocks": tuple(distinct[place] for place in table["blocks"]), "shared_accumulate": _pass_from_json(table["shared_accumulate"]),
        "notes": tuple(table["notes"]), "optimizer_tensors": tuple(table["optimizer_tensors"]),
        "shared_parameters": tuple(ParameterTensor(**one) for one in table["shared_parameters"]),
    })  # fmt: skip


def _block_to_json(block: Block) -> dict[str, Any]:
    rest = {field.name: getattr(block, field.name) for field in fields(Block)}
    return rest | {
        "discard": _pass_to_json(block.discard), "options": [_option_to_json(option) for option in block.options],
        "parameters": [asdict(one) for one in block.parameters],
    }  # fmt: skip


def _block_from_json(table: dict[str, Any]) -> Block:
    return Block(**table | {
        "discard": _pass_from_json(table["discard"]), "options": tuple(_option_from_json(option) for option in table["options"]),
        "parameters": tuple(ParameterTensor(**one) for one in table["parameters"]),
    })  # fmt: skip


def _option_to_json(option: BlockOption) -> dict[str, Any]:
    rest = {field.name: getattr(option, field.name) for field in fields(BlockOption)}
    passes = {name: _pass_to_json(getattr(option, name)) for name in ("forward", "backward", "backward_accumulate")}
    return rest | passes | {"saved": [asdict(one) for one in option.saved]}


def _option_from_json(table: dict[str, Any]) -> BlockOption:
    passes = {name: _pass_from_json(table[name]) for name in ("forward", "backward", "backward_accumulate")}
    saved = tuple(SavedTensor(**one | {"shape": tuple(one["shape"])}) for one in table["saved"])
    return BlockOption(**table | passes | {"saved": saved})


def _pass_to_json(run: Pass) -> dict[str, Any]:
    """Rows of values, in the order of the fields."""
    return {
        "policy_calls": run.policy_calls,
        "kernels": [[getattr(kernel, name) for name in _KERNEL] for kernel in run.kernels],
        "memory": [[getattr(event, name) for name in _EVENT] for event in run.memory],
    }


def _pass_from_json(table: dict[str, Any]) -> Pass:
    kernels = (dict(zip(_KERNEL, row, strict=True)) for row in table["kernels"])
    return Pass(
        kernels=tuple(Kernel(**kernel | {"shape": tuple(kernel["shape"])}) for kernel in kernels),
        memory=tuple(MemoryEvent(**dict(zip(_EVENT, row, strict=True))) for row in table["memory"]), policy_calls=table.get("policy_calls", 0),
    )  # fmt: skip
