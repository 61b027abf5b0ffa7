"""Cross entropy of a vocabulary that tensor parallelism splits, as torch's loss parallelism computes it."""

from __future__ import annotations

from hardware_models.units import DTYPE_BYTES
from simulator.presets.tape import Gradient, Tape, Value, pointwise, reduction

_GRADIENT_TEMPORARIES = 2
"""Tensors of the logits' size beside log-probabilities and result while the gradient is made: the one of the labels and the exponentials, then the former and the sum."""


def sharded_cross_entropy(tape: Tape, logits: Value, labels: Value) -> Value:
    """Mean negative log-likelihood over rows whose classes are split; saves log-probabilities, labels and the number of counted rows.

    **Model**: maxima and sums of rows travel, not logits. Softmax is written out, so that logits, shifted logits and their exponentials are alive together; the gradient is
    ``(one-hot + exp(log p)) g``, each operation with a tensor of its own: four of the logits' size at most, where torch's kernel for an unsplit vocabulary has three.

    **Source**: ``_log_softmax`` and ``_nll_loss_and_log_softmax_backward`` (torch/distributed/tensor/parallel/loss.py, 2.13).

    **Not modelled**: the sums' time (a number a row), rows' indices of classes.

    Args:
        tape: gets the steps.
        logits: (rows, classes of this rank), float32; live until the loss is there.
        labels: (rows,).
    """
    n, dtype, rows = logits.elements, logits.dtype, logits.elements // logits.shape[-1]
    most = _number_a_row(tape, "amax", logits)
    shifted = _less(tape, logits, most)
    grown = tape.new("exp", logits.shape, dtype, needs_gradient=False)
    tape.record("exp", kernels=(pointwise("exp", n, dtype),), inputs=(shifted,), outputs=(grown,))
    log_probabilities = _less(tape, shifted, _number_a_row(tape, "sum", grown))
    loss, weight = tape.new("nll_loss", (), dtype), tape.new("nll_loss", (), dtype, needs_gradient=False)
    backward = (
        pointwise("zeros_like", n, dtype, num_read=0), pointwise("exp", n, dtype), pointwise("add", n, dtype, num_read=2),
        pointwise("mul", n, dtype),
    )  # fmt: skip
    gradient = Gradient(
        targets=(log_probabilities,), kernels=backward, scratch_bytes=_GRADIENT_TEMPORARIES * n * DTYPE_BYTES[dtype]
    )
    tape.record(
        "nll_loss", kernels=(reduction("gather", rows, 1, dtype),), inputs=(log_probabilities, labels, logits), outputs=(loss, weight),
        saved=(log_probabilities, labels, weight), gradients=(gradient,),
    )  # fmt: skip
    return loss


def _number_a_row(tape: Tape, op: str, a: Value) -> Value:
    """A reduction over the classes of this rank."""
    columns = a.shape[-1]
    rows = a.elements // columns
    out = tape.new(op, (rows, 1), a.dtype, needs_gradient=False)
    tape.record(op, kernels=(reduction(op, rows, columns, a.dtype),), inputs=(a,), outputs=(out,))
    return out


def _less(tape: Tape, a: Value, b: Value) -> Value:
    """``a - b``, one number of ``b`` a row; the gradient of log-softmax is made with the loss's and passes through."""
    out = tape.new("sub", a.shape, a.dtype)
    tape.record("sub", kernels=(pointwise("sub", a.elements, a.dtype),), inputs=(a, b), outputs=(out,), gradients=(Gradient(targets=(a,)),))  # fmt: skip
    return out
