"""Decoders in plain torch: a GPT (layer norm, learned positions, GELU, tied head) and a Llama (RMS norm, rotary, SwiGLU, grouped keys).

Source: Radford et al. 2019, "Language Models are Unsupervised Multitask Learners"; Touvron et al. 2023, "LLaMA"; Su et al. 2021,
"RoFormer", equation 34 (rotary positions); Ainslie et al. 2023, "GQA".
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F  # noqa: N812 - torch's own convention

from simulator.models.losses import token_inputs

ROTARY_BASE = 10_000.0
INIT_STD = 0.02


class CausalAttention(nn.Module):
    """Causal self-attention with grouped key-value heads; the forward pass takes as many heads as the projections give, so that they may be split."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, *, bias: bool) -> None:
        super().__init__()
        self.heads, self.kv_heads, self.head_dim = heads, kv_heads, hidden // heads
        self.query = nn.Linear(hidden, heads * self.head_dim, bias=bias)
        self.key_value = nn.Linear(hidden, 2 * kv_heads * self.head_dim, bias=bias)
        self.output = nn.Linear(heads * self.head_dim, hidden, bias=bias)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Args: x: (batch, tokens, hidden), rotary: cosines and sines (tokens, head_dim) or None."""
        batch, tokens, _ = x.shape
        query = self.query(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2)
        key, value = self.key_value(x).view(batch, tokens, -1, self.head_dim).transpose(1, 2).chunk(2, dim=1)
        if rotary is not None:
            query, key = _rotate(query, *rotary), _rotate(key, *rotary)
        mixed = F.scaled_dot_product_attention(query, key, value, is_causal=True, enable_gqa=self.heads != self.kv_heads)
        result: Tensor = self.output(mixed.transpose(1, 2).reshape(batch, tokens, -1))
        return result


def _rotate(x: Tensor, cosines: Tensor, sines: Tensor) -> Tensor:
    first, second = x.chunk(2, dim=-1)
    return x * cosines + torch.cat((-second, first), dim=-1) * sines


def _rotary_tables(tokens: int, head_dim: int, device: torch.device) -> tuple[Tensor, Tensor]:
    frequencies = ROTARY_BASE ** (-torch.arange(0, head_dim, 2, device=device) / head_dim)
    angles = torch.outer(torch.arange(tokens, device=device), frequencies).repeat(1, 2)
    return angles.cos(), angles.sin()


class GeluNetwork(nn.Module):
    """Up, GELU (tanh form), down."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.up, self.down = nn.Linear(hidden, ffn), nn.Linear(ffn, hidden)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (batch, tokens, hidden)."""
        y: Tensor = self.down(F.gelu(self.up(x), approximate="tanh"))
        return y


