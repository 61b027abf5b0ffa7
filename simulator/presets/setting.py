"""Setting: a configuration at one size of micro-batch on one rank of a tensor, context and expert parallel group."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from hardware_models.errors import InputError
from hardware_models.units import DTYPE_BYTES
from simulator.presets.config import TransformerConfig
from simulator.presets.operators import EAGER, Operators

Device = Literal["cpu", "cuda"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What `build_workload` builds for; sizes here are one rank's.

    Raises:
        InputError: a degree that does not divide what it splits; names the rule and both values.
    """

    config: TransformerConfig
    micro_batch: int
    seq_len: int
    dtype: str
    tp: int = 1
    cp: int = 1
    ep: int = 1
    sequence_parallel: bool = False
    flash_attention: bool = True
    device: Device = "cuda"
    operators: Operators = EAGER

    def __post_init__(self) -> None:
        config = self.config
        for key in ("micro_batch", "seq_len", "tp", "cp", "ep"):
            self._check(key, getattr(self, key) >= 1, f"{key} >= 1 must hold")
        known = ", ".join(name for name in DTYPE_BYTES if name.startswith(("float", "bfloat")))
        self._check("dtype", self.dtype in known.split(", "), f"must be one of {known}")
        if config.positions == "learned":
            rule = f"seq_len <= max_positions must hold, but got {self.seq_len} > {config.max_positions}"
            self._check("seq_len", self.seq_len <= config.max_positions, rule)
        if config.head == "image":
            rule = f"seq_len == {config.max_positions} must hold (patches and class token)"
            self._check("seq_len", self.seq_len == config.max_positions, rule)
            self._check("cp", self.cp == 1, "cp == 1 must hold for images")
            self._check("sequence_parallel", not self.sequence_parallel, "must be false for images")
        self._divides("tp", "heads", config.heads)
        if config.latent is None and config.num_kv_heads % self.tp and self.tp % config.num_kv_heads:
            self._divides("tp", "kv_heads", config.num_kv_heads)
        self._divides("tp", "ffn", config.ffn)
        if config.experts is not None:
            self._divides("tp", "experts.ffn", config.experts.ffn)
            self._divides("ep", "experts.num_experts", config.experts.num_experts)
        else:
            self._check("ep", self.ep == 1, "ep == 1 must hold for a model without experts")
        self._divides("cp", "seq_len", self.seq_len)
        if self.sequence_parallel:
            self._divides("tp", "seq_len / cp", self.seq_len // self.cp)
        if self.device == "cpu" and config.dropout:
            rule = f"must be false on the cpu with dropout = {config.dropout}: torch has no flash kernel for that"
            self._check("flash_attention", not self.flash_attention, rule, "trace the model instead, or set dropout to 0")
        if self.cp > 1:
            self._check("flash_attention", self.flash_attention, "must be true where cp > 1")

    def _check(self, key: str, holds: bool, rule: str, remedy: str = "") -> None:
        if not holds:
            raise InputError(source=f"model {self.config.name}", key=key, value=getattr(self, key), rule=rule, remedy=remedy)

    def _divides(self, degree: str, what: str, size: int) -> None:
        value = getattr(self, degree)
        fitting = [divisor for divisor in range(1, min(size, 2 * value) + 1) if size % divisor == 0]
        rule = f"{what} % {degree} == 0 must hold, but got {size} % {value} = {size % value}"
        self._check(degree, size % value == 0, rule, f"use {degree} of " + ", ".join(map(str, fitting)))

    @property
    def local_len(self) -> int:
        """Tokens of a sample on this context parallel rank."""
        return self.seq_len // self.cp

    @property
    def tokens(self) -> int:
        """Tokens of the micro-batch on this rank, where they are not split by sequence parallelism."""
        return self.micro_batch * self.local_len

    @property
    def stream_tokens(self) -> int:
        """Tokens of the residual stream on this rank."""
        return self.tokens // self.tp if self.sequence_parallel else self.tokens

    @property
    def gathers(self) -> bool:
        """The stream is split over the tensor parallel group and gathered around products."""
        return self.sequence_parallel and self.tp > 1

    @property
    def heads(self) -> int:
        """Query heads of this rank."""
        return self.config.heads // self.tp

    @property
    def kv_heads(self) -> int:
        """Key-value heads of this rank; replicated where there are fewer than ranks."""
        return max(1, self.config.num_kv_heads // self.tp)

    def expert_rows(self, rows: int) -> int:
        """Rows that the busiest rank's experts compute where ``rows`` come in on average."""
        experts = self.config.experts
        return rows if experts is None else max(1, round(rows * experts.load(self.ep)))

    @property
    def vocab(self) -> int:
        """Rows of the embedding on this rank: rounded up, as Megatron pads the vocabulary."""
        return -(-self.config.vocab // self.tp)
