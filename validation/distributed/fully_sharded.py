"""ZeRO 2 and 3 through torch's FSDP2: which modules are gathered together, and how the count of live bytes hears of what it frees."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from itertools import chain

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.fsdp import fully_shard
from torch.distributed.fsdp._fully_shard import _fsdp_param

from hardware_models.errors import InputError
from simulator.tracing.live_storages import resize_storage
from validation.distributed.checkpointed_units import units_of

PARAMETERS_SHARDED = 3


def check_sharded(module: nn.Module, *, name: str) -> None:
    """Refuses what FSDP2 does not split.

    Raises:
        InputError: a complex parameter, or one that two units share.
    """
    rule = ""
    owners: dict[nn.Parameter, nn.Module] = {}
    for key, value in module.named_parameters():
        if value.is_complex():
            rule = f"FSDP2 averages real gradients only, but parameter {key} is complex"
    for unit in units_of(module):
        for key, value in unit.named_parameters():
            if owners.setdefault(value, unit) is not unit:
                rule = f"a parameter belongs to one unit of FSDP2, but two units share {key}"
    inside = {id(value) for unit in units_of(module) for value in unit.parameters()}
    held = {id(part) for unit in units_of(module) for part in unit.modules()}
    outside = chain.from_iterable(part.named_parameters(recurse=False) for part in module.modules() if id(part) not in held)
    for key, value in outside:
        if id(value) in inside:
            rule = f"a parameter belongs to one unit of FSDP2, but {key} is also used outside its unit"
    if rule:
        raise InputError(
            source=f"model {name}", key="memory.zero_stage", value="> 0", rule=rule, remedy="leave memory.zero_stage at 0"
        )


def shard(module: nn.Module, mesh: DeviceMesh, *, zero_stage: int) -> None:
    """Has every unit's parameters, gradients and states split over a mesh of one axis, the parts of parallel styles too; ``module`` is changed in place.

    **Model**: ZeRO 3 lets a unit's gathered parameters go after its forward pass and gathers them again for the backward pass
    (``reshard_after_forward=True``), ZeRO 2 keeps them until then. Either way gradients are averaged and split unit by unit in every micro-batch's backward
    pass, and the next step begins with split parameters.

    **Source**: torch 2.13, torch/distributed/fsdp/_fully_shard/_fully_shard.py; Rajbhandari et al. 2020 (ZeRO), section 5.
    """
    reshard = zero_stage >= PARAMETERS_SHARDED
    for unit in units_of(module):
        fully_shard(unit, mesh=mesh, reshard_after_forward=reshard)
    fully_shard(module, mesh=mesh, reshard_after_forward=reshard)


@contextmanager
def resizes_told() -> Iterator[None]:
    """Context in which gathered parameters come and go under the eyes of `LiveStorages`: FSDP2 resizes their storages, which no operator shows."""
    before = _fsdp_param.alloc_storage, _fsdp_param.free_storage
    _fsdp_param.alloc_storage, _fsdp_param.free_storage = _allocate, _free
    try:
        yield
    finally:
        _fsdp_param.alloc_storage, _fsdp_param.free_storage = before


def _allocate(tensor: torch.Tensor) -> None:
    size_bytes = tensor.numel() * tensor.itemsize
    if tensor.untyped_storage().size() != size_bytes:
        resize_storage(tensor, size_bytes)


def _free(tensor: torch.Tensor) -> None:
    if tensor.untyped_storage().size():
        resize_storage(tensor, 0)