class SwigluNetwork(nn.Module):
    """``down(silu(gate x) * up x)`` without biases."""

    def __init__(self, hidden: int, ffn: int) -> None:
        super().__init__()
        self.gate, self.up = nn.Linear(hidden, ffn, bias=False), nn.Linear(hidden, ffn, bias=False)
        self.down = nn.Linear(ffn, hidden, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """Args: x: (batch, tokens, hidden)."""
        y: Tensor = self.down(F.silu(self.gate(x)) * self.up(x))
        return y


class DecoderLayer(nn.Module):
    """Attention and network, each behind a norm and beside a residual."""

    def __init__(self, hidden: int, heads: int, kv_heads: int, ffn: int, *, llama: bool) -> None:
        super().__init__()
        norm = nn.RMSNorm if llama else nn.LayerNorm
        self.attention_norm, self.mlp_norm = norm(hidden), norm(hidden)
        self.attention = CausalAttention(hidden, heads, kv_heads, bias=not llama)
        self.mlp = SwigluNetwork(hidden, ffn) if llama else GeluNetwork(hidden, ffn)

    def forward(self, x: Tensor, rotary: tuple[Tensor, Tensor] | None) -> Tensor:
        """Args: x: (batch, tokens, hidden), rotary: cosines and sines (tokens, head_dim) or None."""
        x = x + self.attention(self.attention_norm(x), rotary)
        y: Tensor = x + self.mlp(self.mlp_norm(x))
        return y


class Decoder(nn.Module):
    """A language model; returns the mean cross entropy of the next token when given labels, else logits (batch, tokens, vocab)."""

    def __init__(
        self, *, layers: int, hidden: int, heads: int, ffn: int, vocab: int, max_positions: int, kv_heads: int | None = None,
        llama: bool = False,
    ) -> None:  # fmt: skip
        super().__init__()
        self.head_dim, self.llama = hidden // heads, llama
        self.embedding = nn.Embedding(vocab, hidden)
        nn.init.normal_(self.embedding.weight, std=INIT_STD)
        self.positions = None if llama else nn.Embedding(max_positions, hidden)
        self.layers = nn.ModuleList(DecoderLayer(hidden, heads, kv_heads or heads, ffn, llama=llama) for _ in range(layers))
        self.norm = nn.RMSNorm(hidden) if llama else nn.LayerNorm(hidden)
        self.head = nn.Linear(hidden, vocab, bias=False)
        if not llama:
            self.head.weight = self.embedding.weight

    def forward(self, input_ids: Tensor, labels: Tensor | None = None) -> Tensor:
        """Args: input_ids: (batch, tokens), labels: (batch, tokens), shifted here."""
        x = self.embedding(input_ids)
        tokens = input_ids.shape[1]
        rotary = _rotary_tables(tokens, self.head_dim, x.device) if self.llama else None
        if self.positions is not None:
            x = x + self.positions(torch.arange(tokens, device=x.device))
        for layer in self.layers:
            x = layer(x, rotary)
        logits: Tensor = self.head(self.norm(x))
        if labels is None:
            return logits
        return F.cross_entropy(logits[:, :-1].flatten(0, 1), labels[:, 1:].flatten())


def gpt_small(*, batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """GPT-2 small's shape: 12 layers, 768 wide, 12 heads, 50,257 tokens."""
    vocab = 50257
    module = Decoder(layers=12, hidden=768, heads=12, ffn=3072, vocab=vocab, max_positions=max(1024, seq_len))
    return module, token_inputs(batch=batch, seq_len=seq_len, vocab=vocab)


def llama_small(*, batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """A Llama of 12 layers, 768 wide, 12 heads over 4 key-value heads, 32,000 tokens."""
    vocab = 32000
    module = Decoder(
        layers=12, hidden=768, heads=12, kv_heads=4, ffn=2048, vocab=vocab, max_positions=max(2048, seq_len), llama=True
    )
    return module, token_inputs(batch=batch, seq_len=seq_len, vocab=vocab)


def gpt_xl(*, batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """GPT-2 XL's shape: 48 layers, 1600 wide, 25 heads, 50,257 tokens (1.56 billion parameters)."""
    vocab = 50257
    module = Decoder(layers=48, hidden=1600, heads=25, ffn=6400, vocab=vocab, max_positions=max(1024, seq_len))
    return module, token_inputs(batch=batch, seq_len=seq_len, vocab=vocab)


def llama_1b(*, batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The shape of Llama 3.2 1B without its tied head: 16 layers, 2048 wide, 32 heads over 8 key-value heads, 128,256 tokens."""
    vocab = 128256
    module = Decoder(
        layers=16, hidden=2048, heads=32, kv_heads=8, ffn=8192, vocab=vocab, max_positions=max(2048, seq_len), llama=True
    )
    return module, token_inputs(batch=batch, seq_len=seq_len, vocab=vocab)


def llama_8b(*, batch: int, seq_len: int) -> tuple[nn.Module, dict[str, Tensor]]:
    """The shape of Llama 3 8B: 32 layers, 4096 wide, 32 heads over 8 key-value heads, 128,256 tokens (8.03 billion parameters).

    Source: Dubey et al. 2024 (arXiv 2407.21783), table 3.
    """
    vocab = 128256
    module = Decoder(
        layers=32, hidden=4096, heads=32, kv_heads=8, ffn=14336, vocab=vocab, max_positions=max(2048, seq_len), llama=True
    )
    return module, token_inputs(batch=batch, seq_len=seq_len, vocab=vocab)
