"""build_workload: a transformer configuration -> the `Workload` of one micro-batch on one rank, without torch."""

from __future__ import annotations

from collections.abc import Callable, Hashable
from dataclasses import dataclass
from functools import lru_cache
from itertools import chain

from hardware_models.kernel import Kernel
from hardware_models.units import DTYPE_BYTES
from simulator.presets.attention import attention_half
from simulator.presets.config import TransformerConfig
from simulator.presets.ends import IMAGE_CHANNELS, back, buffer_bytes, front, transform, word_table
from simulator.presets.halves import network, norm, residual
from simulator.presets.mixture import mixture
from simulator.presets.operators import EAGER, Operators
from simulator.presets.passes import Section, block_of
from simulator.presets.products import gemm
from simulator.presets.setting import Device, Setting
from simulator.presets.tape import INDEX_DTYPE, Parameter, Tape, Value, pointwise
from simulator.workload import Block, ParameterTensor, Pass, Workload

Half = Callable[[Tape, Setting, Value], Value]
MOST_SECTIONS = 512
"""Networks that are kept."""


def build_workload(
    config: TransformerConfig,
    *,
    micro_batch: int,
    seq_len: int,
    dtype: str = "bfloat16",
    tp: int = 1,
    cp: int = 1,
    ep: int = 1,
    sequence_parallel: bool = False,
    flash_attention: bool = True,
    device: Device = "cuda",
    operators: Operators = EAGER,
) -> Workload:
    """The workload of one rank of a tensor, context and expert parallel group.

    Args:
        micro_batch: samples per micro-batch.
        seq_len: tokens per sample, before context parallelism splits them.
        dtype: of parameters and activations, torch's name.
        tp: tensor parallel degree; must divide heads and network width.
        cp: context parallel degree; must divide ``seq_len``.
        ep: expert parallel degree; must divide the number of experts.
        sequence_parallel: split the residual stream over the tensor parallel group.
        flash_attention: one attention kernel that keeps no scores; else products, softmax and dropout one by one.
        device: decides what dropout saves (a bool mask on cuda, one in ``dtype`` on the cpu).
        operators: what the trainer runs in one kernel.

    Returns:
        Blocks: ``embedding``; per layer ``attention`` and ``network`` (or ``experts``), the final norm with the last of them;
        ``transform`` (masked language models); ``head``. Blocks with the same work are the same object.

    Raises:
        InputError: a degree or length that breaks a rule.

    Model: every operator that eager torch runs in the corresponding ``transformers`` model, with what autograd saves for each.
    FLOPs: 2mnk per product, attention in full, backward twice forward.

    Not modelled: collectives (they belong to the plan; the memory that they fill is here), the integer bookkeeping of a few
    bytes before masks, the allocator.
    """
    setting = Setting(
        config=config, micro_batch=micro_batch, seq_len=seq_len, dtype=dtype, tp=tp, cp=cp, ep=ep,
        sequence_parallel=sequence_parallel, flash_attention=flash_attention, device=device,
        operators=operators,
    )  # fmt: skip
    words = word_table(setting)
    sections = _sections(setting, words)
    made: dict[int, Block] = {id(section): _block(section) for section in dict.fromkeys(sections)}
    own = {
        id(section): tuple(one.elements for one in section.tape.parameters if not one.shared)
        for section in dict.fromkeys(sections)
    }
    elements = tuple(chain.from_iterable(own[id(section)] for section in sections))
    elements += () if words is None else (words.elements,)
    size_bytes = sum(elements) * DTYPE_BYTES[dtype]
    return Workload(
        model=config.name, micro_batch=micro_batch, tokens=micro_batch if config.head == "image" else micro_batch * seq_len,
        blocks=tuple(made[id(section)] for section in sections),
        parameter_elements=sum(elements), parameter_bytes=size_bytes, buffer_bytes=buffer_bytes(setting),
        gradient_bytes=size_bytes, shared_gradient_bytes=0 if words is None else words.size_bytes,
        shared_accumulate=_shared_accumulate(words), optimizer_tensors=elements,
        batch_bytes=_batch_bytes(setting), mixes_samples=False, notes=_notes(setting),
        shared_parameters=() if words is None else (ParameterTensor(elements=words.elements, size_bytes=words.size_bytes, trained=True),),
    )  # fmt: skip


