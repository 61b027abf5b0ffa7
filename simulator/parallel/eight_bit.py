"""Products in eight bits as trainers run them: which operands are cast, how often, and what copies of weights stay."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from types import MappingProxyType

import numpy as np
from numpy.typing import NDArray

from hardware_models.catalogue import load_hardware
from hardware_models.kernel import Kernel
from hardware_models.pricers import GridPricer, pricer_of
from hardware_models.pricing import price
from hardware_models.profile import DeviceProfile
from simulator.lower import Price
from simulator.parallel.framework import gathers_eight_bits
from simulator.plan import Plan
from simulator.precision import PRODUCTS_IN, in_precision
from simulator.presets import TransformerConfig
from simulator.presets.tape import kernel
from simulator.workload import Block, BlockOption, Pass, Workload

LAYERS = frozenset({"attention", "network", "experts"})
"""Blocks whose linear layers compute in eight bits; embedding and head do not (Transformer Engine's modules are a layer's only; torchtitan leaves ``output`` out)."""
_BARRIERS = frozenset({"attention", "batched_gemm"})
"""Kernels between products that read different operands of one shape."""
_WIDE = 2
"""Bytes of what is cast."""
_BLOCKWISE = "blackwell"
_TIMED_WITH_CASTS = frozenset({"CutlassFP8ScaledMMLinearKernel", "torch_flow"})
"""Stacks of the catalogue's curves whose timings of products in eight bits are of whole layers (`without_timed_casts`)."""
_LENDERS = MappingProxyType({"hopper": "h100-sxm", "ada": "h100-sxm", "blackwell": "b200"})
"""The timed board whose curves those of an architecture without timings of their own borrow."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Recipe:
    """How a library casts operands."""

    finds_scale: bool
    """A pass of its own reads an operand for its largest magnitude before the cast."""
    transposes_later: bool
    """The backward pass makes inputs' second order from what the forward pass kept; else the cast writes both orders at once."""
    by_rows: bool = False
    """Each row has a scale, so that each order of an operand is looked through and cast by itself."""
    keeps_weights: bool
    """Casts of weights stay for all micro-batches of a step; else each pass makes them."""


_TORCHAO = Recipe(finds_scale=True, transposes_later=True, keeps_weights=False)
_TRANSFORMER_ENGINE = Recipe(finds_scale=False, transposes_later=False, keeps_weights=False)
RECIPES: Mapping[str, Recipe] = MappingProxyType(
    {"torchtitan": _TORCHAO, "megatron-core": replace(_TRANSFORMER_ENGINE, finds_scale=True, keeps_weights=True)}
)
"""By framework; others take Transformer Engine's modules with scales from earlier steps (``DelayedScaling``, its default), and cast weights in each pass, as where nobody tells these
which micro-batch is the first.

**Source**: torchao: ``matmul_with_hp_or_float8_args`` and ``manual_float8_matmul_with_args_in_float8`` (torchao/float8/float8_linear.py, 12/2024): one scale a tensor, from that tensor; the gradients' products
read copies in the other order. Transformer Engine: operands are cast in both orders by one kernel (docs/features/low_precision_training/performance_considerations), ``Float8CurrentScaling`` looks for
the largest magnitude first, blocks of 32 on Blackwell (``MXFP8BlockScaling``) need not; Megatron-Bridge's recipes take the former on H100 and the latter on Blackwell. ``get_weight_workspace``
keeps casts of weights where ``is_first_microbatch`` is given (transformer_engine/pytorch/module/base.py), as Megatron-core gives it (megatron/core/extensions/transformer_engine.py).
"""


def recipe_of(plan: Plan, device: DeviceProfile) -> Recipe:
    """The recipe of a plan's framework on a device; torchtitan gathers in bfloat16 where torchao scales by rows, and only there."""
    found = RECIPES.get(plan.runtime.framework, _TRANSFORMER_ENGINE)
    if found is _TORCHAO:
        return replace(found, by_rows=not gathers_eight_bits(plan))
    return replace(found, finds_scale=found.finds_scale and device.architecture != _BLOCKWISE)


