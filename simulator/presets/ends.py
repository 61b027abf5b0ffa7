"""The two ends of the chain: embeddings or patches at the front, head and loss at the back."""

from __future__ import annotations

from hardware_models.units import DTYPE_BYTES
from simulator.presets.attention import rotary_dim
from simulator.presets.fused import loss_in_place
from simulator.presets.halves import gathered, norm, project
from simulator.presets.pointwise import add, cast, dropout, gelu
from simulator.presets.products import cross_entropy, embedding, linear
from simulator.presets.setting import Setting
from simulator.presets.sharded_loss import sharded_cross_entropy
from simulator.presets.tape import (
    FLOAT,
    INDEX_DTYPE,
    Gradient,
    Parameter,
    Role,
    Tape,
    Value,
    copy,
    kernel,
    pointwise,
    reduction,
    view,
)

IMAGE_CHANNELS = 3


def word_table(setting: Setting) -> Parameter | None:
    """The embedding's matrix where front and head share it."""
    if not setting.config.tied or setting.config.head == "image":
        return None
    return Parameter(name="embedding.weight", shape=(setting.vocab, setting.config.hidden), dtype=setting.dtype, shared=True)


def front(tape: Tape, setting: Setting, words: Parameter | None) -> Value:
    """From the batch to the first boundary."""
    config = setting.config
    if config.head == "image":
        return _patches(tape, setting)
    table = (
        tape.use(words)
        if words is not None
        else tape.parameter("embedding.weight", (setting.vocab, config.hidden), setting.dtype)
    )
    x = embedding(tape, _batch(tape, (setting.micro_batch, setting.local_len)), table)
    x = view(tape, x, (setting.tokens, config.hidden))
    if config.token_types:
        types = tape.parameter("token_types.weight", (config.token_types, config.hidden), setting.dtype)
        x = add(tape, x, _rows(tape, setting, types, repeats=setting.micro_batch))
    if config.positions == "learned":
        positions = tape.parameter("positions.weight", (config.max_positions, config.hidden), setting.dtype)
        x = add(tape, x, _rows(tape, setting, positions, repeats=1, buffered=config.token_types > 0))
    if config.positions == "rotary":
        _rotary_tables(tape, setting)
    if config.causal and not setting.flash_attention:
        _mask(tape, setting)
    if config.post_norm:
        x = norm(tape, setting, x, "embedding_norm")
    if setting.gathers:
        shard = tape.new("reduce_scatter", (setting.stream_tokens, config.hidden), setting.dtype)
        tape.record(
            "reduce_scatter", kernels=(), inputs=(x,), outputs=(shard,), gradients=(Gradient(targets=(x,), collective=True),)
        )
        x = shard
    return dropout(tape, x, config.dropout, device=setting.device)


def buffer_bytes(setting: Setting) -> int:
    """Bytes of the model's buffers: positions and token types (BERT), rotary frequencies in two copies."""
    config = setting.config
    if config.token_types:
        return 2 * config.max_positions * DTYPE_BYTES[INDEX_DTYPE]
    return rotary_dim(setting) * DTYPE_BYTES[FLOAT] if config.positions == "rotary" else 0


def _batch(tape: Tape, shape: tuple[int, ...]) -> Value:
    return tape.new("batch", shape, INDEX_DTYPE, needs_gradient=False, role="outside")


def _rows(tape: Tape, setting: Setting, table: Parameter, *, repeats: int, buffered: bool = False) -> Value:
    """Rows of a table by position; the positions are made here and saved once, or are a buffer of the model."""
    role: Role = "outside" if buffered else "activation"
    indices = tape.new("arange", (setting.local_len,), INDEX_DTYPE, needs_gradient=False, role=role)
    if not buffered:
        tape.record("arange", kernels=(copy("arange", setting.local_len, INDEX_DTYPE),), inputs=(), outputs=(indices,))
    every = Value(shape=(repeats * setting.local_len,), storage=indices.storage, needs_gradient=False, dtype=INDEX_DTYPE)
    return embedding(tape, every, table)


