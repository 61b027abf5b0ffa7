"""Tensor parallelism through torch's parallel styles, for the decoders and encoders that `simulator.models` defines."""

from __future__ import annotations

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Replicate
from torch.distributed.tensor.parallel import ColwiseParallel, ParallelStyle, RowwiseParallel, parallelize_module

from hardware_models.errors import InputError
from simulator.models.gpt import CausalAttention, Decoder, GeluNetwork, SwigluNetwork
from simulator.models.vit import EncoderLayer, VisionTransformer

_STYLES: dict[type[nn.Module], tuple[tuple[str, ...], tuple[str, ...]]] = {
    CausalAttention: (("query", "key_value"), ("output",)),
    GeluNetwork: (("up",), ("down",)),
    SwigluNetwork: (("gate", "up"), ("down",)),
    EncoderLayer: (("qkv", "up"), ("projection", "down")),
}
"""Per kind of module its products split by columns (outputs), then those split by rows (inputs)."""
_FUSED: dict[type[nn.Module], tuple[str, int]] = {CausalAttention: ("key_value", 2), EncoderLayer: ("qkv", 3)}
"""Products that make several things at once, and how many: their rows are ordered by rank before they are cut."""


def check_tensor_parallel(module: nn.Module, *, tp: int, name: str, draws: bool) -> None:
    """Refuses models without a plan, and heads that do not divide.

    Args:
        module: the model, real or fake.
        tp: ranks.
        name: for messages.
        draws: whether it draws random numbers.

    Raises:
        InputError: names the rule.
    """
    rule, remedy = "", "take tp = 1, or dp and pp, which run any traced module"
    if not isinstance(module, Decoder | VisionTransformer):
        rule = f"parallel styles are planned for the definitions Decoder (GPT, Llama) and VisionTransformer only, but this is a {type(module).__name__}"
    elif draws:
        rule = "ranks draw random numbers for parts of a tensor, which are not those of the whole"
    else:
        counts = {(key, getattr(part, key)) for part in module.modules() for key in ("heads", "kv_heads") if hasattr(part, key)}
        for key, count in sorted(counts):
            if count % tp:
                rule, remedy = (
                    f"{key} % tp == 0 must hold, but got {count} % {tp} = {count % tp}",
                    "take a tp that divides the heads",
                )
    if rule:
        raise InputError(source=f"model {name}", key="parallel.tp", value=tp, rule=rule, remedy=remedy)


def split(module: nn.Module, mesh: DeviceMesh) -> dict[str, int]:
    """Splits a model's products and vocabulary over a mesh of one axis, in place; norms and positions stay whole on every rank.

    **Model**: of each attention and network the first products are split by columns and the last by rows, with one sum of activations after it forward and one before
    it backward; the table of tokens by rows; the head by columns, whose logits are gathered before the loss.

    **Source**: Shoeybi et al. 2019, "Megatron-LM", section 3; torch 2.13, torch/distributed/tensor/parallel/style.py.

    **Not modelled**: sequence parallelism; a loss on split logits.

    Returns:
        Per parameter whose rows were put in the ranks' order, how many things its product makes (`whole_order` undoes it).
    """
    tp = mesh.size()
    plan: dict[str, ParallelStyle] = {"head": ColwiseParallel(output_layouts=Replicate())}
    ordered: dict[str, int] = {}
    for prefix, part in module.named_modules():
        columns, rows = _STYLES.get(type(part), ((), ()))
        plan |= {f"{prefix}.{name}": ColwiseParallel() for name in columns} | {
            f"{prefix}.{name}": RowwiseParallel() for name in rows
        }
        if type(part) in _FUSED:
            name, parts = _FUSED[type(part)]
            for key, value in part.get_submodule(name).named_parameters():
                ordered[f"{prefix}.{name}.{key}"] = parts
                with torch.no_grad():
                    value.copy_(rank_order(value, parts, tp))
    if isinstance(module, Decoder):
        plan["embedding"] = RowwiseParallel(input_layouts=Replicate())
    tied = isinstance(module, Decoder) and module.head.weight is module.embedding.weight
    parallelize_module(module, mesh, plan)
    if tied:
        assert isinstance(module, Decoder)
        module.head.weight = module.embedding.weight
    return ordered


def rank_order(value: torch.Tensor, parts: int, tp: int) -> torch.Tensor:
    """Rows of a product that makes ``parts`` things, all of them of rank 0 first: contiguous cuts then give each rank its heads of everything.

    Args:
        value: (parts * tp * rows of a rank, ...).
    """
    return value.view(parts, tp, -1, *value.shape[1:]).transpose(0, 1).reshape(value.shape)


def whole_order(value: torch.Tensor, parts: int, tp: int) -> torch.Tensor:
    """The inverse of `rank_order`."""
    return rank_order(value, tp, parts)
