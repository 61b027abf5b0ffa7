"""Context parallelism of torch: gathers, passed gradients and the kernels between blocks."""

from __future__ import annotations

from dataclasses import replace

import pytest

from hardware_models.network.overlap import OverlapFactors
from simulator.parallel.torch_ring import TorchRing

ELEMENTS = 1_000_000
RATE = 1e12
FACTORS = OverlapFactors(
    compute_under_collectives=1.0, compute_under_copies=1.0, collectives_under_compute=1.0, evidence="datasheet", source="test"
)  # fmt: skip
RING = TorchRing(
    ranks=4, elements=ELEMENTS, width=2, compiled=True, gather_s=3e-3, pass_s=1e-3, factors=FACTORS, moved_s=lambda size: size / RATE
)  # fmt: skip


def test_a_forward_pass_packs_keys_and_merges_every_block_but_the_first() -> None:
    """4 x 2 bytes to pack, two casts of 2 + 4, three merges that read a result (2) and read and write the sum (4 + 4)."""
    copies_s = ELEMENTS * (8 + 12 + 3 * 10) / RATE
    assert RING.forward_s(1.0) == pytest.approx(copies_s, rel=1e-9)
    assert RING.forward_s(0.0) == pytest.approx(copies_s + 3e-3, rel=1e-9)


def test_a_backward_pass_sends_gradients_behind_every_block_and_waits_for_the_last() -> None:
    """Packed keys, three casts to float32 and back, three times: queries' 2 + 8, and of keys and values half a result and the sum, read and written."""
    copies_s = ELEMENTS * (8 + 18 + 3 * (10 + 2 * 9) + 18) / RATE
    assert RING.backward_s(1.0) == pytest.approx(copies_s + 1e-3, rel=1e-9)
    assert RING.backward_s(0.0) == pytest.approx(copies_s + 3e-3 + 4 * 1e-3, rel=1e-9)


def test_eager_kernels_move_more_than_compiled_ones() -> None:
    eager = replace(RING, compiled=False)
    assert eager.forward_s(1.0) - RING.forward_s(1.0) == pytest.approx(ELEMENTS * 3 * 28 / RATE, rel=1e-6)
    assert eager.backward_s(1.0) > RING.backward_s(1.0)