def _rotary_tables(tape: Tape, setting: Setting) -> None:
    """Cosines and sines of the positions, alive for the whole micro-batch; made in float32."""
    width, rows = rotary_dim(setting), setting.local_len
    angles = tape.new("cat", (rows, width), FLOAT, needs_gradient=False)
    making = (pointwise("mul", rows * width // 2, FLOAT, num_read=2), copy("cat", rows * width, FLOAT))
    tape.record("cat", kernels=making, inputs=(), outputs=(angles,))
    for op in ("cos", "sin"):
        table = tape.new(op, (rows, width), setting.dtype, needs_gradient=False, role="carried")
        work = [pointwise(op, rows * width, FLOAT), pointwise("mul", rows * width, FLOAT)]
        if setting.dtype != FLOAT:
            work.append(copy("_to_copy", rows * width, setting.dtype))
        tape.record(op, kernels=tuple(work), inputs=(angles,), outputs=(table,))


def _mask(tape: Tape, setting: Setting) -> None:
    """The additive causal mask (samples, positions, positions), alive for the whole micro-batch."""
    shape = (setting.micro_batch, setting.local_len, setting.seq_len)
    mask = tape.new("where", shape, setting.dtype, needs_gradient=False, role="carried")
    work = (pointwise("le", setting.local_len * setting.seq_len, "bool"), pointwise("where", mask.elements, setting.dtype))
    tape.record("where", kernels=work, inputs=(), outputs=(mask,))


def _patches(tape: Tape, setting: Setting) -> Value:
    """Patches by one strided convolution, class token in front, positions added."""
    config, dtype = setting.config, setting.dtype
    batch, patches = setting.micro_batch, setting.seq_len - 1
    elements = config.patch**2
    weight = tape.parameter("patches.weight", (config.hidden, IMAGE_CHANNELS, elements), dtype)
    bias = tape.parameter("patches.bias", (config.hidden,), dtype)
    images = tape.new("batch", (batch, IMAGE_CHANNELS, patches * elements), dtype, needs_gradient=False, role="outside")
    out = tape.new("convolution", (batch * patches, config.hidden), dtype)
    shape = (batch, IMAGE_CHANNELS, config.hidden, 1, elements, patches, config.patch)
    flops = 2 * batch * patches * elements * IMAGE_CHANNELS * config.hidden
    forward = kernel(
        "convolution",
        "convolution",
        shape,
        dtype,
        flops=flops,
        read_bytes=images.size_bytes + weight.size_bytes,
        written_bytes=out.size_bytes,
    )
    backward = kernel("convolution", "convolution_backward_weight", shape, dtype, flops=flops, read_bytes=images.size_bytes + out.size_bytes, written_bytes=weight.size_bytes)  # fmt: skip
    summed = reduction("sum", config.hidden, batch * patches, dtype)
    tape.record("convolution", kernels=(forward,), inputs=(images,), outputs=(out,), saved=(images,),
                gradients=(Gradient(targets=(weight, bias), kernels=(backward, summed)),))  # fmt: skip
    token = tape.parameter("class_token", (config.hidden,), dtype)
    joined = tape.new("cat", (setting.tokens, config.hidden), dtype)
    tape.record("cat", kernels=(copy("cat", joined.elements, dtype),), inputs=(out,), outputs=(joined,),
                gradients=(Gradient(targets=(token,), kernels=(reduction("sum", config.hidden, batch, dtype),)), Gradient(targets=(out,), kernels=(copy("clone", out.elements, dtype),))))  # fmt: skip
    positions = tape.parameter("positions.weight", (setting.seq_len, config.hidden), dtype)
    placed = tape.new("add", joined.shape, dtype)
    tape.record("add", kernels=(pointwise("add", joined.elements, dtype, num_read=2),), inputs=(joined,), outputs=(placed,),
                gradients=(Gradient(targets=(positions,), kernels=(reduction("sum", positions.elements, batch, dtype),)), Gradient(targets=(joined,))))  # fmt: skip
    return dropout(tape, placed, config.dropout, device=setting.device)


def back(tape: Tape, setting: Setting, x: Value, words: Parameter | None) -> Value:
    """From the last boundary to the loss."""
    config = setting.config
    if config.head == "image":
        return _classified(tape, setting, x)
    full = gathered(tape, setting, x)
    shard = x if full is not x and not setting.operators.gathers_once else None
    shape = (config.hidden, setting.vocab)
    weight = tape.use(words) if words is not None else tape.parameter("head.weight", shape, setting.dtype)
    bias = tape.parameter("head.bias", (setting.vocab,), setting.dtype) if config.head == "masked_lm" else None
    logits = linear(tape, full, weight, bias, saved=shard, transposed=words is not None)
    if setting.operators.gathered_logits:
        return _loss_of_all(tape, setting, logits)
    if setting.operators.loss:
        return loss_in_place(tape, logits, _labels(tape, setting))
    scores = cast(tape, logits, FLOAT)
    if setting.operators.sharded_loss and setting.tp > 1:
        return sharded_cross_entropy(tape, scores, _labels(tape, setting))
    return cross_entropy(tape, scores, _labels(tape, setting))


def _loss_of_all(tape: Tape, setting: Setting, logits: Value) -> Value:
    """The whole vocabulary's loss on each rank: logits gathered into one tensor per rank and joined, in float32; the most likely token beside it.

    Logits in the model's format stay as long as the loss's probabilities: they are the stage's result, which is kept.

    Source: ``TransformerLMHead``, ``_all_concat`` and ``CrossEntropyLoss.forward`` (Aleph-Alpha/scaling @01b9d21dba src/scaling/transformer/model/layers/lm_head.py,
    src/scaling/core/nn/linear/utils.py, src/scaling/transformer/model/losses/cross_entropy.py).
    """
    whole = logits
    if setting.tp > 1:
        shape = (logits.shape[0], setting.tp * setting.vocab)
        parts, whole = tape.new("all_gather", shape, logits.dtype), tape.new("cat", shape, logits.dtype)
        shard = Gradient(targets=(logits,), kernels=(copy("clone", logits.elements, logits.dtype),))
        tape.record("all_gather", kernels=(), inputs=(logits,), outputs=(parts,), gradients=(shard,))
        join = copy("cat", whole.elements, whole.dtype)
        tape.record("cat", kernels=(join,), inputs=(parts,), outputs=(whole,), gradients=(Gradient(targets=(parts,)),))
    tape.record("result", kernels=(), inputs=(whole,), outputs=(), saved=(whole,))
    scores = cast(tape, whole, FLOAT)
    loss = cross_entropy(tape, scores, _labels(tape, setting))
    likely = reduction("argmax", scores.shape[0], scores.shape[-1], FLOAT)
    tokens = tape.new("argmax", (scores.shape[0],), INDEX_DTYPE, needs_gradient=False)
    tape.record("argmax", kernels=(likely,), inputs=(scores,), outputs=(tokens,))
    return loss


def transform(tape: Tape, setting: Setting, x: Value) -> Value:
    """What a masked language model does between its last layer and its head."""
    return norm(tape, setting, gelu(tape, project(tape, setting, x, setting.config.hidden, "transform")), "transform_norm")


def _labels(tape: Tape, setting: Setting) -> Value:
    """Targets per token: the batch's own, or padded and shifted by one for causal models (a view where there is one sample)."""
    given = _batch(tape, (setting.tokens,))
    if not setting.config.causal:
        return given
    elements = setting.tokens + setting.micro_batch
    padded = tape.new("constant_pad_nd", (elements,), INDEX_DTYPE, needs_gradient=False)
    tape.record(
        "constant_pad_nd", kernels=(copy("constant_pad_nd", elements, INDEX_DTYPE),), inputs=(given,), outputs=(padded,)
    )  # fmt: skip
    if setting.micro_batch == 1:
        return padded
    shifted = tape.new("clone", (setting.tokens,), INDEX_DTYPE, needs_gradient=False)
    tape.record("clone", kernels=(copy("clone", setting.tokens, INDEX_DTYPE),), inputs=(padded,), outputs=(shifted,))
    return shifted


def _classified(tape: Tape, setting: Setting, x: Value) -> Value:
    """Class token to logits to loss."""
    config, batch = setting.config, setting.micro_batch
    token = Value(shape=(batch, config.hidden), storage=x.storage, needs_gradient=True, dtype=x.dtype)
    tape.record("select", kernels=(), inputs=(x,), outputs=(token,),
                gradients=(Gradient(targets=(x,), kernels=(copy("select_backward", x.elements, x.dtype),)),))  # fmt: skip
    logits = project(tape, setting, token, config.num_classes, "head", bias=True)
    return cross_entropy(tape, cast(tape, logits, FLOAT), _batch(tape, (batch,)))
