"""Gathering ahead of use: pipelines of a few units worked out by hand, and units of a small model."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from simulator.parallel.parameter_gathers import (
    Gathers,
    ListSeconds,
    Piece,
    Unit,
    gathered_elements,
    gathers_of,
    list_seconds,
    pieces_of,
    prefetched_units,
    units_of,
)
from simulator.parallel.stages import Stage, stages_of
from simulator.plan import Runtime
from simulator.presets import build_workload
from tests.simulator.parallel.step_cases import SEQ_LEN, plan_of, small_config

LAYER = 12 * 1024**2 + 13 * 1024
"""Elements of a layer of the small model: matrices, biases, norms."""


def stage_of(pp: int = 1, index: int = 0) -> Stage:
    workload = build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16")
    return stages_of(workload, plan_of(pp=pp))[index]


@pytest.mark.parametrize(
    ("compute", "gather", "prefetch", "expected"),
    [
        ([4, 4, 4], [1, 1, 1], 1, (1, 2)),
        ([4, 4, 4], [1, 1, 1], 0, (3, 0)),
        ([1, 1, 1], [4, 4, 4], 1, (10, 2)),  # 4 | 8 | 12, then the last computes: 13 - 3
        ([4, 1, 4], [1, 1, 6], 1, (6, 2)),  # the last gather begins when unit 0 has computed, at 5, and ends at 11: 15 - 9
        ([4, 1, 4], [1, 1, 6], 2, (3, 5)),  # it begins at 2 and ends at 8: 12 - 9
        ([4, 4, 4], [1, 1, 1], [1, 0, 1], (2, 1)),  # only the second waits for the first's compute
        ([], [], 1, (0, 0)),
    ],
)
def test_waits_by_hand(
    compute: list[float], gather: list[float], prefetch: int | list[int], expected: tuple[float, float]
) -> None:
    own = gathers_of(compute, gather, prefetch)
    assert (own.first_s, own.rest_s) == expected


def test_copies_lengthen_the_pass_and_hide_gathers() -> None:
    """Gathers of 1 s, copies of 0.5 s, compute of 4 s: 1 + 3 * 4.5 s in all, of which 12 s compute."""
    own = gathers_of([4.0] * 3, [1.0] * 3, 1, copy_s=[0.5] * 3)
    assert (own.first_s, own.rest_s) == (2.5, 0.5)


SECONDS = st.lists(st.tuples(st.floats(0.0, 10.0), st.floats(0.0, 10.0)), min_size=1, max_size=12)


@given(SECONDS, st.integers(0, 12))
def test_more_prefetch_never_waits_longer(units: list[tuple[float, float]], prefetch: int) -> None:
    compute, gather = [one for one, _ in units], [other for _, other in units]
    near, far = gathers_of(compute, gather, prefetch), gathers_of(compute, gather, prefetch + 1)
    assert far.first_s <= near.first_s + 1e-9
    assert gather[0] - 1e-9 <= far.first_s
    assert near.first_s + near.rest_s >= sum(gather) - 1e-9


def test_units_are_layers_and_ends() -> None:
    assert [(unit.first, unit.end) for unit in units_of(stage_of(pp=4, index=1), "torchtitan")] == [(0, 2), (2, 4)]
    whole = units_of(stage_of(), "pytorch")
    assert [unit.end - unit.first for unit in whole] == [1, *[2] * 8]
    assert whole[1].elements == LAYER
    assert whole[0].elements == (4096 + SEQ_LEN) * 1024  # the tied table and positions


def test_deepspeed_gathers_submodules_by_elements() -> None:
    units = units_of(stage_of(pp=4, index=1), "deepspeed")
    assert [(unit.first, unit.end) for unit in units] == [(0, 1), (1, 2), (2, 3), (3, 4)]
    assert prefetched_units(units, Runtime(framework="deepspeed")) == 50_000_000 // (4 * 1024**2 + 6 * 1024)
    assert prefetched_units(units, Runtime(framework="deepspeed", prefetch_blocks=2)) == 2
    assert prefetched_units(units, Runtime()) == 1


def test_deepspeed_gathers_one_unit_ahead_however_large() -> None:
    units = [Unit(first=0, end=1, elements=600_000_000), Unit(first=1, end=2, elements=1_200_000_000)]
    assert prefetched_units(units, Runtime(framework="deepspeed")) == 1


def test_deepspeed_of_2021_gathers_matrix_by_matrix() -> None:
    """Query, key and value, and the output; then both of the network. Biases and norms stay."""
    units = units_of(stage_of(pp=4, index=1), "deepspeed@2021")
    wide = 1024**2
    assert [sorted(unit.tensors) for unit in units[:2]] == [[wide, 3 * wide], [4 * wide, 4 * wide]]
    assert not any(unit.tensors for unit in units_of(stage_of(pp=4, index=1), "deepspeed"))


def test_pieces_share_a_units_compute_and_large_ones_let_nothing_be_gathered_ahead() -> None:
    units = [
        Unit(first=0, end=1, elements=2_000_000_000, tensors=(1_500_000_000, 500_000_000)),
        Unit(first=1, end=2, elements=500_000_000, tensors=(500_000_000,)),
    ]
    assert pieces_of(units, [4.0, 3.0], 1) == [
        Piece(elements=1_500_000_000, compute_s=3.0, prefetch=1), Piece(elements=500_000_000, compute_s=1.0, prefetch=0),
        Piece(elements=500_000_000, compute_s=3.0, prefetch=1),
    ]  # fmt: skip
    assert [piece.prefetch for piece in pieces_of(units, [4.0, 3.0], 0)] == [0, 0, 0]


def test_a_list_costs_the_host_views_and_copies_for_each_rank() -> None:
    """2 us a view on the measured host, 1.48 times that beside an A100; a copy from C++ as the profile says."""
    device = load_hardware("a100-sxm-80gb")
    assert device.host_dispatch is not None
    copy_s = device.host_dispatch.autograd_backward_s
    found = list_seconds("deepspeed@2021", device)
    assert (found.gathered_s, found.scattered_s) == (pytest.approx(2.96e-6 + copy_s), pytest.approx(5.92e-6 + copy_s))
    assert list_seconds("deepspeed", device) == ListSeconds()


def test_gathered_elements_are_those_of_the_window() -> None:
    units = units_of(stage_of(pp=4, index=1), "pytorch")
    assert [gathered_elements(units, prefetch) for prefetch in (0, 1, 5)] == [LAYER, 2 * LAYER, 2 * LAYER]
    assert gathers_of([], [], 0) == Gathers()


def test_the_models_own_unit_stays_gathered_under_fsdp() -> None:
    units = units_of(stage_of(), "torchtitan")
    own = sum(unit.elements for unit in units if unit.root)
    assert own == (4096 + SEQ_LEN) * 1024
    assert gathered_elements(units, 1) == own + 2 * LAYER + 2 * 1024  # the last layer's unit has the last norm
    deepspeed = units_of(stage_of(), "deepspeed")
    assert not any(unit.root for unit in deepspeed)
    assert gathered_elements(deepspeed, 1) < gathered_elements(units, 1)
