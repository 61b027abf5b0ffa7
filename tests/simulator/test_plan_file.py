"""Plans survive a round trip through TOML, and each kind of mistake in a file has its message."""

from __future__ import annotations

import json
import re
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.errors import InputError, UnknownNameError
from simulator.plan import RECOMPUTES, Batch, Memory, MemoryBlock, Parallel, Pipeline, Plan, Precision, Runtime
from simulator.plan_file import format_plan, parse_plan, plan_from_dict, plan_to_dict, read_plan, referenced_path, write_plan
from simulator.plan_sections import MESH_AXES, SCHEDULES_ONE_CHUNK

fractions = st.floats(0, 1)
blocks = st.builds(
    MemoryBlock,
    stage=st.just(0),
    blocks=st.sampled_from(["all", "3", "0-11", "0-3,7"]),
    recompute=st.sampled_from([None, "none", "full"]),
    activation_offload=st.none() | fractions,
)
memories = st.builds(
    Memory,
    zero_stage=st.integers(0, 3),
    recompute=st.sampled_from(RECOMPUTES) | st.just("file:best.seq"),
    activation_offload=fractions | st.just("optimal"),
    delayed_update=st.booleans(),
    budget_bytes=st.none() | st.integers(1, 2**50),
    block=st.lists(blocks, max_size=3).map(tuple),
)


@st.composite
def plans(draw: st.DrawFn) -> Plan:
    degree = st.integers(1, 16)
    parallel = Parallel(
        tp=draw(degree), pp=draw(degree), dp=draw(degree), order="-".join(draw(st.permutations(MESH_AXES))),
        sequence_parallel=draw(st.booleans()),
    )  # fmt: skip
    micro = draw(st.none() | degree)
    whole = draw(st.none() | degree.map(lambda count: count * parallel.dp * (micro or 1)))
    partition = draw(st.none() | st.lists(st.integers(0, 99), min_size=parallel.pp, max_size=parallel.pp).map(tuple))
    limit = draw(st.none() | st.floats(0.5, 64))
    return Plan(
        parallel=parallel,
        batch=Batch(global_batch=whole, micro_batch=micro),
        pipeline=Pipeline(schedule=draw(st.sampled_from(SCHEDULES_ONE_CHUNK)), partition=partition, memory_limit=limit),
        memory=draw(memories),
        precision=Precision(compute=draw(st.sampled_from(["fp32", "bf16", "fp8"]))),
        runtime=Runtime(bucket_bytes=draw(st.none() | st.integers(1, 2**40))),
    )


@given(plans())
def test_round_trip(plan: Plan) -> None:
    assert parse_plan(format_plan(plan)) == plan
    assert plan_from_dict(json.loads(json.dumps(plan_to_dict(plan)))) == plan


def test_an_empty_file_is_the_default_plan() -> None:
    assert parse_plan("") == Plan()


def test_writing_leaves_no_temporary_file(tmp_path: Path) -> None:
    path = tmp_path / "plan.toml"
    for plan in (Plan(), Plan(parallel=Parallel(tp=2))):
        write_plan(plan, path)
        assert read_plan(path) == plan
    assert list(tmp_path.iterdir()) == [path]


def test_a_whole_number_is_a_fraction() -> None:
    assert parse_plan("[memory]\nactivation_offload = 1").memory.activation_offload == 1.0


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[serving]\nbatch = 1", "p.toml: serving: serving is not yet supported"),
        ("[paralel]\ntp = 2", "p.toml: paralel = {'tp': 2}: unknown key; did you mean parallel?"),
        ("[memory]\nrecomputed = 'full'", "p.toml: memory.recomputed = 'full': unknown key; did you mean memory.recompute?"),
        ("[batch]\nzzz = 1", "p.toml: batch.zzz = 1: unknown key; known are global_batch, micro_batch, seq_len"),
        ("[[memory.block]]\n[[memory.block]]\nstages = 1", "p.toml: memory.block[1].stages = 1: unknown key; did you mean memory.block[1].stage?"),
        ("[parallel]\ntp = '2'", "p.toml: parallel.tp = '2': must be a valid integer"),
        ("[parallel]\ntp = true", "p.toml: parallel.tp = True: must be a valid integer"),
        ("[parallel]\ntp = 2.0", "p.toml: parallel.tp = 2.0: must be a valid integer"),
        ("parallel = 3", "p.toml: parallel = 3: must be a table"),
        ("memory = 3", "p.toml: memory = 3: must be a table"),
        ("[memory]\nblock = 3", "p.toml: memory.block = 3: must be a valid array"),
        ("[memory]\nblock = [3]", "p.toml: memory.block[0] = 3: must be a table"),
        ("[parallel]\nsequence_parallel = 1", "p.toml: parallel.sequence_parallel = 1: must be a valid boolean"),
        ("[parallel]\ncp_method = 'rings'", "p.toml: parallel.cp_method = 'rings': must be 'ring' or 'all-to-all'"),
        ("[memory]\nactivation_offload = 'most'", "p.toml: memory.activation_offload = 'most': must be a valid number or 'optimal'"),
        ("[memory]\nbudget_bytes = 1979-05-27", "p.toml: memory.budget_bytes = datetime.date(1979, 5, 27): must be a valid integer"),
        ("[pipeline]\npartition = [1, 'x']", "p.toml: pipeline.partition[1] = 'x': must be a valid integer"),
        ("[memory]\nactivation_offload = 1.5", "p.toml: memory.activation_offload = 1.5: 0 <= fraction <= 1 must hold"),
        ("[memory]\nactivation_offload = nan", "p.toml: memory.activation_offload = nan: 0 <= fraction <= 1 must hold"),
        ("[[memory.block]]\n[[memory.block]]\nstage = -1", "p.toml: memory.block[1].stage = -1: stage >= 0 must hold"),
        ("[parallel]\npp = 2\n[pipeline]\npartition = [1]", "p.toml: pipeline.partition = (1,): pp * virtual_stages entries"),
        ("[parallel]\ntp = 2\n\npp == 2", "p.toml: line 4: not TOML: "),
        ("[parallel", "p.toml: line 1: not TOML: "),
        ("[parallel]\ntp =", "p.toml: line 2: not TOML: Invalid value"),
    ],
)  # fmt: skip
def test_a_mistake_names_file_key_value_and_rule(text: str, message: str) -> None:
    with pytest.raises(InputError, match="^" + re.escape(message)):
        parse_plan(text, source="p.toml")


def test_unknown_names_stay_unknown_names() -> None:
    with pytest.raises(UnknownNameError, match=r"p\.toml: memory\.recompute = 'some': unknown name; known are none"):
        parse_plan("[memory]\nrecompute = 'some'", source="p.toml")


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(InputError, match=r"plan\.toml: no such file; give the path of a plan file"):
        read_plan(tmp_path / "plan.toml")
    (tmp_path / "plan.toml").write_bytes(b"a = '\xff'")
    with pytest.raises(InputError, match=r"plan\.toml: byte 5: text in UTF-8 is asked for"):
        read_plan(tmp_path / "plan.toml")


def test_referenced_files_start_at_the_plans_folder() -> None:
    assert referenced_path("file:best.seq", plan_path=Path("runs/plan.toml")) == Path("runs/best.seq")
