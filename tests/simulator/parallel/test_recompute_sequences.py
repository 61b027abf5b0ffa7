"""Sequences over the blocks of the whole model: what each stage takes of them, what they cost, and what is refused."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

import pytest

from hardware_models.errors import InputError
from hardware_models.network.cluster_file import load_cluster
from simulator.model_source import ModelSource
from simulator.parallel.recompute import stage_operations, stage_sequence, stage_sequences
from simulator.parallel.simulate_source import simulate_source
from simulator.parallel.stages import Stage, stages_of
from simulator.plan import Memory, Plan
from simulator.presets import build_workload
from simulator.sequence import Operation, check_sequence, checkpoint_blocks, format_sequence, keep_all, parse_sequence
from tests.simulator.parallel.step_cases import SEQ_LEN, plan_of, small_config

NUM_BLOCKS = 18
"""Embedding, eight layers of two halves, head."""


def stages(pp: int) -> tuple[Stage, ...]:
    return stages_of(build_workload(small_config(), micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16"), plan_of(pp=pp))


def source() -> ModelSource:
    return ModelSource(name="small", config=small_config(), seq_len=SEQ_LEN)


def with_file(plan: Plan, folder: Path, text: str) -> Plan:
    (folder / "plan.seq").write_text(text, encoding="utf-8")
    return replace(plan, memory=replace(plan.memory, recompute="file:plan.seq"))


@pytest.mark.parametrize("pp", [1, 2, 4])
def test_a_stage_takes_its_own_blocks(pp: int) -> None:
    for stage in stages(pp):
        assert stage_sequence(keep_all(NUM_BLOCKS), stage, source="s") == keep_all(len(stage.blocks))


@pytest.mark.parametrize("pp", [2, 4, 8])
@pytest.mark.parametrize("checkpointed", [range(17), range(0, 17, 2), (3, 4, 5, 12)])
def test_a_sequence_of_the_whole_model_is_legal_on_every_stage(pp: int, checkpointed: range) -> None:
    whole = checkpoint_blocks(NUM_BLOCKS, checkpointed, ["all"] * NUM_BLOCKS)
    for stage in stages(pp):
        check_sequence(stage_sequence(whole, stage, source="s"), len(stage.blocks))


def test_a_nested_sequence_that_crosses_stages_keeps_what_they_receive() -> None:
    """One checkpoint at the front: every stage runs its blocks again from the boundary that it has received."""
    lines = "F_ck 0\nF_e 1\nF_e 2\nF_e 3\nF_e 4\nF_all 5\nB 5\nF_e 0\nF_e 1\nF_e 2\nF_e 3\nF_all 4\nB 4\n"
    rest = "F_ck 0\nF_e 1\nF_e 2\nF_all 3\nB 3\nF_e 0\nF_e 1\nF_all 2\nB 2\nF_all 0\nF_all 1\nB 1\nB 0\n"
    config = small_config(layers=2)
    workload = build_workload(config, micro_batch=1, seq_len=SEQ_LEN, dtype="bfloat16")
    first, second = stages_of(workload, plan_of(pp=2))
    assert (second.first, len(second.blocks)) == (3, 3)
    own = stage_sequence(parse_sequence(lines + rest), second, source="s")
    assert [str(operation) for operation in own] == [
        "F_ck 0",
        "F_e 1",
        "F_all 2:all",
        "B 2",
        "F_ck 0",
        "F_all 1:all",
        "B 1",
        "F_all 0:all",
        "B 0",
    ]
    check_sequence(stage_sequence(parse_sequence(lines + rest), first, source="s"), 3)


@pytest.mark.parametrize("pp", [1, 2, 4])
@pytest.mark.parametrize("recompute", ["none", "full"])
def test_a_file_means_what_the_word_means(tmp_path: Path, pp: int, recompute: str) -> None:
    plan = plan_of(pp=pp, recompute=recompute, framework="pytorch")
    operations = [
        operation._replace(block=operation.block + stage.first)
        for stage in stages(pp)
        for operation in stage_operations(plan, stage)
    ]
    cluster = load_cluster("selene")
    named, written = (
        simulate_source(source(), one, cluster, folder=tmp_path)
        for one in (plan, with_file(plan, tmp_path, format_sequence(operations)))
    )
    assert written.step_time_s == named.step_time_s
    assert written.peak_memory_bytes == named.peak_memory_bytes


def test_stages_may_recompute_different_amounts(tmp_path: Path) -> None:
    """The front, which holds most micro-batches, checkpoints its layers; the rest keeps all."""
    plan = plan_of(pp=4, framework="pytorch")
    options = ["all"] * NUM_BLOCKS
    mixed = with_file(plan, tmp_path, format_sequence(checkpoint_blocks(NUM_BLOCKS, range(1, 5), options)))
    cluster = load_cluster("selene")
    kept, some = (simulate_source(source(), one, cluster, folder=tmp_path) for one in (plan, mixed))
    assert some.peak_memory_bytes[0] < kept.peak_memory_bytes[0]
    assert some.peak_memory_bytes[1:] == kept.peak_memory_bytes[1:]
    assert some.step_time_s > kept.step_time_s


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("F_all 18:all\n", r"operation 1: F_all 18:all.*0 <= block < 18"),
        (format_sequence(keep_all(9)), r"stage 1 \(blocks 9 to 17\)"),
        (format_sequence(keep_all(18, "sparse")), r"stage 0.*F_all 0:sparse.*block 0 has the options all"),
        ("F_all x\n", r"line 1"),
    ],
)
def test_an_illegal_file_is_refused_by_stage(tmp_path: Path, text: str, message: str) -> None:
    plan = with_file(plan_of(pp=2), tmp_path, text)
    with pytest.raises(InputError, match=message):
        simulate_source(source(), plan, load_cluster("selene"), folder=tmp_path)


def test_a_file_that_is_not_there_is_refused(tmp_path: Path) -> None:
    plan = replace(plan_of(pp=2), memory=Memory(recompute="file:none.seq"))
    with pytest.raises(InputError, match=r"none\.seq: no such file; memory\.recompute"):
        simulate_source(source(), plan, load_cluster("selene"), folder=tmp_path)


def test_an_empty_stage_has_an_empty_sequence() -> None:
    stage = replace(stages(2)[1], workload=replace(stages(2)[1].workload, blocks=()))
    assert stage_sequences(keep_all(9), [stages(2)[0], stage], source="s")[1] == ()


def test_operations_of_the_stage_before_do_not_count() -> None:
    assert stage_sequence((Operation("B", 0), *keep_all(NUM_BLOCKS)), stages(2)[1], source="s") == keep_all(9)
