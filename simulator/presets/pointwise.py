"""Operators that do no products: what each launches and saves in eager torch, forward and backward.

Source: the derivative formulas of torch's autograd (``derivatives.yaml``, torch 2.13) and the operators that eager runs of
``transformers`` 5.23 models dispatch; tests/simulator/test_presets_agree.py compares against such runs.
"""

from __future__ import annotations

from hardware_models.kernel import Kernel
from hardware_models.units import DTYPE_BYTES
from simulator.presets.tape import FLOAT, Gradient, Parameter, Tape, Value, copy, kernel, pointwise, reduction

BOOL = "bool"


def add(tape: Tape, a: Value, b: Value) -> Value:
    """``a + b``; ``b`` may be broadcast over leading axes."""
    out = tape.new("add", a.shape, a.dtype)
    gradients = [Gradient(targets=(a,))]
    if b.elements == a.elements:
        gradients.append(Gradient(targets=(b,)))
    else:
        gradients.append(Gradient(targets=(b,), kernels=(reduction("sum", b.elements, a.elements // b.elements, a.dtype),)))
    tape.record("add", kernels=(pointwise("add", a.elements, a.dtype, num_read=2),), inputs=(a, b), outputs=(out,), gradients=tuple(gradients))  # fmt: skip
    return out


def add_scalar(tape: Tape, a: Value) -> Value:
    """``a + constant``."""
    return _unary(tape, "add", a, saves_input=False, gradient=())


def scale(tape: Tape, a: Value) -> Value:
    """``constant * a``."""
    return _unary(tape, "mul", a, saves_input=False, gradient=(pointwise("mul", a.elements, a.dtype),))


def add_constant_tensor(tape: Tape, a: Value, constant: Value) -> Value:
    """``a + constant`` for a tensor without gradient (an attention mask)."""
    out = tape.new("add", a.shape, a.dtype)
    tape.record("add", kernels=(pointwise("add", a.elements, a.dtype, num_read=2),), inputs=(a, constant), outputs=(out,), gradients=(Gradient(targets=(a,)),))  # fmt: skip
    return out


def multiply(tape: Tape, a: Value | Parameter, b: Value) -> Value:
    """``a * b``, the smaller broadcast; each is saved if the other needs a gradient."""
    larger = a if a.elements >= b.elements else b
    dtype = a.dtype if DTYPE_BYTES[a.dtype] >= DTYPE_BYTES[b.dtype] else b.dtype
    out = tape.new("mul", larger.shape, dtype)
    product = pointwise("mul", out.elements, dtype, num_read=2)
    wanted = tuple(target for target in (b, a) if isinstance(target, Parameter) or target.needs_gradient)
    kernels, scratch_bytes = [product] * len(wanted), 0
    for target in wanted:
        if target.elements < out.elements:
            kernels.append(reduction("sum", target.elements, out.elements // target.elements, dtype))
            scratch_bytes += out.size_bytes
        if target.dtype != dtype:
            kernels.append(copy("_to_copy", target.elements, target.dtype))
            scratch_bytes += target.elements * DTYPE_BYTES[dtype]
    gradient = Gradient(targets=wanted, kernels=tuple(kernels), scratch_bytes=scratch_bytes)
    saved = []
    if isinstance(a, Parameter) or a.needs_gradient:
        saved.append(b)
    if b.needs_gradient and isinstance(a, Value):
        saved.append(a)
    inputs = (b,) if isinstance(a, Parameter) else (a, b)
    tape.record("mul", kernels=(product,), inputs=inputs, outputs=(out,), saved=tuple(saved), gradients=(gradient,))
    return out


def square(tape: Tape, a: Value) -> Value:
    """``a ** 2`` as ``pow``."""
    return _power(tape, a)


def cube(tape: Tape, a: Value) -> Value:
    """``a ** 3`` as ``pow``."""
    return _power(tape, a)


def _power(tape: Tape, a: Value) -> Value:
    n, dtype = a.elements, a.dtype
    backward = (pointwise("pow", n, dtype), pointwise("mul", n, dtype), pointwise("mul", n, dtype, num_read=2))
    return _unary(tape, "pow", a, saves_input=True, gradient=backward, scratch_bytes=2 * a.size_bytes)


def tanh(tape: Tape, a: Value) -> Value:
    """``tanh(a)``, which saves its result."""
    return _unary(tape, "tanh", a, saves_input=False, saves_result=True, gradient=(pointwise("tanh_backward", a.elements, a.dtype, num_read=2),))  # fmt: skip


def rsqrt(tape: Tape, a: Value) -> Value:
    """``1 / sqrt(a)``, which saves its result."""
    n, dtype = a.elements, a.dtype
    backward = (pointwise("pow", n, dtype), pointwise("mul", n, dtype), pointwise("mul", n, dtype, num_read=2))
    return _unary(tape, "rsqrt", a, saves_input=False, saves_result=True, gradient=backward, scratch_bytes=2 * a.size_bytes)


def silu(tape: Tape, a: Value) -> Value:
    """``a * sigmoid(a)`` in one kernel."""
    return _unary(tape, "silu", a, saves_input=True, gradient=(pointwise("silu_backward", a.elements, a.dtype, num_read=2),))


def gelu(tape: Tape, a: Value) -> Value:
    """GELU in one kernel."""
    return _unary(tape, "gelu", a, saves_input=True, gradient=(pointwise("gelu_backward", a.elements, a.dtype, num_read=2),))


def gelu_new(tape: Tape, a: Value) -> Value:
    """GELU's tanh form written out, as ``transformers``' ``gelu_new`` runs it: ``0.5 a (1 + tanh(c (a + 0.044715 a^3)))``."""
    half = scale(tape, a)
    inner = scale(tape, add(tape, a, scale(tape, cube(tape, a))))
    return multiply(tape, half, add_scalar(tape, tanh(tape, inner)))


def _unary(
    tape: Tape, op: str, a: Value, *, saves_input: bool, gradient: tuple[Kernel, ...], saves_result: bool = False,
    scratch_bytes: int = 0,
) -> Value:  # fmt: skip
    out = tape.new(op, a.shape, a.dtype)
    saved = ((a,) if saves_input else ()) + ((out,) if saves_result else ())
    tape.record(
        op, kernels=(pointwise(op, a.elements, a.dtype),), inputs=(a,), outputs=(out,), saved=saved,
        gradients=(Gradient(targets=(a,), kernels=gradient, scratch_bytes=scratch_bytes),),
    )  # fmt: skip
    return out


def cast(tape: Tape, a: Value, dtype: str) -> Value:
    """``a`` in another dtype; ``a`` itself where it has it."""
    if a.dtype == dtype:
        return a
    out = tape.new("_to_copy", a.shape, dtype, needs_gradient=a.needs_gradient)
    forward = _conversion(a.elements, a.dtype, dtype)
    backward = _conversion(a.elements, dtype, a.dtype)
    tape.record("_to_copy", kernels=(forward,), inputs=(a,), outputs=(out,), gradients=(Gradient(targets=(a,), kernels=(backward,)),))  # fmt: skip
    return out


def _conversion(elements: int, before: str, after: str) -> Kernel:
    return kernel("copy", "_to_copy", (elements,), after, read_bytes=elements * DTYPE_BYTES[before], written_bytes=elements * DTYPE_BYTES[after])  # fmt: skip


def clone(tape: Tape, a: Value, shape: tuple[int, ...] | None = None) -> Value:
    """A contiguous copy of a transposed tensor."""
    out = tape.new("clone", shape or a.shape, a.dtype)
    tape.record("clone", kernels=(copy("clone", a.elements, a.dtype),), inputs=(a,), outputs=(out,), gradients=(Gradient(targets=(a,)),))  # fmt: skip
    return out


def gradient_copy(tape: Tape, a: Value) -> Value:
    """A view whose gradient arrives transposed and is made contiguous."""
    out = Value(shape=a.shape, storage=a.storage, needs_gradient=a.needs_gradient, dtype=a.dtype)
    tape.record("view", kernels=(), inputs=(a,), outputs=(out,), gradients=(Gradient(targets=(a,), kernels=(copy("clone", a.elements, a.dtype),)),))  # fmt: skip
    return out


def split(tape: Tape, a: Value, widths: tuple[int, ...]) -> tuple[Value, ...]:
    """Views of consecutive columns; their gradients are joined by a copy."""
    rows = a.elements // a.shape[-1]
    parts = tuple(
        Value(shape=(rows, width), storage=a.storage, needs_gradient=a.needs_gradient, dtype=a.dtype) for width in widths
    )
    joined = copy("cat", a.elements, a.dtype)
    tape.record("split", kernels=(), inputs=(a,), outputs=parts, gradients=(Gradient(targets=(a,), kernels=(joined,)),))
    return parts


def dropout(tape: Tape, a: Value, probability: float, *, device: str) -> Value:
    """``a`` with some elements zeroed; on CUDA the mask is saved as bool by one kernel, on the CPU in ``a``'s dtype by three."""
    if probability == 0.0:
        return a
    n = a.elements
    if device == "cuda":
        mask = tape.new("native_dropout", a.shape, BOOL, needs_gradient=False)
        read = written = a.size_bytes + mask.size_bytes
        kernels: tuple[Kernel, ...] = (
            kernel("pointwise", "native_dropout", (n,), a.dtype, read_bytes=a.size_bytes, written_bytes=written),
        )
        backward = kernel("pointwise", "native_dropout_backward", (n,), a.dtype, read_bytes=read, written_bytes=a.size_bytes)
    else:
        mask = tape.new("bernoulli_", a.shape, a.dtype, needs_gradient=False)
        kernels = (pointwise("bernoulli_", n, a.dtype, num_read=0), pointwise("div_", n, a.dtype), pointwise("mul", n, a.dtype, num_read=2))  # fmt: skip
        backward = pointwise("mul", n, a.dtype, num_read=2)
    out = tape.new("mul", a.shape, a.dtype)
    tape.record("dropout", kernels=kernels, inputs=(a,), outputs=(out, mask), saved=(mask,), gradients=(Gradient(targets=(a,), kernels=(backward,)),))  # fmt: skip
    return out


def layer_norm(tape: Tape, a: Value, weight: Parameter, bias: Parameter, *, device: str) -> Value:
    """Layer norm over the last axis in one kernel; saves its input, means and reciprocal deviations (float32 on CUDA)."""
    rows, columns = a.elements // a.shape[-1], a.shape[-1]
    out = tape.new("native_layer_norm", a.shape, a.dtype)
    statistics_dtype = FLOAT if device == "cuda" and DTYPE_BYTES[a.dtype] < DTYPE_BYTES[FLOAT] else a.dtype
    statistics = tuple(tape.new("native_layer_norm", (rows, 1), statistics_dtype, needs_gradient=False) for _ in range(2))
    forward = kernel("normalization", "native_layer_norm", (rows, columns), a.dtype, read_bytes=a.size_bytes + weight.size_bytes + bias.size_bytes,
                     written_bytes=out.size_bytes + sum(s.size_bytes for s in statistics))  # fmt: skip
    backward = kernel("normalization", "native_layer_norm_backward", (rows, columns), a.dtype,
                      read_bytes=2 * a.size_bytes + sum(s.size_bytes for s in statistics) + weight.size_bytes + bias.size_bytes,
                      written_bytes=a.size_bytes + weight.size_bytes + bias.size_bytes)  # fmt: skip
    tape.record("native_layer_norm", kernels=(forward,), inputs=(a,), outputs=(out, *statistics), saved=(a, *statistics),
                gradients=(Gradient(targets=(a, weight, bias), kernels=(backward,)),))  # fmt: skip
    return out


def rms_norm(tape: Tape, a: Value, weight: Parameter) -> Value:
    """RMS norm over the last axis as ``transformers`` writes it: in float32, operator by operator, then scaled in ``a``'s dtype."""
    x = cast(tape, a, FLOAT)
    inverse = rsqrt(tape, add_scalar(tape, mean(tape, square(tape, x))))
    normal = multiply(tape, x, inverse)
    return multiply(tape, weight, cast(tape, normal, a.dtype))


def mean(tape: Tape, a: Value) -> Value:
    """Mean over the last axis, kept with size 1."""
    rows, columns = a.elements // a.shape[-1], a.shape[-1]
    out = tape.new("mean", (*a.shape[:-1], 1), a.dtype)
    tape.record("mean", kernels=(reduction("mean", rows, columns, a.dtype),), inputs=(a,), outputs=(out,),
                gradients=(Gradient(targets=(a,), kernels=(pointwise("div", a.elements, a.dtype),)),))  # fmt: skip
    return out


def softmax(tape: Tape, a: Value, op: str = "_softmax") -> Value:
    """Softmax or log-softmax over the last axis, which saves its result."""
    rows, columns = a.elements // a.shape[-1], a.shape[-1]
    out = tape.new(op, a.shape, a.dtype)
    forward = kernel("softmax", op, (rows, columns), a.dtype, read_bytes=a.size_bytes, written_bytes=out.size_bytes)
    backward = kernel(
        "softmax", f"{op}_backward_data", (rows, columns), a.dtype, read_bytes=2 * a.size_bytes, written_bytes=a.size_bytes
    )
    tape.record(op, kernels=(forward,), inputs=(a,), outputs=(out,), saved=(out,), gradients=(Gradient(targets=(a,), kernels=(backward,)),))  # fmt: skip
    return out


def rotate(tape: Tape, a: Value, cosines: Value, sines: Value) -> Value:
    """Rotary positions: ``a cos + rotate_half(a) sin``; saves the tables only."""
    straight = multiply(tape, a, cosines)
    n, half, dtype = a.elements, a.elements // 2, a.dtype
    turned = tape.new("cat", a.shape, dtype)
    forward = (pointwise("neg", half, dtype), copy("cat", n, dtype))
    backward = (pointwise("neg", half, dtype), copy("slice_backward", n, dtype), copy("slice_backward", n, dtype), pointwise("add", n, dtype, num_read=2))  # fmt: skip
    tape.record("rotate_half", kernels=forward, inputs=(a,), outputs=(turned,),
                gradients=(Gradient(targets=(a,), kernels=backward, scratch_bytes=2 * a.size_bytes),))  # fmt: skip
    return add(tape, straight, multiply(tape, turned, sines))
