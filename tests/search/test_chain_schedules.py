"""The evaluator by hand, and the baselines as text."""

from collections.abc import Sequence
from dataclasses import replace

import pytest

from hardware_models.errors import InputError
from search.chain_problem import ChainProblem
from search.chain_schedules import (
    checkpoint_every_stage,
    checkpoint_segments,
    evaluate,
    fastest_options,
    leanest_options,
    store_all,
)
from simulator.sequence import Operation, format_sequence, parse_sequence

CHAIN = ChainProblem(
    discard_s=(1.0, 2.0, 4.0),
    discard_peak_bytes=(11, 23, 2),
    boundary_bytes=(100, 10, 20, 1),
    boundary_gradient_bytes=(100, 10, 20, 1),
    resident_bytes=(7, 5, 0),
    option_names=(("all", "lean"), ("all",), ("all",)),
    forward_s=((1.5, 1.25), (2.5,), (4.5,)),
    backward_s=((2.0, 3.0), (4.0,), (8.0,)),
    saved_bytes=((60, 30), (50,), (3,)),
    forward_peak_bytes=((70, 71), (55,), (9,)),
    backward_peak_bytes=((300, 290), (90,), (40,)),
)


def run(text: str, chain: ChainProblem = CHAIN) -> tuple[float, int]:
    return evaluate(chain, parse_sequence(text))


def test_store_all_by_hand() -> None:
    # forward: 100+1+70, 160+1+55, 210+1+9; backward: 210+0+40, 160+5+90, 100+7+300
    assert run("F_all 0:all\nF_all 1\nF_all 2\nB 2\nB 1\nB 0") == (23 - 0.5, 407)


def test_checkpointed_by_hand() -> None:
    # F_ck 0: 100+1+11. F_e 1: 110+1+23. F_all 2: 120+1+9 (boundary 1 is gone). B 2: 120+40.
    # F_ck 0: 100+(5+20)+11. F_all 1: 110+25+55. B 1: 110+5+90. F_all 0:lean: 100+(7+10)+71. B 0: 100+7+290.
    text = "F_ck 0\nF_e 1\nF_all 2\nB 2\nF_ck 0\nF_all 1\nB 1\nF_all 0:lean\nB 0"
    assert run(text) == (1 + 2 + 4.5 + 8 + 1 + 2.5 + 4 + 1.25 + 3, 397)


@pytest.mark.parametrize(
    ("field", "value", "peak"),
    [
        ("discard_peak_bytes", (1000, 0, 0), 100 + 25 + 1000),  # the second run of stage 0, beside the gradient of boundary 2
        ("discard_peak_bytes", (0, 1000, 0), 110 + 1 + 1000),
        ("forward_peak_bytes", ((70, 71), (55,), (1000,)), 120 + 1 + 1000),
        ("forward_peak_bytes", ((70, 71), (1000,), (9,)), 110 + 25 + 1000),
        ("forward_peak_bytes", ((70, 1000), (55,), (9,)), 100 + 17 + 1000),
        ("backward_peak_bytes", ((300, 290), (90,), (1000,)), 120 + 0 + 1000),
        ("backward_peak_bytes", ((300, 290), (1000,), (40,)), 110 + 5 + 1000),
        ("backward_peak_bytes", ((300, 1000), (90,), (40,)), 100 + 7 + 1000),
    ],
)
def test_what_is_held_at_each_step(field: str, value: object, peak: int) -> None:
    text = "F_ck 0\nF_e 1\nF_all 2\nB 2\nF_ck 0\nF_all 1\nB 1\nF_all 0:lean\nB 0"
    assert run(text, replace(CHAIN, **{field: value}))[1] == peak


def test_a_boundary_kept_inside_a_graph_counts_once() -> None:
    # F_ck 1 keeps boundary 1, which the graph of stage 0 holds: 100+60; F_all 2 beside it and boundary 2
    text = "F_all 0\nF_ck 1\nF_all 2\nB 2\nF_all 1\nB 1\nB 0"
    assert run(text)[0] == 1.5 + 2 + 4.5 + 8 + 2.5 + 4 + 2
    assert run(text, replace(CHAIN, forward_peak_bytes=((70, 71), (55,), (1000,))))[1] == 100 + 60 + 20 + 1 + 1000


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F_ck 0\nF_all 2\n", r"operation 2 = 'F_all 2:all': the block's input is neither"),
        ("F_all 0\nF_all 1\nF_all 2\nB 1\n", r"operation 4 = 'B 1': the next backward is of block 2"),
        ("F_all 0\nF_all 1\nF_all 2\nB 2\nB 1\n", r"ends before the backward of block 0"),
        ("F_all 0\nF_all 1\nF_all 2:none\nB 2\nB 1\nB 0", r"operation 3 = 'F_all 2:none': unknown name; known are all"),
        ("F_all 0\nF_all 0\nF_all 1\nF_all 2\nB 2\nB 1\nB 0", r"operation 2 = 'F_all 0:all': stage 0 has a graph that waits"),
    ],
)
def test_illegal_sequences_name_step_and_rule(text: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        run(text)


def test_options_of_the_baselines() -> None:
    assert fastest_options(CHAIN) == (0, 0, 0)
    assert leanest_options(CHAIN) == (1, 0, 0)


def test_baselines_as_text() -> None:
    def lines(operations: Sequence[Operation]) -> str:
        return format_sequence(operations).replace("\n", ", ")

    assert lines(store_all(CHAIN)) == "F_all 0:all, F_all 1:all, F_all 2:all, B 2, B 1, B 0, "
    assert lines(checkpoint_every_stage(CHAIN, (1, 0, 0))) == (
        "F_ck 0, F_ck 1, F_ck 2, F_all 2:all, B 2, F_all 1:all, B 1, F_all 0:lean, B 0, "
    )
    assert lines(checkpoint_segments(CHAIN, 1)) == lines(store_all(CHAIN))
    assert lines(checkpoint_segments(CHAIN, 2)) == "F_ck 0, F_all 1:all, F_all 2:all, B 2, B 1, F_all 0:all, B 0, "
    assert lines(checkpoint_segments(CHAIN, 3)) == "F_ck 0, F_ck 1, F_all 2:all, B 2, F_all 1:all, B 1, F_all 0:all, B 0, "


def test_segments_are_equal_and_the_last_takes_the_rest() -> None:
    chain = ChainProblem.classic([1] * 7, [2] * 7, [1] * 8, [3] * 7)
    text = format_sequence(checkpoint_segments(chain, 3)).split("\n")
    assert text[:7] == ["F_ck 0", "F_e 1", "F_ck 2", "F_e 3", "F_all 4:all", "F_all 5:all", "F_all 6:all"]
    assert evaluate(chain, checkpoint_segments(chain, 3))[0] == 7 * 3 + 4


@pytest.mark.parametrize("segments", [0, 4])
def test_segments_out_of_range(segments: int) -> None:
    with pytest.raises(InputError, match=rf"1 <= num_segments <= num_stages must hold, but got {segments} and 3 stages"):
        checkpoint_segments(CHAIN, segments)
