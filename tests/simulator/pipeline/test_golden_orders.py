"""Orders as text, for those that torch does not have (see test_torch_orders for the others)."""

from __future__ import annotations

from typing import Any

import pytest

from simulator.pipeline.catalogue import OrderRequest, make_order
from simulator.pipeline.order_text import order_texts

GOLDEN: list[tuple[str, int, int, dict[str, Any], list[str]]] = [
    ("zb-h2", 3, 5, {}, [
        "0F0,0F1,0F2,0F3,0F4,0I0,0W0,0I1,0W1,0I2,0W2,0I3,0W3,0I4,0W4",
        "1F0,1F1,1F2,1I0,1F3,1I1,1F4,1I2,1W0,1I3,1W1,1I4,1W2,1W3,1W4",
        "2F0,2I0,2F1,2I1,2F2,2I2,2F3,2I3,2F4,2I4,2W0,2W1,2W2,2W3,2W4",
    ]),
    ("zb-2p", 2, 4, {}, [
        "0F0,0F1,0F2,0I0,0F3,0W0,0I1,0W1,0I2,0W2,0I3,0W3",
        "1F0,1I0,1F1,1I1,1F2,1I2,1F3,1I3,1W0,1W1,1W2,1W3",
    ]),
    ("v-min", 3, 3, {}, [
        "0F0,0F1,0F2,5F0,5I0,5W0,5F1,5I1,5W1,0I0,0W0,5F2,5I2,0I1,0W1,5W2,0I2,0W2",
        "1F0,1F1,4F0,4F1,4I0,4W0,1F2,1I0,1W0,4I1,4W1,4F2,1I1,4I2,1W1,4W2,1I2,1W2",
        "2F0,3F0,2F1,3F1,3I0,2I0,3W0,2W0,2F2,3F2,3I1,2I1,3W1,2W1,3I2,2I2,3W2,2W2",
    ]),
    ("v-half", 2, 3, {}, [
        "0F0,0F1,0F2,3F0,3I0,3W0,3F1,0I0,0W0,3I1,3W1,3F2,3I2,0I1,0W1,0I2,3W2,0W2",
        "1F0,2F0,1F1,2F1,2I0,1I0,2W0,1W0,1F2,2F2,2I1,1I1,2I2,1I2,2W1,1W1,2W2,1W2",
    ]),
    # the schedule that arXiv 2107.06925 draws for four stages: 0 1 - 2 2 3 3 0 1 on the first rank
    ("chimera", 4, 4, {}, [
        "0F0,0F1,3F2,3B2,3F3,3B3,0B0,0B1",
        "1F0,2F2,1F1,2F3,2B2,1B0,2B3,1B1",
        "1F2,2F0,1F3,2F1,2B0,1B2,2B1,1B3",
        "0F2,0F3,3F0,3B0,3F1,3B1,0B2,0B3",
    ]),
    ("chimera", 2, 4, {"chimera_mode": "doubling"}, ["0F0,0F1,1F2,1F3,1B2,0B0,1B3,0B1", "0F2,0F3,1F0,1F1,1B0,0B2,1B1,0B3"]),
    ("chimera", 2, 2, {"chimera_mode": "halving"}, ["0F0,0F1,1F2,1F3,1B2,0B0,1B3,0B1", "0F2,0F3,1F0,1F1,1B0,0B2,1B1,0B3"]),
    ("dualpipe", 2, 4, {}, [
        "0F0,1F2,0F1,1B2,(1F3;0B0)OVERLAP_F_B,1B3,0I1,0W1",
        "0F2,1F0,0F3,1B0,(1F1;0B2)OVERLAP_F_B,1B1,0I3,0W3",
    ]),
]  # fmt: skip


@pytest.mark.parametrize(("schedule", "ranks", "batches", "options", "texts"), GOLDEN, ids=lambda value: str(value)[:12])
def test_golden(schedule: str, ranks: int, batches: int, options: dict[str, Any], texts: list[str]) -> None:
    order = make_order(OrderRequest(schedule=schedule, num_ranks=ranks, num_microbatches=batches, **options))
    assert list(order_texts(order)) == texts
