"""Sequences: text round trip, what is refused and with which words, and the sequences set by hand."""

from __future__ import annotations

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.errors import InputError
from simulator.sequence import (
    Operation,
    check_sequence,
    checkpoint_blocks,
    format_sequence,
    keep_all,
    parse_sequence,
    runs_twice,
)
from tests.small_steps import nested

BLOCKS = st.integers(0, 300)
OPERATIONS = st.one_of(
    st.builds(Operation, st.sampled_from(["F_e", "F_ck", "B"]), BLOCKS, st.just("")),
    st.builds(Operation, st.just("F_all"), BLOCKS, st.sampled_from(["all", "selective", "keep_3"])),
)


@given(st.lists(OPERATIONS))
def test_the_text_of_a_sequence_reads_back(operations: list[Operation]) -> None:
    assert list(parse_sequence(format_sequence(operations))) == operations


def test_golden_text() -> None:
    operations = checkpoint_blocks(3, [0], ["all", "selective", "all"])
    assert format_sequence(operations) == "F_ck 0\nF_all 1:selective\nF_all 2:all\nB 2\nB 1\nF_all 0:all\nB 0\n"


def test_comments_blank_lines_and_a_missing_option() -> None:
    assert parse_sequence("# two blocks\n\n  F_e 0 \nF_all 1\nB 1") == (
        Operation("F_e", 0), Operation("F_all", 1, "all"), Operation("B", 1),
    )  # fmt: skip


@pytest.mark.parametrize("line", ["F 0", "F_e", "F_e -1", "B 1:all", "F_all x", "F_ck 0 1", "f_e 0"])
def test_a_line_that_is_no_operation_is_named(line: str) -> None:
    with pytest.raises(InputError) as caught:
        parse_sequence(f"F_e 0\n{line}\n", source="plan.seq")
    assert str(caught.value) == (
        f"plan.seq: line 2 = {line!r}: an operation is F_ck i, F_e i, F_all i:option or B i; number blocks from 0"
    )


@pytest.mark.parametrize(
    ("text", "num_blocks", "said"),
    [
        ("F_e 0,F_all 2,B 2", 2, "operation 2 = 'F_all 2:all': 0 <= block < 2 must hold"),
        ("F_all 0,F_all 1,B 0", 2, "operation 3 = 'B 0': the next backward is of block 1, after its F_all"),
        ("F_all 0,F_e 1,B 1", 2, "operation 3 = 'B 1': the next backward is of block 1, after its F_all"),
        (
            "F_all 1,B 1",
            2,
            "operation 1 = 'F_all 1:all': the block's input is neither the output just made nor kept by an F_ck",
        ),
        ("F_all 0,F_e 1,F_all 2,B 2,F_all 1", 3, "operation 5 = 'F_all 1:all': the block's input is neither"),
        ("F_e 0,F_ck 1,F_all 1,F_all 1", 2, "operation 4 = 'F_all 1:all': the block's input is neither"),
        ("F_all 0,F_all 1,B 1,F_e 0,F_all 1", 2, "operation 5 = 'F_all 1:all': block 1 has run backward already"),
        ("F_all 0,F_all 1,B 1", 2, "operation 3: ends before the backward of block 0"),
        ("", 1, "operation 0: ends before the backward of block 0"),
        ("F_all 0,B 0,F_all 0", 1, "operation 3 = 'F_all 0:all': block 0 has run backward already"),
    ],
)
def test_an_illegal_sequence_names_the_operation_and_the_rule(text: str, num_blocks: int, said: str) -> None:
    with pytest.raises(InputError) as caught:
        check_sequence(parse_sequence(text.replace(",", "\n")), num_blocks, source="mine")
    assert str(caught.value).startswith(f"mine: {said}")


@given(st.integers(1, 12), st.data())
def test_sequences_set_by_hand_are_legal(num_blocks: int, data: st.DataObject) -> None:
    checkpointed = data.draw(st.sets(st.integers(0, num_blocks - 1)))
    for operations in (
        keep_all(num_blocks), nested(num_blocks), checkpoint_blocks(num_blocks, checkpointed, ["all"] * num_blocks),
    ):  # fmt: skip
        check_sequence(operations, num_blocks)
        assert [one.block for one in operations if one.kind == "B"] == list(reversed(range(num_blocks)))
    again = checkpoint_blocks(num_blocks, checkpointed, ["all"] * num_blocks)
    assert runs_twice(again) == checkpointed


def test_blocks_that_run_twice_count_runs_inside_a_backward_pass() -> None:
    assert runs_twice(keep_all(3)) == frozenset()
    assert runs_twice(keep_all(2, "selective")) == {0, 1}
    assert runs_twice(parse_sequence("F_ck 0\nF_e 1\nF_all 2:selective\nB 2\nF_e 0\nF_all 1\nB 1\nF_all 0\nB 0")) == {0, 1, 2}