def _sections(setting: Setting, words: Parameter | None) -> list[Section]:
    """The chain; layers that do the same share one section."""
    config = setting.config
    tape = Tape()
    sections = [Section(name="embedding", tape=tape, entering=None, leaving=front(tape, setting, words))]
    attention = _half(setting, "attention", attention_half)
    last_is_normed = not config.post_norm
    kinds: dict[tuple[bool, bool], Section] = {}
    for layer in range(config.layers):
        key = (config.has_experts(layer), last_is_normed and layer == config.layers - 1)
        if key not in kinds:
            kinds[key] = _network_section(_Rows(setting), experts=key[0], final=key[1])
        sections += [attention, kinds[key]]
    if config.head == "masked_lm":
        sections.append(_half(setting, "transform", transform))
    tape = Tape()
    entering = _boundary(tape, setting)
    sections.append(
        Section(
            name="head", tape=tape, entering=entering, leaving=back(tape, setting, entering, words), makes_shared=True,
            selects=not setting.operators.alternate,
        )
    )  # fmt: skip
    return sections


def _boundary(tape: Tape, setting: Setting) -> Value:
    return tape.new("input", (setting.stream_tokens, setting.config.hidden), setting.dtype)


def _half(setting: Setting, name: str, half: Half, remade: tuple[Kernel, ...] = ()) -> Section:
    tape = Tape()
    entering = _boundary(tape, setting)
    return Section(
        name=name, tape=tape, entering=entering, leaving=half(tape, setting, entering), alternate=setting.operators.alternate,
        unread=setting.operators.unread, remade=remade,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, eq=False)
class _Rows:
    """A setting by what a layer without attention depends on: its rows, however samples and context parallelism come to them."""

    setting: Setting

    @property
    def _key(self) -> tuple[Hashable, ...]:
        own = self.setting
        return (own.config, own.tokens, own.tp, own.ep, own.gathers, own.dtype, own.device, own.operators)

    def __hash__(self) -> int:
        return hash(self._key)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, _Rows) and self._key == other._key


@lru_cache(maxsize=MOST_SECTIONS)
def _network_section(rows: _Rows, *, experts: bool, final: bool) -> Section:
    def half(tape: Tape, setting: Setting, x: Value) -> Value:
        config = setting.config
        normed = x if config.post_norm else norm(tape, setting, x, "network_norm")
        branch = mixture(tape, setting, normed) if experts else network(tape, setting, normed, config.ffn, "network")
        out = residual(tape, setting, x, branch, "network_norm")
        return norm(tape, setting, out, "final_norm") if final else out

    return _half(rows.setting, "experts" if experts else "network", half, _residual_again(rows.setting))


@lru_cache(maxsize=2 * MOST_SECTIONS)
def _block(section: Section) -> Block:
    """The block of a section, which is made once: splits of a search that agree in rows share a layer's network."""
    return block_of(section)


def _residual_again(setting: Setting) -> tuple[Kernel, ...]:
    """What makes the stream between a layer's halves again, where both are one region: attention's output product and the residual sum."""
    if not setting.operators.alternate or setting.gathers:
        return ()
    hidden, dtype = setting.config.hidden, setting.dtype
    width = setting.heads * setting.config.value_dim_per_head
    return (
        gemm("mm", setting.tokens, hidden, width, dtype),
        pointwise("add", setting.tokens * hidden, dtype, num_read=2),
    )


def _shared_accumulate(words: Parameter | None) -> Pass:
    kernels = () if words is None else (pointwise("add_", words.elements, words.dtype, num_read=2),)
    return Pass(kernels=kernels, memory=())


def _batch_bytes(setting: Setting) -> int:
    """Tokens and labels, or images and classes."""
    config, index_bytes = setting.config, DTYPE_BYTES[INDEX_DTYPE]
    if config.head != "image":
        return 2 * setting.tokens * index_bytes
    pixels = IMAGE_CHANNELS * (setting.seq_len - 1) * config.patch**2
    return setting.micro_batch * (pixels * DTYPE_BYTES[setting.dtype] + index_bytes)


def _notes(setting: Setting) -> tuple[str, ...]:
    notes = [f"generated from the configuration {setting.config.name} ({setting.config.source})"]
    if setting.vocab * setting.tp != setting.config.vocab and setting.config.head != "image":
        notes.append(f"vocabulary padded from {setting.config.vocab} to {setting.vocab * setting.tp} for tp={setting.tp}")
    return tuple(notes)
