"""Messages lie in an order's lists where torch's runtime puts them, and torch loads the lists."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from simulator.pipeline.action import Action, Order
from simulator.pipeline.messages import Message, messages_csv, passes_of, sender_of, with_messages
from simulator.pipeline.one_way import gpipe, interleaved, one_f_one_b
from simulator.pipeline.two_way import dualpipe_v
from simulator.pipeline.zero_bubble import zb_h1, zb_v

schedules: Any = pytest.importorskip("torch.distributed.pipelining.schedules")
ORDERS = {
    "gpipe": gpipe(4, 8),
    "1f1b": one_f_one_b(4, 8),
    "interleaved": interleaved(4, 8, virtual_stages=2),
    "zb-h1": zb_h1(4, 8),
    "zb-v": zb_v(4, 8),
    "dualpipe-v": dualpipe_v(4, 8),
}


def test_two_stages_by_hand() -> None:
    first, second = with_messages(one_f_one_b(2, 2))
    assert " ".join(map(str, first)) == "0F0 0SEND_F0 0F1 0SEND_F1 0RECV_B0 0B0 0RECV_B1 0B1"
    assert " ".join(map(str, second)) == "1RECV_F0 1F0 1RECV_F1 1B0 1SEND_B0 1F1 1B1 1SEND_B1"


@pytest.mark.parametrize("name", ORDERS)
def test_torch_puts_the_same_messages_at_the_same_places(name: str) -> None:
    order = ORDERS[name]
    actions = {rank: [schedules._Action.from_str(str(cell)) for cell in cells] for rank, cells in enumerate(order.ranks)}
    theirs = schedules._add_send_recv(actions, stage_to_rank=lambda s: order.ranks_of_stage[s][0], num_stages=order.num_stages)
    ours = with_messages(order)
    assert [[str(step) for step in own] for own in ours] == [
        [str(action) for action in theirs[rank]] for rank in sorted(theirs)
    ]


@pytest.mark.parametrize("name", ORDERS)
def test_every_message_has_two_ends_and_passes_keep_their_order(name: str) -> None:
    order = ORDERS[name]
    steps = with_messages(order)
    sent = [step for own in steps for step in own if isinstance(step, Message) and step.kind.startswith("SEND")]
    received = [step for own in steps for step in own if isinstance(step, Message) and step.kind.startswith("RECV")]
    shift = {"SEND_F": 1, "SEND_B": -1}
    ends = {(one.stage + shift[one.kind], one.kind.replace("SEND", "RECV"), one.micro_batch) for one in sent}
    assert ends == set(received)
    assert len(sent) == len(received) == len(ends)
    for own, cells in zip(steps, order.ranks, strict=True):
        assert list(passes_of(own)) == [part for cell in cells for part in cell.parts]


def test_csv_is_one_row_a_rank(tmp_path: Path) -> None:
    path = tmp_path / "order.csv"
    path.write_text(messages_csv(with_messages(ORDERS["zb-v"])), encoding="utf-8", newline="")
    rows = path.read_text(encoding="utf-8").splitlines()
    assert len(rows) == 4
    assert all(schedules._Action.from_str(word) is not None for row in rows for word in row.split(","))


def test_what_a_pass_waits_for() -> None:
    assert sender_of(Action(0, "F", 3), 4) is None
    assert sender_of(Action(2, "F", 3), 4) == Action(1, "F", 3)
    assert sender_of(Action(2, "B", 3), 4) == Action(3, "BW", 3)
    assert sender_of(Action(3, "BW", 3), 4) is None
    assert sender_of(Action(1, "W", 3), 4) is None


def test_orders_of_two_directions_have_no_such_lists() -> None:
    order = Order(name="both", num_stages=1, num_microbatches=2, ranks=((Action(0, "F", 0),), (Action(0, "F", 1),)))
    with pytest.raises(AssertionError, match="two directions"):
        with_messages(order)
