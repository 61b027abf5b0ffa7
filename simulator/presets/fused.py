"""Parts of a layer in one kernel, as trainers with kernels of their own run them (`Operators` says which).

Source: Transformer Engine 2.x (rmsnorm, ``fused_apply_rotary_pos_emb``) and Megatron-core 0.14 (``fusions/fused_bias_swiglu.py``,
``tensor_parallel/cross_entropy.py``): which tensors their autograd functions save.
"""

from __future__ import annotations

from hardware_models.kernel import Kernel
from simulator.presets.tape import FLOAT, Gradient, Parameter, Tape, Value, kernel, pointwise, reduction


def norm_in_one(tape: Tape, a: Value, weight: Parameter) -> Value:
    """RMS norm over the last axis; saves its input and the rows' reciprocal roots (float32)."""
    rows, columns = a.elements // a.shape[-1], a.shape[-1]
    out = tape.new("_fused_rms_norm", a.shape, a.dtype)
    roots = tape.new("_fused_rms_norm", (rows, 1), FLOAT, needs_gradient=False)
    forward = kernel("normalization", "_fused_rms_norm", (rows, columns), a.dtype, read_bytes=a.size_bytes + weight.size_bytes,
                     written_bytes=out.size_bytes + roots.size_bytes)  # fmt: skip
    backward = kernel("normalization", "_fused_rms_norm_backward", (rows, columns), a.dtype,
                      read_bytes=2 * a.size_bytes + roots.size_bytes + weight.size_bytes, written_bytes=a.size_bytes + weight.size_bytes)  # fmt: skip
    tape.record("_fused_rms_norm", kernels=(forward,), inputs=(a,), outputs=(out, roots), saved=(a, roots),
                gradients=(Gradient(targets=(a, weight), kernels=(backward,)),))  # fmt: skip
    return out


def gated_activation(tape: Tape, both: Value, weights: Value | None = None) -> Value:
    """``silu(gate) * up`` of a product that holds both side by side, times a weight a row where there are any; saves that product and the weights."""
    rows, width = both.elements // both.shape[-1], both.shape[-1] // 2
    out = tape.new("swiglu", (rows, width), both.dtype)
    n = out.elements
    given = (both,) if weights is None else (both, weights)
    backward = kernel("pointwise", "swiglu_backward", (n,), both.dtype, read_bytes=both.size_bytes + out.size_bytes, written_bytes=both.size_bytes)  # fmt: skip
    tape.record("swiglu", kernels=(pointwise("swiglu", n, both.dtype, num_read=2),), inputs=given, outputs=(out,), saved=given,
                gradients=(Gradient(targets=given, kernels=(backward,)),))  # fmt: skip
    return out


def rotate_in_one(tape: Tape, a: Value, cosines: Value, sines: Value) -> Value:
    """Rotary positions; saves nothing but the tables."""
    out = tape.new("rotary", a.shape, a.dtype)
    work = pointwise("rotary", a.elements, a.dtype)
    tape.record("rotary", kernels=(work,), inputs=(a, cosines, sines), outputs=(out,), gradients=(Gradient(targets=(a,), kernels=(work,)),))  # fmt: skip
    return out


def loss_in_place(tape: Tape, logits: Value, labels: Value) -> Value:
    """Mean negative log-likelihood; saves probabilities (float32), which the backward pass turns into the gradient before it casts that.

    ``logits`` live until the loss is there: the caller holds them.
    """
    rows, columns = logits.elements // logits.shape[-1], logits.shape[-1]
    shares, casts, gradient_casts = _probabilities(tape, logits)
    loss = tape.new("nll_loss_forward", (), FLOAT)
    work = (
        reduction("amax", rows, columns, FLOAT), pointwise("sub_", logits.elements, FLOAT), pointwise("exp", logits.elements, FLOAT),
        reduction("sum", rows, columns, FLOAT), pointwise("div_", logits.elements, FLOAT),
    )  # fmt: skip
    scaled = pointwise("mul", logits.elements, FLOAT)
    tape.record("cross_entropy", kernels=(*casts, *work), inputs=(logits, labels), outputs=(loss, shares), saved=(shares, labels),
                gradients=(Gradient(targets=(logits,), kernels=(scaled, *gradient_casts)),))  # fmt: skip
    return loss


def _probabilities(tape: Tape, logits: Value) -> tuple[Value, tuple[Kernel, ...], tuple[Kernel, ...]]:
    """What logits become, and the casts there and back."""
    if logits.dtype == FLOAT:
        return Value(shape=logits.shape, storage=logits.storage, needs_gradient=False, dtype=FLOAT), (), ()
    shares = tape.new("_to_copy", logits.shape, FLOAT, needs_gradient=False)
    narrow, wide, n = logits.size_bytes, shares.size_bytes, logits.elements
    there = kernel("copy", "_to_copy", (n,), FLOAT, read_bytes=narrow, written_bytes=wide)
    back = kernel("copy", "_to_copy", (n,), logits.dtype, read_bytes=wide, written_bytes=narrow)
    return shares, (there,), (back,)
