"""Collectives in pieces beside products: times by hand with products at one second a row, and steps of a small model."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from numpy.typing import NDArray

from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from hardware_models.network.overlap import OverlapFactors
from simulator.parallel.overlapped_products import CHUNKS, TensorOverlap, half_products, piece_of, together_seconds
from simulator.plan import Plan
from simulator.plan_parallel import check_parallel
from simulator.presets import build_workload, preset
from simulator.workload import Block
from tests.simulator.parallel.step_cases import plan_of, simulated, small_config

FREE = OverlapFactors(
    compute_under_collectives=1.0, compute_under_copies=1.0, collectives_under_compute=1.0, evidence="measured", source="a test"
)
SLOW = replace(FREE, compute_under_collectives=1.2, collectives_under_compute=1.5)
PRODUCT = Kernel(kernel_class="gemm", op="mm", shape=(8, 4, 2), dtype="bfloat16", flops=128, read_bytes=48, written_bytes=64)


def a_second_a_row(kernels: Sequence[Kernel]) -> NDArray[np.float64]:
    return np.array([float(kernel.shape[0]) for kernel in kernels])


def overlap(*, chunked: bool, factors: OverlapFactors = FREE) -> TensorOverlap:
    return TensorOverlap(price=a_second_a_row, factors=factors, ranks=4, chunked_scatter=chunked)


def test_a_piece_has_a_part_of_the_rows() -> None:
    piece = piece_of(PRODUCT, 4)
    assert (piece.shape, piece.flops, piece.read_bytes, piece.written_bytes) == ((2, 4, 2), 32, 24, 16)


def test_a_ring_hides_what_is_shorter() -> None:
    """Four pieces of 2 s, three transfers: of 1 s each all hidden, of 3 s each a second of each shows."""
    own = overlap(chunked=True)
    assert own.gathered_s([PRODUCT], 3.0) == 0.0
    assert own.gathered_s([PRODUCT], 9.0) == pytest.approx(2 + 3 * 3 - 8)


def test_chunks_leave_the_last_scatter() -> None:
    """Chunks of 2 s: scatters of 1 s show the last one; of 3 s, three seconds behind each of four chunks."""
    own = overlap(chunked=True)
    assert own.scattered_s([PRODUCT], 4.0) == pytest.approx(1.0)
    assert own.scattered_s([PRODUCT], 12.0) == pytest.approx(2 + 4 * 3 - 8)
    assert overlap(chunked=False).scattered_s([PRODUCT], 3.0) == 0.0
    assert CHUNKS == 4


def test_both_are_slower_together() -> None:
    assert together_seconds(6.0, 2.0, SLOW) == pytest.approx(6.0 + 3.0 - 3.0 / 1.2)
    assert overlap(chunked=True, factors=SLOW).gathered_s([PRODUCT], 3.0) == pytest.approx(3 * (1.5 - 1.5 / 1.2))


@given(st.floats(0.0, 50.0), st.floats(0.0, 50.0), st.booleans())
def test_a_longer_collective_never_adds_less(one_s: float, other_s: float, chunked: bool) -> None:
    own = overlap(chunked=chunked, factors=SLOW)
    low, high = sorted((one_s, other_s))
    assert own.scattered_s([PRODUCT], low) <= own.scattered_s([PRODUCT], high) + 1e-9
    assert own.gathered_s([PRODUCT], low) <= own.gathered_s([PRODUCT], high) + 1e-9


TOKENS = 1024


def block(name: str, model: str = "llama3-8b") -> Block:
    workload = build_workload(preset(model), micro_batch=1, seq_len=TOKENS, dtype="bfloat16", tp=8, sequence_parallel=True)
    return next(own for own in workload.blocks if own.name == name)


@pytest.mark.parametrize(("name", "columns", "row"), [("attention", [512, 128, 128], 512), ("network", [1792, 1792], 1792)])
def test_products_by_their_place(name: str, columns: list[int], row: int) -> None:
    found = half_products(block(name), hidden=4096, tokens=TOKENS)
    assert found is not None
    assert [kernel.shape for kernel in found.columns] == [(TOKENS, width, 4096) for width in columns]
    assert found.row.shape == (TOKENS, 4096, row)
    assert found.row_gradient.shape == (TOKENS, row, 4096)
    assert sorted(kernel.shape for kernel in found.column_gradients) == sorted((TOKENS, 4096, width) for width in columns)


def test_other_blocks_overlap_nothing() -> None:
    assert half_products(block("head"), hidden=4096, tokens=TOKENS) is None
    latent = preset("deepseek-v3")
    assert half_products(block("attention", "deepseek-v3"), hidden=latent.hidden, tokens=TOKENS) is None


def overlapped(chosen: bool, **changes: object) -> Plan:
    plan = plan_of(tp=8, pp=2, sequence_parallel=True, **changes)  # type: ignore[arg-type]
    return replace(plan, runtime=replace(plan.runtime, overlap_tp=chosen))


def test_an_overlapped_step_waits_less() -> None:
    config = small_config(hidden=8192, ffn=32768, heads=64, layers=4)
    plain, beside = (simulated(overlapped(chosen, micro_batch=16), config) for chosen in (False, True))
    assert beside.step_time_s < plain.step_time_s
    waits = [own.to_json()["time_breakdown_s"]["tp"] for own in (plain, beside)]  # type: ignore[index]
    assert waits[1] < waits[0]


@pytest.mark.parametrize(
    ("plan", "message"),
    [
        (plan_of(tp=8), "with tp > 1 and sequence_parallel only"),
        (plan_of(sequence_parallel=True), "with tp > 1 and sequence_parallel only"),
        (plan_of(tp=8, sequence_parallel=True, framework="megatron-lm@2021"), "megatron-lm@2021 waits for its collectives"),
        (plan_of(tp=8, sequence_parallel=True, framework="torchtitan"), "in compiled layers only"),
    ],
)
def test_overlap_without_pieces_is_refused(plan: Plan, message: str) -> None:
    with pytest.raises(InputError, match=message):
        check_parallel(replace(plan, runtime=replace(plan.runtime, overlap_tp=True)), compute=("bf16",))
