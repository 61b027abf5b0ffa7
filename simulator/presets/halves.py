"""Parts that both halves of a layer use: norms, residual sums, products split over the tensor parallel group."""

from __future__ import annotations

from simulator.presets.fused import gated_activation, norm_in_one
from simulator.presets.pointwise import add, dropout, gelu, gelu_new, layer_norm, multiply, rms_norm, silu
from simulator.presets.products import linear
from simulator.presets.setting import Setting
from simulator.presets.tape import Gradient, Tape, Value

_UNPACKED = frozenset({"router", "head", "transform"})
"""Linear layers that recipes of eight bits leave in the model's format."""


def norm(tape: Tape, setting: Setting, x: Value, name: str, width: int | None = None) -> Value:
    """The configuration's norm with parameters of its own."""
    width = width or setting.config.hidden
    weight = tape.parameter(f"{name}.weight", (width,), setting.dtype)
    if setting.config.norm == "rms_norm":
        return norm_in_one(tape, x, weight) if setting.operators.norm else rms_norm(tape, x, weight)
    bias = tape.parameter(f"{name}.bias", (width,), setting.dtype)
    return layer_norm(tape, x, weight, bias, device=setting.device)


def gathered(tape: Tape, setting: Setting, x: Value) -> Value:
    """``x`` with all tokens of the micro-batch: gathered over the tensor parallel group under sequence parallelism."""
    if not setting.gathers:
        return x
    full = tape.new("all_gather", (setting.tokens, *x.shape[1:]), x.dtype)
    tape.record("all_gather", kernels=(), inputs=(x,), outputs=(full,), gradients=(Gradient(targets=(x,), collective=True),))
    return full


def reduced(tape: Tape, setting: Setting, x: Value) -> Value:
    """``x`` summed over the tensor parallel group: in place, or scattered under sequence parallelism."""
    if not setting.gathers:
        return x
    shard = tape.new("reduce_scatter", (setting.stream_tokens, *x.shape[1:]), x.dtype)
    tape.record(
        "reduce_scatter", kernels=(), inputs=(x,), outputs=(shard,), gradients=(Gradient(targets=(x,), collective=True),)
    )
    return shard


def project(
    tape: Tape, setting: Setting, x: Value, width: int, name: str, *, shard: Value | None = None, bias: bool | None = None
) -> Value:  # fmt: skip
    """A linear layer to ``width`` columns of this rank.

    Args:
        shard: what ``x`` was gathered from, if it was: kept in its place unless the framework gathers once.
        bias: default: whether the configuration has biases.
    """
    weight = tape.parameter(f"{name}.weight", (x.shape[-1], width), setting.dtype)
    has_bias = setting.config.bias if bias is None else bias
    offset = tape.parameter(f"{name}.bias", (width,), setting.dtype) if has_bias else None
    saved = None if shard is x or setting.operators.gathers_once else shard
    return linear(tape, x, weight, offset, saved=saved, eight_bit=setting.operators.eight_bit_inputs and name not in _UNPACKED)


def residual(tape: Tape, setting: Setting, x: Value, branch: Value, name: str) -> Value:
    """``x + dropout(branch)``, and the norm behind it where the configuration norms sums."""
    out = add(tape, x, dropout(tape, branch, setting.config.dropout, device=setting.device))
    return norm(tape, setting, out, name) if setting.config.post_norm else out


def activated(tape: Tape, setting: Setting, up: Value) -> Value:
    """The plain activation of the configuration."""
    return gelu_new(tape, up) if setting.config.activation == "gelu_new" else gelu(tape, up)


def network(tape: Tape, setting: Setting, x: Value, ffn: int, name: str) -> Value:
    """Up, activation (or gate), down: ``x`` is the normed stream; returns the branch, summed over the tensor parallel group."""
    full = gathered(tape, setting, x)
    width = ffn // setting.tp
    if setting.config.activation == "swiglu" and setting.operators.gated:
        inner = gated_activation(tape, project(tape, setting, full, 2 * width, f"{name}.gate_up", shard=x))
    elif setting.config.activation == "swiglu":
        gate = silu(tape, project(tape, setting, full, width, f"{name}.gate", shard=x))
        inner = multiply(tape, gate, project(tape, setting, full, width, f"{name}.up", shard=x))
    else:
        inner = activated(tape, setting, project(tape, setting, full, width, f"{name}.up", shard=x))
    return reduced(tape, setting, project(tape, setting, inner, setting.config.hidden, f"{name}.down"))
