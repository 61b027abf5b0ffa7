"""Mixture of experts: router, sorted tokens, grouped products, weighted sum.

Follows ``transformers``' ``grouped_mm`` implementation of experts, whose shapes are static. Routing is uniform: every expert
receives as many tokens as every other, unless the configuration states an imbalance or a capacity (`Experts`): then the rows are those of the busiest rank.

Not modelled: under the sigmoid router (DeepSeek-V3), the selection of groups of experts before the experts, and the router's
matrix in float32.
"""

from __future__ import annotations

from hardware_models.kernel import Kernel
from hardware_models.units import DTYPE_BYTES
from simulator.presets.fused import gated_activation
from simulator.presets.halves import gathered, network, project, reduced
from simulator.presets.pointwise import add, cast, multiply, silu, softmax, split
from simulator.presets.products import grouped_product
from simulator.presets.setting import Setting
from simulator.presets.tape import FLOAT, INDEX_DTYPE, Gradient, Tape, Value, copy, kernel, pointwise, reduction, view

OFFSET_DTYPE = "int32"


def mixture(tape: Tape, setting: Setting, x: Value) -> Value:
    """The branch of a mixture of experts from the normed stream, shared experts included."""
    experts = setting.config.experts
    assert experts is not None
    full = gathered(tape, setting, x)
    weights, indices = _route(tape, setting, full)
    routed = reduced(tape, setting, cast(tape, _experts(tape, setting, full, weights, indices), setting.dtype))
    if experts.num_shared == 0:
        return routed
    return add(tape, routed, network(tape, setting, x, experts.num_shared * experts.ffn, "shared"))


def _route(tape: Tape, setting: Setting, x: Value) -> tuple[Value, Value]:
    """Weights (tokens, top_k), float32, that sum to 1 per token, and the experts' indices."""
    experts = setting.config.experts
    assert experts is not None
    rows, k = x.shape[0], experts.top_k
    if experts.router == "softmax":
        scores = softmax(tape, cast(tape, project(tape, setting, x, experts.num_experts, "router", bias=False), FLOAT))
    elif setting.operators.routed:
        scores = _sigmoid(tape, cast(tape, project(tape, setting, x, experts.num_experts, "router", bias=False), FLOAT))
    else:
        scores = _sigmoid(tape, project(tape, setting, cast(tape, x, FLOAT), experts.num_experts, "router", bias=False))
    values = tape.new("topk", (rows, k), FLOAT)
    indices = tape.new("topk", (rows, k), INDEX_DTYPE, needs_gradient=False)
    zeros_and_scatter = (copy("new_zeros", scores.elements, FLOAT), copy("scatter", scores.elements, FLOAT))
    tape.record("topk", kernels=(reduction("topk", rows, experts.num_experts, FLOAT),), inputs=(scores,), outputs=(values, indices),
                saved=(indices,), gradients=(Gradient(targets=(scores,), kernels=zeros_and_scatter, scratch_bytes=scores.size_bytes),))  # fmt: skip
    return _normalized(tape, values), indices


def _sigmoid(tape: Tape, x: Value) -> Value:
    """Sigmoid, which saves its result."""
    out = tape.new("sigmoid", x.shape, x.dtype)
    backward = pointwise("sigmoid_backward", x.elements, x.dtype, num_read=2)
    tape.record("sigmoid", kernels=(pointwise("sigmoid", x.elements, x.dtype),), inputs=(x,), outputs=(out,), saved=(out,),
                gradients=(Gradient(targets=(x,), kernels=(backward,)),))  # fmt: skip
    return out


def _normalized(tape: Tape, values: Value) -> Value:
    """Each row divided by its sum in place; autograd keeps a copy of the dividend and the sums."""
    rows, k = values.shape
    total = tape.new("sum", (rows, 1), FLOAT)
    tape.record(
        "sum",
        kernels=(reduction("sum", rows, k, FLOAT),),
        inputs=(values,),
        outputs=(total,),
        gradients=(Gradient(targets=(values,)),),
    )
    before = tape.new("clone", (rows, k), FLOAT, needs_gradient=False)
    out = Value(shape=values.shape, storage=values.storage, needs_gradient=True, dtype=FLOAT)
    n = values.elements
    to_total = (*(pointwise(op, n, FLOAT) for op in ("div", "neg", "mul", "div")), reduction("sum", rows, k, FLOAT))
    tape.record(
        "div_", kernels=(copy("clone", n, FLOAT), pointwise("div_", n, FLOAT, num_read=2)), inputs=(values, total), outputs=(out, before),
        saved=(total, before),
        gradients=(Gradient(targets=(values,), kernels=(pointwise("div", n, FLOAT),)), Gradient(targets=(total,), kernels=to_total, scratch_bytes=3 * values.size_bytes)),
    )  # fmt: skip
    return out


