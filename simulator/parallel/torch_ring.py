"""Context parallelism as torch runs it around fused attention: keys and values gathered at once, results merged and gradients passed on in float32."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass

from hardware_models.network.overlap import OverlapFactors
from simulator.parallel.overlapped_products import together_seconds

TORCH_RING = ("torchtitan",)
"""Frameworks whose ring of context parallelism is torch's own, with the keys of a group of heads repeated for each head of it before (``repeat_kv``, torchtitan/models/llama/model.py, 2024-12)."""
FLOAT_BYTES = 4
_KEYS_AND_VALUES = 2
_INPUTS = 3
"""Query, key and value: each has a gradient."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TorchRing:
    """One layer's attention on one rank of several.

    **Model**: E elements each of query, key and value; a block is 1 / ranks of a rank's attention. Forward, one gather of all keys and values travels beside the first block; the result of each further block is merged into a sum in
    float32. Backward, keys and values are gathered again; behind each block the gradients of keys and values, in float32, go one rank on beside the next block, and the last time nothing is left to hide them.
    Bytes of the kernels between blocks are those of the rank with the most: all of its merges take whole results. Compiled, a merge is one kernel; eagerly each operator is one.

    **Source**: ``_templated_ring_attention``, ``_templated_ring_attention_backward``, ``_SDPAMerger`` and the defaults ``rotate_method = ALL_GATHER``, ``convert_to_f32`` and ``enable_load_balance`` (pytorch
    torch/distributed/tensor/experimental/_attention.py @1963fc83a1, 2024-12).

    **Not modelled**: memory of the gathered keys and of the sums; log-sum-exps, one number a row and head.
    """

    ranks: int
    elements: int
    """Of a rank's queries: tokens, heads and their width."""
    width: int
    """Bytes of an element."""
    compiled: bool
    gather_s: float
    """Of all ranks' keys and values."""
    pass_s: float
    """Of the gradients of a rank's keys and values, in float32, to the next one."""
    factors: OverlapFactors
    moved_s: Callable[[float], float]
    """Seconds of a kernel that reads and writes so many bytes in all."""

    def forward_s(self, block_s: float) -> float:
        """Seconds beyond the blocks of a forward pass; ``block_s``: of one."""
        packed = 2 * _KEYS_AND_VALUES * self.width
        ends = 2 * (self.width + FLOAT_BYTES)
        # eagerly: cast, difference to the sum, weighted, taken off
        merge = self.width + (2 if self.compiled else 9) * FLOAT_BYTES
        return self._beside_s(block_s, self.gather_s) + self._moved_s(packed + ends + (self.ranks - 1) * merge)

    def backward_s(self, block_s: float) -> float:
        """Seconds beyond the blocks of a backward pass; ``block_s``: of one."""
        added = self.width + 2 * FLOAT_BYTES
        packed = 2 * _KEYS_AND_VALUES * self.width
        casts = _INPUTS * (self.width + FLOAT_BYTES)
        if self.compiled:
            first = casts
            # halves of keys and values are added to: what is received is read and written whole
            later = added + _KEYS_AND_VALUES * (self.width // 2 + 2 * FLOAT_BYTES)
        else:
            joined = 2 * _KEYS_AND_VALUES * FLOAT_BYTES
            first = _INPUTS * (FLOAT_BYTES + added) + joined
            later = added + _KEYS_AND_VALUES * added // 2 + 2 * joined
        copies_s = self._moved_s(packed + first + (self.ranks - 1) * later + casts)
        hidden_s = self._beside_s(block_s, self.gather_s) + (self.ranks - 1) * self._beside_s(block_s, self.pass_s)
        return hidden_s + self.pass_s + copies_s

    def _beside_s(self, block_s: float, message_s: float) -> float:
        """By how much block and message together are longer than the block."""
        return together_seconds(block_s, message_s, self.factors) - block_s

    def _moved_s(self, bytes_each: float) -> float:
        """Of so many bytes for each element."""
        return self.moved_s(self.elements * bytes_each)
