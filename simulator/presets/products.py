"""Operators with FLOPs: linear layers, batched and grouped products, attention. 2mnk per product, backward twice forward."""

from __future__ import annotations

from dataclasses import dataclass

from hardware_models.kernel import Kernel
from hardware_models.units import DTYPE_BYTES
from simulator.presets.pointwise import softmax
from simulator.presets.tape import FLOAT, Gradient, Parameter, Tape, Value, kernel, pointwise, reduction

EIGHT_BIT = "float8_e4m3fn"
"""torch's name of the format that products in eight bits read."""


def gemm(op: str, m: int, n: int, k: int, dtype: str, *, bias: bool = False) -> Kernel:
    """``C[m, n] = A[m, k] B[k, n]`` (+ a bias of n)."""
    itemsize = DTYPE_BYTES[dtype]
    read = (m * k + k * n + (n if bias else 0)) * itemsize
    return kernel("gemm", op, (m, n, k), dtype, read_bytes=read, written_bytes=m * n * itemsize, flops=2 * m * n * k)


def batched_gemm(op: str, batch: int, m: int, n: int, k: int, dtype: str) -> Kernel:
    """``batch`` products of ``m x k`` and ``k x n``."""
    itemsize = DTYPE_BYTES[dtype]
    return kernel(
        "batched_gemm", op, (batch, m, n, k), dtype, read_bytes=batch * (m * k + k * n) * itemsize,
        written_bytes=batch * m * n * itemsize, flops=2 * batch * m * n * k,
    )  # fmt: skip


def linear(
    tape: Tape, x: Value, weight: Parameter, bias: Parameter | None = None, *, saved: Value | None = None, transposed: bool = False,
    eight_bit: bool = False,
) -> Value:  # fmt: skip
    """``x weight + bias``.

    Args:
        x: (rows..., k).
        weight: shape (k, n), whatever its layout in memory.
        bias: (n,).
        saved: what is kept for the weight's gradient instead of ``x``: under sequence parallelism the shard that ``x`` was
            gathered from (it is gathered again in the backward pass).
        transposed: ``weight`` is given as (n, k).
        eight_bit: what is kept is the copy in eight bits that the product reads, made along with it.
    """
    k, n = reversed(weight.shape) if transposed else weight.shape
    rows = x.elements // k
    op = "addmm" if bias is not None else "mm"
    out = tape.new(op, (*x.shape[:-1], n), x.dtype)
    to_input = Gradient(targets=(x,), kernels=(gemm("mm", rows, k, n, x.dtype),))
    kept = _in_eight_bits(tape, saved or x) if eight_bit else saved or x
    gathered_again = 0 if saved is None else x.elements * DTYPE_BYTES[kept.dtype]
    to_weight = Gradient(targets=(weight,), kernels=(gemm("mm", k, n, rows, x.dtype),), scratch_bytes=gathered_again)
    gradients = [to_input, to_weight] if bias is not None else [to_weight, to_input]
    if bias is not None:
        gradients.append(Gradient(targets=(bias,), kernels=(reduction("sum", n, rows, x.dtype),)))
    tape.record(
        op, kernels=(gemm(op, rows, n, k, x.dtype, bias=bias is not None),), inputs=(x,), outputs=(out,), saved=(kept,),
        gradients=tuple(gradients),
    )  # fmt: skip
    return out


def _in_eight_bits(tape: Tape, x: Value) -> Value:
    """A copy in eight bits, in the one order that the weight's gradient reads. Its time is the product's (`simulator.precision`)."""
    out = tape.new("to_float8", x.shape, EIGHT_BIT, needs_gradient=False)
    tape.record("to_float8", kernels=(), inputs=(x,), outputs=(out,))
    return out


def batched_product(tape: Tape, a: Value, b: Value, *, batch: int, m: int, n: int, k: int) -> Value:
    """``batch`` products, both factors saved."""
    out = tape.new("bmm", (batch, m, n), a.dtype)
    tape.record(
        "bmm", kernels=(batched_gemm("bmm", batch, m, n, k, a.dtype),), inputs=(a, b), outputs=(out,), saved=(a, b),
        gradients=(
            Gradient(targets=(b,), kernels=(batched_gemm("bmm", batch, k, n, m, a.dtype),)),
            Gradient(targets=(a,), kernels=(batched_gemm("bmm", batch, m, k, n, a.dtype),)),
        ),
    )  # fmt: skip
    return out


@dataclass(frozen=True, slots=True, kw_only=True)
class AttentionShape:
    """Sizes of one attention: ``value_dim`` differs from ``head_dim`` under latent attention."""

    batch: int
    heads: int
    kv_heads: int
    query_len: int
    kv_len: int
    head_dim: int
    value_dim: int
    causal: bool

    @property
    def shape(self) -> tuple[int, ...]:
        """The kernel's shape."""
        return (self.batch, self.heads, self.kv_heads, self.query_len, self.kv_len, self.head_dim, int(self.causal))

    @property
    def forward_flops(self) -> int:
        """Scores and their product with the values, in full."""
        return 2 * self.batch * self.heads * self.query_len * self.kv_len * (self.head_dim + self.value_dim)