def eight_bit_workload(
    workload: Workload, plan: Plan, config: TransformerConfig, device: DeviceProfile, *, tokens: int
) -> Workload:
    """The workload with linear layers' products in eight bits, and before each the casts of what it reads.

    **Model**: of an operand of ``e`` elements, the scale reads 2 e bytes (where the recipe looks for it) and the cast reads 2 e and writes e, or 2 e in both orders. Products that read
    one operand share its cast (queries, keys and values; gate and up); an output's gradient is cast once for its two products. What tensor parallelism gathers is cast before that, on a
    rank's part, and only laid out in the second order (e read, e written) behind it. Later transposes read what was cast from (2 e; the gathered copy: e) and write e.

    **Source**: `RECIPES`.

    **Not modelled**: copies' bytes while a pass runs; scales (1/32 of the bytes of blocks); casts fused into a norm or an activation where nothing is compiled; slower transposes of compiled kernels
    (pytorch/pytorch#130015).

    Args:
        workload: of one micro-batch on one rank, in bfloat16.
        plan: its framework and tensor parallelism.
        config: whose router stays as it is.
        device: decides how scales are found.
        tokens: of the micro-batch on a context-parallel rank.
    """
    casts = _Casts(
        recipe=recipe_of(plan, device), tokens=tokens, experts=config.experts.num_experts if config.experts else 0,
        parts=plan.parallel.tp if plan.parallel.sequence_parallel and gathers_eight_bits(plan) else 1,
    )  # fmt: skip
    made = {id(block): _block(block, casts) if block.name in LAYERS else block for block in workload.blocks}
    return replace(workload, blocks=tuple(made[id(block)] for block in workload.blocks))


def weight_elements(blocks: Iterable[Block], config: TransformerConfig) -> int:
    """Elements of the weights of some blocks that products read in eight bits."""
    experts = config.experts.num_experts if config.experts else 0
    return sum(
        one.shape[1] * one.shape[2]
        for block in blocks
        if block.name in LAYERS
        for one in block.discard.kernels
        if one.kernel_class == "gemm" and not _is_router(one, experts)
    )


def kept_weight_bytes(plan: Plan, device: DeviceProfile, elements: int) -> int:
    """Bytes that casts of so many elements of weights take on a rank through the whole step.

    **Model**: a copy in each order beside the weights in bfloat16, where casts are kept (`Recipe.keeps_weights`): two bytes an element.

    **Source**: ``get_weight_workspace`` with ``set_usage(rowwise=True, columnwise=True)`` (transformer_engine/pytorch/module/linear.py): on Hopper the copy and its transpose, on Blackwell one
    scaled by rows and one by columns.

    **Not modelled**: weights that are stored in eight bits alone (``fp8_param_gather``: Megatron-Bridge's recipes), which take these two bytes and no others: a plan cannot name that, and memory comes out
    two bytes an element too high there; the one copy that tensor-wise scales need on Blackwell.
    """
    keeps = plan.precision.compute == "fp8" and recipe_of(plan, device).keeps_weights
    return 2 * elements if keeps else 0


def weight_cast_seconds(plan: Plan, device: DeviceProfile, elements: int) -> float:
    """Seconds in which a step casts so many elements of weights once, where casts are kept."""
    if not kept_weight_bytes(plan, device, elements):
        return 0.0
    recipe = recipe_of(plan, device)
    return float(price(_cast(elements, recipe, both=True), device).sum())


