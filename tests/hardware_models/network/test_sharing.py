"""Max-min sharing: hand-worked cases, feasibility and optimality."""

from __future__ import annotations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.errors import InputError
from hardware_models.network.links import find_link
from hardware_models.network.sharing import duplex_capacities, max_min_rates

ROUNDING = 1e-9


@st.composite
def networks(draw: st.DrawFn) -> tuple[list[list[int]], list[float], list[float], list[float]]:
    num_links = draw(st.integers(1, 6))
    capacities = draw(st.lists(st.floats(0.5, 100.0), min_size=num_links, max_size=num_links))
    route = st.lists(st.integers(0, num_links - 1), min_size=1, max_size=num_links, unique=True)
    routes = draw(st.lists(route, min_size=1, max_size=8))
    weights = draw(st.lists(st.floats(0.25, 4.0), min_size=len(routes), max_size=len(routes)))
    limits = draw(st.lists(st.one_of(st.just(float("inf")), st.floats(0.1, 50.0)), min_size=len(routes), max_size=len(routes)))
    return routes, capacities, weights, limits


@given(networks())
@settings(max_examples=300, deadline=None)
def test_no_link_is_overfull_and_every_flow_has_a_bottleneck(
    case: tuple[list[list[int]], list[float], list[float], list[float]],
) -> None:
    routes, capacities, weights, limits = case
    rates = max_min_rates(routes, capacities, weights=weights, limits=limits)
    load = np.zeros(len(capacities))
    for route, rate in zip(routes, rates, strict=True):
        load[route] += rate
    assert (load <= np.array(capacities) * (1 + ROUNDING)).all()
    share = rates / np.array(weights)
    for flow, route in enumerate(routes):
        at_limit = rates[flow] >= limits[flow] * (1 - ROUNDING)
        bottlenecks = [
            link
            for link in route
            if load[link] >= capacities[link] * (1 - ROUNDING)
            and all(share[flow] >= share[other] * (1 - ROUNDING) for other, of_other in enumerate(routes) if link in of_other)
        ]
        assert at_limit or bottlenecks, (case, rates)


@given(networks(), st.floats(1.1, 10.0))
@settings(max_examples=100, deadline=None)
def test_rates_scale_with_capacities(
    case: tuple[list[list[int]], list[float], list[float], list[float]], factor: float
) -> None:
    routes, capacities, weights, _ = case
    one = max_min_rates(routes, capacities, weights=weights)
    assert max_min_rates(routes, np.array(capacities) * factor, weights=weights) == pytest.approx(one * factor, rel=1e-9)


def test_three_flows_over_two_links() -> None:
    """One flow crosses both links, of 1 and 10: the small one gives half each, the other flow takes what the large one has left."""
    assert max_min_rates([[0, 1], [0], [1]], [1.0, 10.0]) == pytest.approx([0.5, 0.5, 9.5])


def test_weights_and_limits() -> None:
    assert max_min_rates([[0], [0]], [9.0], weights=[2.0, 1.0]) == pytest.approx([6.0, 3.0])
    assert max_min_rates([[0], [0]], [9.0], limits=[1.0, float("inf")]) == pytest.approx([1.0, 8.0])
    assert max_min_rates([[]], [9.0], limits=[4.0]) == pytest.approx([4.0])
    assert max_min_rates([], [9.0]).shape == (0,)
    assert max_min_rates([[0]], [0.0]) == pytest.approx([0.0])


def test_duplex_directions_share_their_joint_capacity() -> None:
    link = find_link("pcie-gen4-x16")
    duplex, capacities = duplex_capacities(link, 0)
    there, back = duplex.route(forward=True), duplex.route(forward=False)
    assert max_min_rates([there], capacities) == pytest.approx([26.0e9])
    assert max_min_rates([there, back], capacities) == pytest.approx([18.75e9, 18.75e9])
    assert max_min_rates([there, there, back], capacities) == pytest.approx([12.5e9, 12.5e9, 12.5e9])


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"routes": [[2]], "capacities": [1.0]}, r"routes\[0\] = \[2\]: indices are in \[0, 1\)"),
        ({"routes": [[]], "capacities": [1.0]}, "a flow uses a link or has a limit"),
        ({"routes": [[0]], "capacities": [-1.0]}, "capacities are finite and >= 0"),
        ({"routes": [[0]], "capacities": [1.0], "weights": [0.0]}, "weights are finite and > 0"),
        ({"routes": [[0]], "capacities": [1.0], "weights": [1.0, 1.0]}, "one value for each flow"),
        ({"routes": [[0]], "capacities": [1.0], "limits": [-1.0]}, "limits are >= 0"),
    ],
)
def test_bad_arguments_are_refused(arguments: dict[str, list[float]], message: str) -> None:
    with pytest.raises(InputError, match=message):
        max_min_rates(**arguments)
