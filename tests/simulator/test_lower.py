"""Lowering: a hand-made workload whose bytes and seconds are counted by hand, and what holds for any sequence."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from itertools import pairwise

import numpy as np
import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from simulator import engine_simpy
from simulator.lower import PassPrices, lower, optimizer_pass, policy_seconds, resident_bytes
from simulator.program import Kind, MemoryClass, Program
from simulator.sequence import Operation, checkpoint_blocks, keep_all, parse_sequence
from simulator.simulate import static_peak_bytes
from simulator.workload import Block, BlockOption, MemoryEvent, Pass, Workload
from tests.small_models import SMALL_MODELS, traced
from tests.small_steps import nested, program_of, sequences

OUT, SAVED, TEMPORARY, GRADIENT, CARRIED, STATE = 10, 100, 1000, 10_000, 100_000, 1_000_000
LOSS = OUT
"""The step's loss so far: the last boundary's size, kept until the step ends."""
PARAMETERS, BUFFERS, BATCH = 7, 3, 5
KERNEL = Kernel(kernel_class="pointwise", op="add", shape=(1,), dtype="float32", flops=0, read_bytes=1, written_bytes=1)


def run(num_kernels: int, *events: tuple[int, str, int]) -> Pass:
    memory = tuple(MemoryEvent(kernel=kernel, buffer=buffer, delta_bytes=size) for kernel, buffer, size in events)  # type: ignore[arg-type]
    return Pass(kernels=(KERNEL,) * num_kernels, memory=memory)


def block(index: int, *, last: bool = False) -> Block:
    """Two kernels forward, three backward; the graph keeps its input; the first carries a table."""
    carried = ((0, "carried", CARRIED),) if index == 0 else ()
    transient = ((0, "transient", TEMPORARY), (1, "transient", -TEMPORARY))
    grad_input = () if index == 0 else ((1, "grad_input", OUT),)
    let_go = () if index == 0 else ((2, "saved_input", -OUT),)
    option = BlockOption(
        name="all", forward=run(2, *carried, *transient, (1, "internal", SAVED), (2, "output", OUT)),
        backward=run(3, *grad_input, (2, "gradient", GRADIENT), (3, "internal", -SAVED), *let_go),
        backward_accumulate=run(3, *grad_input, (3, "internal", -SAVED), *let_go),
        keeps_input=index > 0, keeps_output=False, saved=(),
    )  # fmt: skip
    return Block(
        name=f"block{index}", input_bytes=OUT if index else 0, output_bytes=OUT, parameter_elements=1, parameter_bytes=4,
        gradient_bytes=GRADIENT, discard=run(2, *carried, *transient, (2, "output", OUT)), options=(option,),
        state_bytes=STATE if last else 0,
    )  # fmt: skip


WORKLOAD = Workload(
    model="by hand", micro_batch=1, tokens=1, blocks=(block(0), block(1), block(2, last=True)), parameter_elements=3,
    parameter_bytes=PARAMETERS, buffer_bytes=BUFFERS, gradient_bytes=3 * GRADIENT, shared_gradient_bytes=0,
    shared_accumulate=run(0), optimizer_tensors=(1, 2), batch_bytes=BATCH, mixes_samples=False,
)  # fmt: skip


def seconds(kernels: Sequence[Kernel]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
    return np.ones(len(kernels))


def lowered(operations: Sequence[Operation], num_microbatches: int = 1, workload: Workload = WORKLOAD) -> Program:
    return lower(workload, operations, PassPrices(seconds), num_microbatches=num_microbatches)


def levels(program: Program) -> list[int]:
    """Bytes above the resident level after each instruction."""
    totals = np.concatenate(([0], np.cumsum(program.memory_bytes)))
    return [int(totals[end]) for end in program.memory_offsets[1:]]


def labels(program: Program) -> list[str]:
    return [program.label(index) for index in range(program.num_instructions)]


def test_bytes_of_a_step_that_keeps_everything() -> None:
    program = lowered(keep_all(3))
    assert labels(program) == ["F0:all mb0", "F1:all mb0", "F2:all mb0", "B2 mb0", "B1 mb0", "B0 mb0", "step"]
    assert program.duration_s.tolist() == [2, 2, 2, 3, 3, 3, 2]
    assert levels(program) == [
        CARRIED + SAVED + OUT,
        CARRIED + 2 * SAVED + 2 * OUT,
        CARRIED + 3 * SAVED + 2 * OUT + LOSS,  # boundaries 1 and 2 are kept by graphs, boundary 3 is the loss
        CARRIED + 2 * SAVED + 2 * OUT + LOSS + GRADIENT,  # boundary 2 became its gradient
        CARRIED + SAVED + OUT + LOSS + 2 * GRADIENT,
        LOSS + 3 * GRADIENT,
        0,
    ]


def test_bytes_of_a_step_that_runs_blocks_again() -> None:
    program = lowered(checkpoint_blocks(3, [0, 1], ["all"] * 3))
    assert [Kind(kind).name for kind in program.kind] == [
        "FORWARD", "FORWARD", "FORWARD", "BACKWARD", "RECOMPUTE", "BACKWARD", "RECOMPUTE", "BACKWARD", "OPTIMIZER",
    ]  # fmt: skip
    assert levels(program)[:4] == [
        CARRIED + OUT,
        CARRIED + 2 * OUT,
        CARRIED + SAVED + 2 * OUT + LOSS,
        CARRIED + 2 * OUT + LOSS + GRADIENT,
    ]
    assert levels(program)[6] == CARRIED + SAVED + OUT + LOSS + 2 * GRADIENT, "the second copy of what is carried is dropped"


def test_a_block_that_runs_twice_keeps_its_state() -> None:
    once, twice = lowered(keep_all(3)), lowered(checkpoint_blocks(3, [2], ["all"] * 3))
    index = labels(twice).index("F2 mb0")
    assert levels(twice)[index] == CARRIED + 2 * SAVED + 2 * OUT + LOSS + STATE
    recomputing = slice(*twice.memory_offsets[index + 1 : index + 3])
    assert twice.memory_bytes[recomputing].tolist().count(STATE) == 1, "the present state is set aside"
    assert twice.memory_bytes[recomputing].tolist().count(-STATE) == 1
    assert STATE not in np.abs(once.memory_bytes)
    assert levels(twice)[-1] == 0


def test_later_micro_batches_find_the_gradients() -> None:
    program = lowered(keep_all(3), num_microbatches=3)
    per_micro_batch = np.array(levels(program)[:-1]).reshape(3, 6)
    assert per_micro_batch[:, -1].tolist() == [LOSS + 3 * GRADIENT] * 3
    assert per_micro_batch[1].tolist() == per_micro_batch[2].tolist()
    assert per_micro_batch[1, 0] == CARRIED + SAVED + OUT + LOSS + 3 * GRADIENT


def test_shared_gradients_are_added_after_every_micro_batch_but_the_first() -> None:
    shared = 50
    last = WORKLOAD.blocks[2]
    option = last.options[0]
    event = MemoryEvent(kernel=3, buffer="shared_gradient", delta_bytes=shared)
    option = replace(
        option, backward=replace(option.backward, memory=(*option.backward.memory, event)),
        backward_accumulate=replace(option.backward_accumulate, memory=(*option.backward_accumulate.memory, event)),
    )  # fmt: skip
    workload = replace(
        WORKLOAD, blocks=(*WORKLOAD.blocks[:2], replace(last, options=(option,))), gradient_bytes=3 * GRADIENT + shared,
        shared_gradient_bytes=shared, shared_accumulate=run(4),
    )  # fmt: skip
    program = lowered(keep_all(3), 2, workload)
    assert labels(program).count("reduce mb1") == 1
    assert "reduce mb0" not in labels(program)
    reduction = labels(program).index("reduce mb1")
    assert program.duration_s[reduction] == 4
    assert levels(program)[reduction - 1 : reduction + 1] == [
        CARRIED + 2 * LOSS + 3 * GRADIENT + 2 * shared,
        LOSS + 3 * GRADIENT + shared,
    ]
    assert levels(program)[-1] == 0


def test_resident_bytes_by_class() -> None:
    found = dict(zip(MemoryClass, resident_bytes(WORKLOAD, num_microbatches=4, optimizer="adamw"), strict=True))
    assert found[MemoryClass.PARAMETERS] == PARAMETERS + BUFFERS
    assert found[MemoryClass.BATCH] == 4 * BATCH
    assert found[MemoryClass.OPTIMIZER_STATES] == 2 * 3 * GRADIENT + 2 * 4
    assert found[MemoryClass.GRADIENTS] == found[MemoryClass.ACTIVATIONS] == 0
    sgd = resident_bytes(WORKLOAD, num_microbatches=1, optimizer="sgd")
    assert sgd[MemoryClass.OPTIMIZER_STATES] == 0


def test_the_optimizer_moves_parameter_gradient_and_states() -> None:
    workload = traced("unused-parameter").workload
    adamw, sgd = (optimizer_pass(workload, optimizer=name) for name in ("adamw", "sgd"))
    assert [kernel.shape for kernel in adamw.kernels] == [(elements,) for elements in workload.optimizer_tensors]
    assert sum(kernel.moved_bytes for kernel in adamw.kernels) == 7 * workload.gradient_bytes
    assert sum(kernel.moved_bytes for kernel in sgd.kernels) == 3 * workload.gradient_bytes


def test_each_pass_is_priced_once() -> None:
    calls: list[int] = []

    def price(kernels: Sequence[Kernel]) -> np.ndarray[tuple[int], np.dtype[np.float64]]:
        calls.append(len(kernels))
        return np.arange(1.0, len(kernels) + 1)

    prices = PassPrices(price)
    lower(WORKLOAD, nested(3), prices, num_microbatches=5)
    distinct = 3 + 3 + 3 + 3  # discard, forward, first backward, later backward of three blocks
    assert len(calls) <= distinct + 5, "the optimizer's pass is made anew"
    assert prices.offsets(WORKLOAD.blocks[0].discard).tolist() == [0, 1, 3]
    assert prices.seconds(run(0)) == 0


def test_kernels_wait_for_what_a_policy_takes_the_host() -> None:
    prices = PassPrices(lambda kernels: np.ones(len(kernels)), policy_s=0.5)
    plain = WORKLOAD.blocks[0].discard
    asked = replace(plain, policy_calls=6)
    assert len(plain.kernels) == 2
    assert prices.offsets(plain).tolist() == [0, 1, 2]
    prices.fill([asked])
    assert prices.offsets(asked).tolist() == [0, 1 + 6 * 0.5 / 2, 2 * (1 + 6 * 0.5 / 2)]
    assert prices.offsets(replace(asked)).tolist() == prices.offsets(asked).tolist()
    cpu = load_hardware("a100-sxm-80gb").changed(kind="cpu", checkpoint_policy_s=3e-5)
    assert (policy_seconds(cpu), policy_seconds(cpu.changed(kind="cuda"))) == (3e-5, 0.0)


def test_an_illegal_sequence_is_refused() -> None:
    with pytest.raises(InputError, match="ends before the backward of block 2"):
        lowered(parse_sequence("F_e 0"))


@pytest.mark.parametrize("name", SMALL_MODELS)
@pytest.mark.parametrize("num_microbatches", [1, 3])
def test_any_program_returns_to_the_resident_level_and_the_engine_agrees(name: str, num_microbatches: int) -> None:
    trace_of = traced(name, num_microbatches)
    for label, operations in sequences(trace_of).items():
        program = program_of(trace_of, operations, num_microbatches)
        assert int(program.memory_bytes.sum()) == 0, label
        for start, end in pairwise(program.memory_offsets.tolist()):
            assert (np.diff(program.memory_time_s[start:end]) >= 0).all(), f"{label}: events of an instruction in order"
        timeline, (profile,) = engine_simpy.run(program)
        assert profile.peak_bytes == static_peak_bytes(program), label
        assert timeline.makespan_s == pytest.approx(program.duration_s.sum()), label
        by_class = np.zeros(len(MemoryClass), np.int64)
        np.add.at(by_class, program.memory_class, program.memory_bytes)
        assert by_class[MemoryClass.GRADIENTS] == 0, label
