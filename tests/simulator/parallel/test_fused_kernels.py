"""Kernels that fused ones replace: which go, and that memory stays where it was."""

from __future__ import annotations

from simulator.parallel.fused_kernels import accumulating, column_products, fuse_kernels, without
from simulator.presets import build_workload
from simulator.workload import Block, MemoryEvent, Pass
from tests.simulator.parallel.step_cases import SEQ_LEN, small_config

HIDDEN, HEADS, BATCH = 1024, 16, 2
SCORES = BATCH * HEADS * SEQ_LEN * SEQ_LEN
STREAM = BATCH * SEQ_LEN * HIDDEN


def blocks(*, flash: bool = False) -> dict[str, Block]:
    workload = build_workload(
        small_config(dropout=0.1), micro_batch=BATCH, seq_len=SEQ_LEN, dtype="bfloat16", flash_attention=flash
    )  # fmt: skip
    return {block.name: block for block in workload.blocks}


def total_bytes(run: Pass) -> int:
    return sum(kernel.moved_bytes for kernel in run.kernels)


def test_scale_and_mask_go_into_softmax_both_ways() -> None:
    """Forward a scaling (one read, one write) and a mask (two reads, one write) of the scores, backward a scaling, in two bytes."""
    block = blocks()["attention"]
    fused = fuse_kernels(block)
    residual = 3 * 2 * STREAM
    left = 3 * 2 * (STREAM // 3)
    assert total_bytes(block.discard) - total_bytes(fused.discard) == 2 * 5 * SCORES + residual - left
    before, after = block.options[0].backward, fused.options[0].backward
    assert total_bytes(before) - total_bytes(after) == 2 * 2 * SCORES


def test_of_the_sum_behind_dropout_one_read_is_left() -> None:
    block = blocks()["network"]
    saved = total_bytes(block.discard) - total_bytes(fuse_kernels(block).discard)
    assert saved == 3 * 2 * STREAM - 3 * 2 * (STREAM // 3)


def test_flash_attention_has_nothing_to_fuse_but_the_sum() -> None:
    block = blocks(flash=True)["attention"]
    assert len(fuse_kernels(block).discard.kernels) == len(block.discard.kernels)


def test_flops_and_bytes_alive_stay() -> None:
    for block in blocks().values():
        fused = fuse_kernels(block)
        for before, after in zip(block.options, fused.options, strict=True):
            for one, other in ((before.forward, after.forward), (before.backward, after.backward)):
                assert one.flops == other.flops
                assert [event.delta_bytes for event in one.memory] == [event.delta_bytes for event in other.memory]
                assert all(event.kernel <= len(other.kernels) for event in other.memory)


def test_events_keep_their_place_among_the_kernels_that_are_left() -> None:
    kernels = blocks()["network"].discard.kernels[:4]
    memory = tuple(MemoryEvent(kernel=n, buffer="transient", delta_bytes=1) for n in range(5))
    left = without(Pass(kernels=kernels, memory=memory), {1, 2})
    assert left.kernels == (kernels[0], kernels[3])
    assert [event.kernel for event in left.memory] == [0, 1, 1, 1, 2]


def test_accumulation_adds_half_of_six_bytes_an_element() -> None:
    option = accumulating(blocks()["network"].options[0], 1000)
    assert total_bytes(option.backward_accumulate) - total_bytes(option.backward) == 3000
    assert option.backward_accumulate.memory == option.backward.memory


def test_the_product_behind_which_a_sum_hides_is_the_first_ones_weight_gradient() -> None:
    found = blocks()
    (attention,), (network,) = (column_products(found[name], HIDDEN, BATCH * SEQ_LEN) for name in ("attention", "network"))
    assert attention.shape == (HIDDEN, 3 * HIDDEN, BATCH * SEQ_LEN)
    assert network.shape == (HIDDEN, 4 * HIDDEN, BATCH * SEQ_LEN)
    assert column_products(found["head"], HIDDEN, BATCH * SEQ_LEN) == ()


def test_gradients_of_two_bytes_are_read_once_more() -> None:
    """12,000 elements: half of the six more bytes of a float32 gradient, or of the two of another, by a kernel that moves eight an element."""
    option = blocks()["network"].options[0]
    wide, narrow = (accumulating(option, 12_000, width=width).backward_accumulate.kernels[-1] for width in (4, 2))
    assert (wide.shape, narrow.shape) == ((4_500,), (1_500,))
