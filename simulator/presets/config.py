"""TransformerConfig: the architecture of a transformer, and how many parameters that makes."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal

from hardware_models.errors import InputError

Norm = Literal["layer_norm", "rms_norm"]
Activation = Literal["gelu", "gelu_new", "swiglu"]
Positions = Literal["learned", "rotary", "none"]
Head = Literal["causal_lm", "masked_lm", "image"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Experts:
    """Mixture of experts in place of the network of a layer; experts are SwiGLU networks without biases."""

    num_experts: int
    top_k: int
    ffn: int
    """Width of one expert."""
    num_shared: int = 0
    """Experts that see every token, run as one network of ``num_shared * ffn``."""
    dense_first_layers: int = 0
    """Layers at the front that keep the plain network."""
    router: Literal["softmax", "sigmoid"] = "softmax"
    imbalance: float = 1.0
    """Tokens of the busiest rank of an expert parallel group over their mean; 1 is uniform routing. A layer waits for that rank."""
    capacity_factor: float = 0.0
    """Rows that each expert computes over the mean number of tokens: fewer tokens are padded to it, more are dropped. 0: as many as are routed."""

    def load(self, ep: int) -> float:
        """Rows that the busiest of ``ep`` ranks computes over the mean number of tokens."""
        return self.capacity_factor or (min(self.imbalance, float(ep)) if ep > 1 else 1.0)

    @property
    def uniform(self) -> Experts:
        """The same without imbalance and padding: what model FLOPs count."""
        return replace(self, imbalance=1.0, capacity_factor=0.0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LatentAttention:
    """Multi-head latent attention: queries, keys and values through low-rank bottlenecks.

    Source: DeepSeek-AI 2024, "DeepSeek-V2", section 2.1.
    """

    query_rank: int
    kv_rank: int
    nope_dim: int
    """Part of a head without positions."""
    rope_dim: int
    """Part of a head with rotary positions; its key is shared by all heads."""
    value_dim: int


@dataclass(frozen=True, slots=True, kw_only=True)
class TransformerConfig:
    """A transformer's architecture. Sizes are whole-model (unsharded).

    Raises:
        InputError: a rule between the fields is broken.
    """

    name: str
    source: str
    """Paper and table, or file, that the numbers are from."""
    layers: int
    hidden: int
    heads: int
    ffn: int
    vocab: int
    max_positions: int
    kv_heads: int = 0
    """Key-value heads; 0 means as many as heads."""
    head_dim: int = 0
    """0 means hidden / heads."""
    norm: Norm = "layer_norm"
    activation: Activation = "gelu_new"
    positions: Positions = "learned"
    bias: bool = True
    """Biases in attention and network."""
    tied: bool = True
    """The head's matrix is the embedding's."""
    fused_qkv: bool = True
    """One product makes query, key and value."""
    softmax_float32: bool = False
    """Without flash attention, scores are normalised in float32 whatever the dtype."""
    dropout: float = 0.0
    post_norm: bool = False
    """Norms after the residual sums (BERT) instead of before the halves."""
    token_types: int = 0
    head: Head = "causal_lm"
    experts: Experts | None = None
    latent: LatentAttention | None = None
    patch: int = 0
    """Images: side of a patch; ``max_positions`` counts the patches and the class token."""
    num_classes: int = 0

    def __hash__(self) -> int:
        """Of what tells most configurations apart: priced models are looked up by theirs again and again."""
        return hash((self.name, self.layers, self.hidden))

    def __post_init__(self) -> None:
        for key in ("layers", "hidden", "heads", "ffn", "max_positions"):
            self._check(key, getattr(self, key) >= 1, f"{key} >= 1 must hold")
        self._check("vocab", self.vocab >= 1 or self.head == "image", "vocab >= 1 must hold")
        self._check("dropout", 0 <= self.dropout < 1, "0 <= dropout < 1 must hold")
        if self.head_dim == 0:
            rule = f"hidden % heads == 0 must hold, but got {self.hidden} % {self.heads} = {self.hidden % self.heads}"
            self._check("heads", self.hidden % self.heads == 0, rule)
        if self.kv_heads:
            rule = f"heads % kv_heads == 0 must hold, but got {self.heads} % {self.kv_heads} = {self.heads % self.kv_heads}"
            self._check("kv_heads", self.heads % self.kv_heads == 0, rule)
        if self.experts is not None:
            rule = f"top_k <= num_experts must hold, but got {self.experts.top_k} > {self.experts.num_experts}"
            more = f"1 <= imbalance <= num_experts must hold, but got {self.experts.imbalance}"
            self._check("experts.imbalance", 1.0 <= self.experts.imbalance <= self.experts.num_experts, more)
            padded = f"capacity_factor is 0 (none) or at least 1, but got {self.experts.capacity_factor}"
            self._check(
                "experts.capacity_factor", self.experts.capacity_factor == 0.0 or self.experts.capacity_factor >= 1.0, padded
            )
            self._check("experts.top_k", 1 <= self.experts.top_k <= self.experts.num_experts, rule)

    def _check(self, key: str, holds: bool, rule: str) -> None:
        if not holds:
            value = getattr(self, key, None)
            raise InputError(source=f"model {self.name}", key=key, value=value, rule=rule)

    @property
    def num_kv_heads(self) -> int:
        """Key-value heads."""
        return self.kv_heads or self.heads

    @property
    def dim_per_head(self) -> int:
        """Width of one query or key head."""
        if self.latent is not None:
            return self.latent.nope_dim + self.latent.rope_dim
        return self.head_dim or self.hidden // self.heads

    @property
    def value_dim_per_head(self) -> int:
        """Width of one value head."""
        return self.dim_per_head if self.latent is None else self.latent.value_dim

    @property
    def causal(self) -> bool:
        """A token sees only those before it."""
        return self.head == "causal_lm"

    def has_experts(self, layer: int) -> bool:
        """Whether that layer's network is a mixture of experts."""
        return self.experts is not None and layer >= self.experts.dense_first_layers
