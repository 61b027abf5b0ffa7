"""The attention half of a layer: norm, query, key and value, attention, output, residual."""

from __future__ import annotations

from simulator.presets.fused import rotate_in_one
from simulator.presets.halves import gathered, norm, project, reduced, residual
from simulator.presets.pointwise import add_constant_tensor, cast, clone, dropout, gradient_copy, rotate, scale, softmax, split
from simulator.presets.products import AttentionShape, batched_product, flash_attention
from simulator.presets.setting import Setting
from simulator.presets.tape import FLOAT, Gradient, Tape, Value, copy, reduction, view


def rotary_dim(setting: Setting) -> int:
    """Width of the rotary tables."""
    return setting.config.dim_per_head if setting.config.latent is None else setting.config.latent.rope_dim


def carried_table(tape: Tape, setting: Setting) -> Value:
    """A rotary table (positions, width) that the front block made."""
    return tape.new("table", (setting.local_len, rotary_dim(setting)), setting.dtype, needs_gradient=False, role="carried")


def attention_half(tape: Tape, setting: Setting, x: Value) -> Value:
    """The half from the boundary before it to the one after it."""
    config = setting.config
    normed = x if config.post_norm else norm(tape, setting, x, "attention_norm")
    query, key, value = _latent(tape, setting, normed) if config.latent is not None else _heads(tape, setting, normed)
    repeated = setting.flash_attention and setting.operators.repeated_keys and setting.heads > setting.kv_heads
    if repeated and config.latent is None:
        key, value = (_repeated_heads(tape, part, setting.heads // setting.kv_heads) for part in (key, value))
    size = AttentionShape(
        batch=setting.micro_batch, heads=setting.heads, kv_heads=setting.heads if config.latent is not None or repeated else setting.kv_heads,
        query_len=setting.local_len, kv_len=setting.seq_len, head_dim=config.dim_per_head, value_dim=config.value_dim_per_head,
        causal=config.causal,
    )  # fmt: skip
    if setting.flash_attention:
        mixed = flash_attention(tape, query, key, value, size)
    else:
        mixed = _attention_by_products(tape, query, key, value, size, setting)
    out = reduced(tape, setting, project(tape, setting, mixed, config.hidden, "output"))
    return residual(tape, setting, x, out, "attention_norm")


def _heads(tape: Tape, setting: Setting, normed: Value) -> tuple[Value, Value, Value]:
    """Query, key and value as (tokens, heads * width), with rotary positions applied."""
    config = setting.config
    full = gathered(tape, setting, normed)
    widths = (setting.heads * config.dim_per_head, *(2 * (setting.kv_heads * config.dim_per_head,)))
    if config.fused_qkv or setting.operators.attention_inputs:
        query, key, value = split(tape, project(tape, setting, full, sum(widths), "qkv", shard=normed), widths)
    else:
        query, key, value = (
            project(tape, setting, full, width, name, shard=normed)
            for width, name in zip(widths, ("query", "key", "value"), strict=True)
        )
    if config.positions == "rotary":
        cosines, sines = carried_table(tape, setting), carried_table(tape, setting)
        if setting.operators.rotary:
            query, key = (rotate_in_one(tape, part, cosines, sines) for part in (query, key))
            return query, key, clone(tape, value)
        query = rotate(tape, gradient_copy(tape, query), cosines, sines)
        key = rotate(tape, gradient_copy(tape, key), cosines, sines)
    return query, key, value


def _latent(tape: Tape, setting: Setting, normed: Value) -> tuple[Value, Value, Value]:
    """Query, key and value of multi-head latent attention, as ``transformers``' ``deepseek_v3`` makes them."""
    latent = setting.config.latent
    assert latent is not None
    tokens, heads = setting.tokens, setting.heads
    full = gathered(tape, setting, normed)
    low_query = norm(
        tape,
        setting,
        project(tape, setting, full, latent.query_rank, "query_down", shard=normed),
        "query_norm",
        latent.query_rank,
    )
    query = project(tape, setting, low_query, heads * (latent.nope_dim + latent.rope_dim), "query_up")
    low, shared_key = split(
        tape,
        project(tape, setting, full, latent.kv_rank + latent.rope_dim, "kv_down", shard=normed),
        (latent.kv_rank, latent.rope_dim),
    )
    low = norm(tape, setting, low, "kv_norm", latent.kv_rank)
    both = project(tape, setting, low, heads * (latent.nope_dim + latent.value_dim), "kv_up")
    query_nope, query_rope = split(tape, query, (heads * latent.nope_dim, heads * latent.rope_dim))
    key_nope, value = split(tape, both, (heads * latent.nope_dim, heads * latent.value_dim))
    cosines, sines = carried_table(tape, setting), carried_table(tape, setting)
    turned = rotate_in_one if setting.operators.rotary else rotate
    query = _joined(tape, query_nope, turned(tape, query_rope, cosines, sines), (tokens, heads * setting.config.dim_per_head))
    key = _joined(
        tape,
        key_nope,
        _repeated(tape, turned(tape, shared_key, cosines, sines), heads),
        (tokens, heads * setting.config.dim_per_head),
    )
    return query, key, clone(tape, value) if setting.operators.rotary else value


def _joined(tape: Tape, a: Value, b: Value, shape: tuple[int, ...]) -> Value:
    """Two parts of each head side by side, copied."""
    out = tape.new("cat", shape, a.dtype)
    tape.record("cat", kernels=(copy("cat", out.elements, a.dtype),), inputs=(a, b), outputs=(out,),
                gradients=(Gradient(targets=(a,), kernels=(copy("clone", a.elements, a.dtype),)),
                           Gradient(targets=(b,), kernels=(copy("clone", b.elements, b.dtype),))))  # fmt: skip
    return out


def _repeated(tape: Tape, x: Value, times: int) -> Value:
    """One key for all heads: a view whose gradient is summed."""
    out = Value(shape=(x.shape[0], times * x.shape[-1]), storage=x.storage, needs_gradient=True, dtype=x.dtype)
    tape.record("expand", kernels=(), inputs=(x,), outputs=(out,),
                gradients=(Gradient(targets=(x,), kernels=(reduction("sum", x.elements, times, x.dtype),)),))  # fmt: skip
    return out


def _attention_by_products(tape: Tape, query: Value, key: Value, value: Value, size: AttentionShape, setting: Setting) -> Value:
    """Attention operator by operator: scores, scale, mask, softmax, dropout, product with the values."""
    batch, s, t = size.batch * size.heads, size.query_len, size.kv_len
    rotated = setting.config.positions == "rotary"
    query, key, value = (
        part if rotated and part is not value else gradient_copy(tape, part) for part in (query, key, value)
    )  # fmt: skip
    query = _contiguous(tape, query, 1, size)
    key, value = (_contiguous(tape, part, size.heads // size.kv_heads, size) for part in (key, value))
    scores = scale(tape, view(tape, batched_product(tape, query, key, batch=batch, m=s, n=t, k=size.head_dim), (batch * s, t)))
    if size.causal:
        mask = tape.new("mask", (size.batch, s, t), setting.dtype, needs_gradient=False, role="carried")
        scores = add_constant_tensor(tape, scores, mask)
    weights = cast(tape, softmax(tape, cast(tape, scores, FLOAT) if setting.config.softmax_float32 else scores), setting.dtype)
    weights = view(tape, dropout(tape, weights, setting.config.dropout, device=setting.device), (batch, s, t))
    mixed = batched_product(tape, weights, value, batch=batch, m=s, n=size.value_dim, k=t)
    return clone(tape, mixed, (size.batch * s, size.heads * size.value_dim))


def _contiguous(tape: Tape, x: Value, repeats: int, size: AttentionShape) -> Value:
    """Heads made the outer axis by a copy, key-value heads repeated; a batch of one needs no copy to be strided so."""
    if repeats == 1 and size.batch == 1:
        return x
    return clone(tape, x) if repeats == 1 else _repeated_heads(tape, x, repeats)


def _repeated_heads(tape: Tape, x: Value, repeats: int) -> Value:
    """Each head copied so many times, side by side; the gradients of its copies are summed."""
    out = tape.new("clone", (x.shape[0], repeats * x.shape[-1]), x.dtype)
    tape.record("repeat", kernels=(copy("clone", out.elements, x.dtype),), inputs=(x,), outputs=(out,),
                gradients=(Gradient(targets=(x,), kernels=(reduction("sum", x.elements, repeats, x.dtype),)),))  # fmt: skip
    return out
