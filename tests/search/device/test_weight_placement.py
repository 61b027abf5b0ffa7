"""Placements of whole blocks' parameters: what blocks wait for by hand, and what is tried."""

from __future__ import annotations

from dataclasses import replace

import pytest

from search.device.weight_placement import _waits, placements
from search.solvers.offload_problem import HostLink
from simulator.lower import PassPrices
from simulator.sequence import keep_all
from simulator.workload import Workload
from tests.simulator.test_host_planner import WEIGHT, chain
from tests.simulator.test_lower import seconds

PRICES = PassPrices(seconds)


def workload(num_blocks: int) -> Workload:
    """Blocks that compute for two seconds forward and three backward, all with parameters."""
    made = chain(num_blocks)
    return replace(made, blocks=tuple(replace(block, parameter_bytes=WEIGHT) for block in made.blocks))


def link(coming_s: float) -> HostLink:
    """Over which a block's parameters come in so many seconds."""
    return HostLink(out_bytes_per_s=1.0, in_bytes_per_s=WEIGHT / coming_s)


@pytest.mark.parametrize(
    ("coming_s", "waits"), [(2.0, [0, 0, 0, 0, 0]), (2.5, [0, 0.5, 0.5, 0.5, 0.5]), (4.0, [1, 3, 3, 3, 2])]
)
def test_a_block_waits_for_what_the_moment_before_it_does_not_hide(coming_s: float, waits: list[float]) -> None:
    """The first block comes beside the backward pass of the second, the last one beside a forward pass; both runs of either share one coming."""
    assert _waits(workload(5), keep_all(5), PRICES, link(coming_s)) == pytest.approx(waits)


def test_blocks_that_wait_least_go_first() -> None:
    found = placements(workload(5), keep_all(5), PRICES, link(4.0), room_bytes=5 * WEIGHT)
    away = [tuple(block for block, share in enumerate(one) if share) for one in found]
    assert away[:5] == [(0,), (0, 4), (0, 1, 4), (0, 1, 2, 4), (0, 1, 2, 3, 4)]
    assert {(0,), (0, 1), (0, 1, 2), (4,), (3, 4), (2, 3, 4), (2,), (1, 3)} <= set(away), (
        "from the front, from the back, spread"
    )
    assert len(set(found)) == len(found)
    assert all(share in {0.0, 1.0} for one in found for share in one)


def test_the_solver_of_weights_has_a_say() -> None:
    """Where all blocks have room, it leaves them on the device."""
    found = placements(workload(5), keep_all(5), PRICES, link(1.0), room_bytes=6 * WEIGHT)
    assert (0.0,) * 5 in found


def test_blocks_without_parameters_stay() -> None:
    bare = replace(chain(3), blocks=tuple(replace(block, parameter_bytes=0) for block in chain(3).blocks))
    assert placements(bare, keep_all(3), PRICES, link(1.0), room_bytes=WEIGHT) == ()
    some = replace(bare, blocks=(bare.blocks[0], replace(bare.blocks[1], parameter_bytes=WEIGHT), bare.blocks[2]))
    assert {one[0] + one[2] for one in placements(some, keep_all(3), PRICES, link(1.0), room_bytes=0)} == {0.0}
