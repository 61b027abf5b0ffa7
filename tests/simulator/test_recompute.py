"""What a plan's recompute means: modes, exceptions for single blocks, files, and what is refused."""

from __future__ import annotations

from pathlib import Path

import pytest

from hardware_models.errors import InputError
from simulator.plan import Memory, MemoryBlock, Plan
from simulator.recompute import operations_of
from simulator.sequence import format_sequence, keep_all, parse_sequence
from simulator.workload import Workload
from tests.small_models import traced
from tests.small_steps import nested


@pytest.fixture(scope="module")
def workload() -> Workload:
    """Five blocks, the first without the option ``selective``."""
    found = traced("residual-mlp").workload
    assert [len(block.options) for block in found.blocks] == [1, 2, 2, 2, 2]
    return found


def plan(recompute: str = "none", *blocks: MemoryBlock) -> Plan:
    return Plan(memory=Memory(recompute=recompute, block=blocks))


def lines(the_plan: Plan, workload: Workload, folder: Path | None = None) -> list[str]:
    return format_sequence(operations_of(the_plan, workload, folder=folder)).splitlines()


def test_none_keeps_everything(workload: Workload) -> None:
    assert operations_of(plan("none"), workload) == keep_all(5)


def test_selective_where_a_block_has_it(workload: Workload) -> None:
    assert lines(plan("selective"), workload)[:5] == [
        "F_all 0:all", "F_all 1:selective", "F_all 2:selective", "F_all 3:selective", "F_all 4:selective",
    ]  # fmt: skip


def test_full_runs_every_block_again_but_the_last(workload: Workload) -> None:
    assert lines(plan("full"), workload) == [
        "F_ck 0", "F_ck 1", "F_ck 2", "F_ck 3", "F_all 4:all", "B 4", "F_all 3:all", "B 3", "F_all 2:all", "B 2", "F_all 1:all",
        "B 1", "F_all 0:all", "B 0",
    ]  # fmt: skip


def test_exceptions_for_single_blocks(workload: Workload) -> None:
    found = lines(
        plan("full", MemoryBlock(blocks="1-2", recompute="none"), MemoryBlock(blocks="2,4", recompute="selective")), workload
    )
    assert found[:5] == ["F_ck 0", "F_all 1:all", "F_all 2:selective", "F_ck 3", "F_all 4:selective"]
    assert found == lines(
        plan("none", MemoryBlock(blocks="0,3", recompute="full"), MemoryBlock(blocks="2,4", recompute="selective")), workload
    )
    assert lines(plan("none", MemoryBlock(blocks="all", recompute="full")), workload)[4] == "F_ck 4"


def test_a_section_without_recompute_changes_nothing(workload: Workload) -> None:
    assert operations_of(plan("full", MemoryBlock(blocks="1")), workload) == operations_of(plan("full"), workload)


def test_refusals_of_sections(workload: Workload) -> None:
    with pytest.raises(InputError, match=r"memory.block\[0\].blocks = '3-5': index < 5 must hold, but got 5"):
        operations_of(plan("none", MemoryBlock(blocks="3-5", recompute="full")), workload)
    with pytest.raises(
        InputError,
        match=r"memory.block\[1\].microbatches = '0': recompute per micro-batch is not simulated yet.*; leave it at \"all\"",
    ):
        operations_of(plan("none", MemoryBlock(blocks="1"), MemoryBlock(microbatches="0", recompute="full")), workload)


def test_a_section_beside_a_file_is_refused(workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "mine.seq").write_text(format_sequence(nested(5)), encoding="utf-8")
    with pytest.raises(
        InputError,
        match=r"memory.block\[0\].recompute = 'full': memory.recompute = \"file:mine.seq\" says of every block how it is run; leave",
    ):
        operations_of(plan("file:mine.seq", MemoryBlock(blocks="1", recompute="full")), workload, folder=tmp_path)


def test_optimal_is_for_the_search(workload: Workload) -> None:
    with pytest.raises(InputError, match=r"memory.recompute = 'optimal': stands for what the search finds"):
        operations_of(plan("optimal"), workload)


def test_a_sequence_from_a_file(workload: Workload, tmp_path: Path) -> None:
    (tmp_path / "mine.seq").write_text("# nested\n" + format_sequence(nested(5)), encoding="utf-8")
    assert operations_of(plan("file:mine.seq"), workload, folder=tmp_path) == nested(5)
    assert operations_of(plan(f"file:{tmp_path / 'mine.seq'}"), workload) == nested(5)


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("F_all 0\nB 0\n", r"mine.seq: operation 2 = 'B 0': the next backward is of block 4, after its F_all"),
        ("F_all 0\nforward 1\n", r"mine.seq: line 2 = 'forward 1': an operation is F_ck i, F_e i, F_all i:option or B i"),
        (
            format_sequence(keep_all(5, "selective")),
            r"mine.seq: operation 1: F_all 0:selective': block 0 has the options all$",
        ),
        (
            format_sequence(keep_all(5)).replace("3:all", "3:some"),
            r"mine.seq: operation 4: F_all 3:some': block 3 has the options all, selective$",
        ),
    ],
)
def test_a_file_with_an_illegal_sequence_is_refused(workload: Workload, tmp_path: Path, text: str, said: str) -> None:
    (tmp_path / "mine.seq").write_text(text, encoding="utf-8")
    with pytest.raises(InputError, match=said):
        operations_of(plan("file:mine.seq"), workload, folder=tmp_path)


def test_a_file_that_is_not_there_is_refused(workload: Workload, tmp_path: Path) -> None:
    with pytest.raises(
        InputError, match=r"none\.seq: no such file; memory\.recompute = 'file:none\.seq' names it; write one operation a line"
    ):
        operations_of(plan("file:none.seq"), workload, folder=tmp_path)


def test_the_message_shows_a_legal_form() -> None:
    assert parse_sequence("F_ck 0\nF_all 1:all\nB 1")