@dataclass(frozen=True, slots=True, kw_only=True)
class _Casts:
    recipe: Recipe
    tokens: int
    experts: int
    parts: int
    """Ranks among which a stream is gathered."""

    def forward(self, product: Kernel, *, opens: bool, gathered: bool, trains: bool) -> list[Kernel]:
        """Before a product of the forward pass; ``opens``: the first that reads its operand."""
        m, n, k = product.shape
        both = trains and not self.recipe.transposes_later
        own = self._operand(m * k, gathered=gathered, both=both) if opens else []
        return own if self.recipe.keeps_weights else [*own, *_cast(n * k, self.recipe, both=both)]

    def input_gradient(self, product: Kernel, *, gathered: bool) -> list[Kernel]:
        """Before the product that makes an input's gradient: the output's gradient for it and for the weight's one."""
        m, n, k = product.shape
        own = self._operand(m * k, gathered=gathered, both=True)
        return [*own, *_again(n * k, self.recipe)] if self.recipe.transposes_later else own

    def weight_gradient(self, product: Kernel, *, opens: bool, gathered: bool) -> list[Kernel]:
        """Before the product that makes a weight's gradient: the input in its second order."""
        k, _n, m = product.shape
        if not opens or not self.recipe.transposes_later:
            return []
        return [_copy(k * m, 1, 1)] if gathered and self.parts > 1 else _again(k * m, self.recipe)

    def _operand(self, elements: int, *, gathered: bool, both: bool) -> list[Kernel]:
        if not gathered or self.parts == 1:
            return _cast(elements, self.recipe, both=both)
        return [*_cast(elements // self.parts, self.recipe, both=False), *([_copy(elements, 1, 1)] if both else [])]


def _again(elements: int, recipe: Recipe) -> list[Kernel]:
    """The second order of what was cast before."""
    return _cast(elements, recipe, both=False) if recipe.by_rows else [_copy(elements, _WIDE, 1)]


def _cast(elements: int, recipe: Recipe, *, both: bool) -> list[Kernel]:
    if both and recipe.by_rows:
        return 2 * _cast(elements, recipe, both=False)
    look = [kernel("reduction", "amax", (1, elements), "bfloat16", read_bytes=elements * _WIDE, written_bytes=4)]
    return [*(look if recipe.finds_scale else []), _copy(elements, _WIDE, 2 if both else 1)]


def _copy(elements: int, read: int, written: int) -> Kernel:
    return kernel(
        "copy", "to_float8", (elements,), "bfloat16", read_bytes=elements * read, written_bytes=max(1, elements * written)
    )


def _is_router(product: Kernel, experts: int) -> bool:
    return experts in product.shape


def _block(block: Block, casts: _Casts) -> Block:
    forward = sum(kernel.kernel_class == "gemm" for kernel in block.discard.kernels)
    return replace(
        block, discard=_ahead(block.discard, casts, trains=False), options=tuple(_option(option, casts, forward) for option in block.options)
    )  # fmt: skip


def _option(option: BlockOption, casts: _Casts, forward: int) -> BlockOption:
    return replace(
        option, forward=_ahead(option.forward, casts, trains=True), backward=_back(option.backward, casts, forward),
        backward_accumulate=_back(option.backward_accumulate, casts, forward),
    )  # fmt: skip


def _ahead(run: Pass, casts: _Casts, *, trains: bool) -> Pass:
    return _with_casts(run, casts, again=len(run.kernels), trains=trains)


def _back(run: Pass, casts: _Casts, forward: int) -> Pass:
    """A backward pass: products beyond two for each of the forward pass run that again, and come first."""
    products = sum(kernel.kernel_class == "gemm" for kernel in run.kernels)
    return _with_casts(run, casts, again=max(0, products - 2 * forward), trains=True)


def _with_casts(run: Pass, casts: _Casts, *, again: int, trains: bool) -> Pass:
    """The pass with its products in eight bits; the first ``again`` of them are the forward pass's. A square product of as many tokens as columns counts as an input's gradient."""
    kernels: list[Kernel] = []
    moved = [0]
    seen = {"forward": 0, "input": 0, "weight": 0}
    last: tuple[object, ...] = ()
    for own in run.kernels:
        if own.kernel_class in _BARRIERS:
            last = ()
        if own.kernel_class == "gemm" and not _is_router(own, casts.experts):
            makes_weight = own.shape[2] == casts.tokens != own.shape[0]
            kind = "forward" if sum(seen.values()) < again else "weight" if makes_weight else "input"
            key = (kind, own.shape[0], own.shape[2])
            opens = kind == "input" or key != last
            seen[kind] += 1
            if kind == "forward":
                kernels += casts.forward(own, opens=opens, gathered=seen[kind] == 1, trains=trains)
            elif kind == "input":
                kernels += casts.input_gradient(own, gathered=seen[kind] == 1)
            else:
                kernels += casts.weight_gradient(own, opens=opens, gathered=seen[kind] > 1)
            last = key if kind != "input" else last
            kernels.append(in_precision(own, "fp8"))
        else:
            kernels.append(own)
        moved.append(len(kernels))
    before = [end - 1 for end in moved[1:]] + [len(kernels)]
    return Pass(kernels=tuple(kernels), memory=tuple(replace(event, kernel=before[event.kernel]) for event in run.memory))


def without_timed_casts(own: Price, device: DeviceProfile) -> Price:
    """Prices of kernels, less the cast of the left operand that timings of products in eight bits hold, where the device's curve is of such timings.

    **Model**: ``max(t - cast, flops / peak)``, the cast (2 m k bytes read, m k written, its scale known) as the board that was timed takes it.

    **Source**: collectors of the timings call whole linear layers on bfloat16 inputs with ``activation_scheme="static"`` (ai-dynamo/aiconfigurator collector/vllm/collect_gemm.py @00e9bded20; the
    collector of TensorRT-LLM likewise): 79 us for (8192, 1024, 1024) on H100 against 26 us in bfloat16.
    """

    def priced(kernels: Sequence[Kernel]) -> NDArray[np.float64]:
        seconds = own(kernels)
        places = [n for n, kernel in enumerate(kernels) if kernel.kernel_class == "gemm" and kernel.dtype == PRODUCTS_IN["fp8"]]
        timed = _timed_on(kernels[places[0]], device) if places else None
        if timed is not None:
            casts = price([_copy(kernels[n].shape[0] * kernels[n].shape[2], _WIDE, 1) for n in places], timed)
            least = np.array([kernels[n].flops for n in places]) / device.peak(PRODUCTS_IN["fp8"])
            seconds[places] = np.maximum(seconds[places] - casts, least)
        return seconds

    return priced


def _timed_on(product: Kernel, device: DeviceProfile) -> DeviceProfile | None:
    """The board whose timings price a product, casts included; None where they hold none."""
    pricer = pricer_of(product, device)
    if not isinstance(pricer, GridPricer) or pricer.curve.stack not in _TIMED_WITH_CASTS:
        return None
    return device if pricer.curve.num_points else load_hardware(_LENDERS[device.architecture])