def flash_attention(tape: Tape, query: Value, key: Value, value: Value, size: AttentionShape) -> Value:
    """Attention in one kernel; saves query, key, value, result and the rows' log-sum-exp (float32).

    Not modelled: the recomputation of scores inside the backward kernel is not counted as FLOPs; dropout inside the kernel saves
    16 bytes of generator state, left out.
    """
    dtype = query.dtype
    rows = size.batch * size.query_len
    out = tape.new("attention", (rows, size.heads * size.value_dim), dtype)
    logsumexp = tape.new("attention", (size.batch, size.heads, size.query_len), FLOAT, needs_gradient=False)
    kv_ratio = size.kv_len // size.query_len
    operands = query.size_bytes + kv_ratio * (key.size_bytes + value.size_bytes)
    forward = kernel("attention", "attention", size.shape, dtype, flops=size.forward_flops, read_bytes=operands,
                     written_bytes=out.size_bytes + logsumexp.size_bytes)  # fmt: skip
    backward = kernel("attention", "attention_backward", size.shape, dtype, flops=2 * size.forward_flops,
                      read_bytes=operands + 2 * out.size_bytes + logsumexp.size_bytes, written_bytes=operands)  # fmt: skip
    tape.record(
        "attention", kernels=(forward,), inputs=(query, key, value), outputs=(out, logsumexp),
        saved=(query, key, value, out, logsumexp), gradients=(Gradient(targets=(query, key, value), kernels=(backward,)),),
    )  # fmt: skip
    return out


def grouped_product(tape: Tape, x: Value, weight: Parameter, offsets: Value) -> Value:
    """Rows in groups, each group times its own matrix; saves rows and offsets.

    Args:
        x: (rows, k), rows sorted by group, as many in each (uniform routing).
        weight: (groups, k, n).
        offsets: where groups end.
    """
    groups, k, n = weight.shape
    rows = x.shape[0]
    out = tape.new("_grouped_mm", (rows, n), x.dtype)

    def product(m_total: int, columns: int, inner: int) -> Kernel:
        shape = (groups, max(1, m_total // groups), columns, inner)
        return kernel("batched_gemm", "_grouped_mm", shape, x.dtype, flops=2 * rows * n * k,
                      read_bytes=x.size_bytes + weight.size_bytes, written_bytes=out.size_bytes)  # fmt: skip

    itemsize = DTYPE_BYTES[x.dtype]
    weight_kernel = kernel("batched_gemm", "_grouped_mm", (groups, k, n, max(1, rows // groups)), x.dtype, flops=2 * rows * n * k,
                           read_bytes=rows * (k + n) * itemsize, written_bytes=weight.size_bytes)  # fmt: skip
    tape.record(
        "_grouped_mm", kernels=(product(rows, n, k),), inputs=(x, offsets), outputs=(out,), saved=(x, offsets),
        gradients=(Gradient(targets=(weight,), kernels=(weight_kernel,)), Gradient(targets=(x,), kernels=(product(rows, k, n),))),
    )  # fmt: skip
    return out


def embedding(tape: Tape, indices: Value, weight: Parameter) -> Value:
    """Rows of a table; saves the indices."""
    vocabulary, width = weight.shape
    out = tape.new("embedding", (*indices.shape, width), weight.dtype)
    shape = (indices.elements, width, vocabulary)
    forward = kernel(
        "embedding",
        "embedding",
        shape,
        weight.dtype,
        read_bytes=indices.size_bytes + out.size_bytes,
        written_bytes=out.size_bytes,
    )
    backward = kernel("embedding", "embedding_dense_backward", shape, weight.dtype, read_bytes=indices.size_bytes + out.size_bytes,
                      written_bytes=weight.size_bytes)  # fmt: skip
    tape.record("embedding", kernels=(forward,), inputs=(indices,), outputs=(out,), saved=(indices,),
                gradients=(Gradient(targets=(weight,), kernels=(backward,)),))  # fmt: skip
    return out


def cross_entropy(tape: Tape, logits: Value, labels: Value) -> Value:
    """Mean negative log-likelihood over rows; saves log-probabilities, labels and the number of counted rows.

    ``logits`` live until the loss is there: torch's cross entropy is one call that holds them.
    """
    log_probabilities = softmax(tape, logits, "_log_softmax")
    rows = log_probabilities.shape[0]
    dtype = log_probabilities.dtype
    loss = tape.new("nll_loss_forward", (), dtype)
    weight = tape.new("nll_loss_forward", (), dtype, needs_gradient=False)
    itemsize = DTYPE_BYTES[dtype]
    forward = kernel("reduction", "nll_loss_forward", (1, rows), dtype, read_bytes=rows * itemsize, written_bytes=2 * itemsize)
    backward = pointwise("nll_loss_backward", log_probabilities.elements, dtype)
    tape.record(
        "nll_loss_forward", kernels=(forward,), inputs=(log_probabilities, labels, logits), outputs=(loss, weight),
        saved=(log_probabilities, labels, weight), gradients=(Gradient(targets=(log_probabilities,), kernels=(backward,)),),
    )  # fmt: skip
    return loss