def _experts(tape: Tape, setting: Setting, x: Value, weights: Value, indices: Value) -> Value:
    """Weighted sum over the chosen experts, (tokens, hidden)."""
    experts = setting.config.experts
    assert experts is not None
    tokens, k, hidden = x.shape[0], experts.top_k, setting.config.hidden
    rows, local = tokens * k, experts.num_experts // setting.ep
    order = _order(tape, indices, rows)
    sources = _indices(tape, "floor_divide", (order,), (rows,), pointwise("floor_divide", rows, INDEX_DTYPE))
    chosen = _take(tape, x, sources, (rows, hidden))
    gates = view(tape, _take(tape, weights, order, (rows,)), (rows, 1))
    counts = tape.new("histc", (local,), FLOAT, needs_gradient=False)
    counting = (kernel("copy", "_to_copy", (rows,), FLOAT, read_bytes=rows * DTYPE_BYTES[INDEX_DTYPE], written_bytes=rows * DTYPE_BYTES[FLOAT]),
                pointwise("histc", local, FLOAT))  # fmt: skip
    tape.record("histc", kernels=counting, inputs=(order,), outputs=(counts,))
    offsets = _indices(tape, "cumsum", (counts,), (local,), reduction("cumsum", 1, local, FLOAT), dtype=OFFSET_DTYPE)
    computed = setting.expert_rows(rows)
    chosen = _exchanged(tape, setting, chosen, computed)
    width = experts.ffn // setting.tp
    up_weight = tape.parameter("experts.gate_up", (local, hidden, 2 * width), setting.dtype)
    both, down_weight = (
        grouped_product(tape, chosen, up_weight, offsets),
        tape.parameter("experts.down", (local, width, hidden), setting.dtype),
    )
    if setting.operators.routed:
        inner = gated_activation(tape, both, weights=_exchanged(tape, setting, gates, computed))
        weighted = _exchanged(tape, setting, grouped_product(tape, inner, down_weight, offsets), rows)
    else:
        gate, up = split(tape, both, (width, width))
        out = grouped_product(tape, multiply(tape, silu(tape, gate), up), down_weight, offsets)
        weighted = multiply(tape, _exchanged(tape, setting, out, rows), gates)
    inverse_kernels = pointwise("index_put_", rows, INDEX_DTYPE)
    inverse = _indices(tape, "index_put_", (order,), (rows,), inverse_kernels)
    back = _take(tape, weighted, inverse, (rows, hidden))
    total = tape.new("sum", (tokens, hidden), back.dtype)
    tape.record("sum", kernels=(reduction("sum", total.elements, k, back.dtype),), inputs=(back,), outputs=(total,),
                gradients=(Gradient(targets=(back,), kernels=(copy("clone", back.elements, back.dtype),)),))  # fmt: skip
    return total


def _order(tape: Tape, indices: Value, rows: int) -> Value:
    """The permutation that sorts choices by expert; the sorted experts themselves are not kept."""
    order = tape.new("sort", (rows,), INDEX_DTYPE, needs_gradient=False)
    sorted_experts = tape.new("sort", (rows,), INDEX_DTYPE, needs_gradient=False)
    tape.record("sort", kernels=(reduction("sort", 1, rows, INDEX_DTYPE),), inputs=(indices,), outputs=(sorted_experts, order))
    return order


def _indices(
    tape: Tape, op: str, inputs: tuple[Value, ...], shape: tuple[int, ...], work: Kernel, dtype: str = INDEX_DTYPE
) -> Value:
    out = tape.new(op, shape, dtype, needs_gradient=False)
    tape.record(op, kernels=(work,), inputs=inputs, outputs=(out,))
    return out


def _take(tape: Tape, x: Value, indices: Value, shape: tuple[int, ...]) -> Value:
    """Rows of ``x`` by index; saves the indices, and adds gradients back by index."""
    out = tape.new("index", shape, x.dtype)
    forward = kernel(
        "copy", "index", (out.elements,), x.dtype, read_bytes=out.size_bytes + indices.size_bytes, written_bytes=out.size_bytes
    )
    backward = (copy("new_zeros", x.elements, x.dtype), pointwise("index_put", x.elements, x.dtype, num_read=2))
    tape.record("index", kernels=(forward,), inputs=(x, indices), outputs=(out,), saved=(indices,),
                gradients=(Gradient(targets=(x,), kernels=backward, scratch_bytes=x.size_bytes),))  # fmt: skip
    return out


def _exchanged(tape: Tape, setting: Setting, x: Value, rows: int) -> Value:
    """So many rows after an all-to-all over the expert parallel group; on one rank a copy where experts' rows are padded, else the rows themselves."""
    shape = (rows, *x.shape[1:])
    if setting.ep == 1:
        if rows == x.shape[0]:
            return x
        out = tape.new("constant_pad_nd", shape, x.dtype)
        tape.record("constant_pad_nd", kernels=(copy("constant_pad_nd", out.elements, x.dtype),), inputs=(x,), outputs=(out,),
                    gradients=(Gradient(targets=(x,), kernels=(copy("slice", x.elements, x.dtype),)),))  # fmt: skip
        return out
    out = tape.new("all_to_all", shape, x.dtype)
    tape.record("all_to_all", kernels=(), inputs=(x,), outputs=(out,), gradients=(Gradient(targets=(x,), collective=True),))
    return out
