"""Recompute and offload inside a block against all choices, and its options in a chain."""

from __future__ import annotations

from dataclasses import replace
from itertools import product

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, InputError
from search.chain_of_workload import chain_of_workload
from search.chain_solver import minimum_limit_bytes, solve_chain
from search.solvers.graph_problem import GraphProblem, TimedOperation, again_for, backward_start_bytes, graph_of_block
from search.solvers.graph_solver import graph_options, least_kept_bytes, solve_graph, with_graph_options


@st.composite
def graphs(draw: st.DrawFn) -> GraphProblem:
    operations, known = [], [0]
    for number in range(draw(st.integers(1, 5))):
        writes = tuple(range(len(known), len(known) + draw(st.integers(1, 2))))
        reads = draw(st.lists(st.sampled_from(known), min_size=1, max_size=3, unique=True))
        operations.append(
            TimedOperation(
                name=f"op{number}", time_s=float(draw(st.integers(0, 5))), reads=tuple(reads), writes=writes,
                is_repeatable=draw(st.integers(0, 4)) > 0,
            )
        )  # fmt: skip
        known += writes
    needed = frozenset(draw(st.lists(st.sampled_from(known), unique=True)))
    return GraphProblem(
        operations=tuple(operations), size_bytes=tuple(draw(st.integers(0, 9)) for _ in known), needed=needed,
        boundaries=frozenset({0, known[-1]}) if draw(st.booleans()) else frozenset({0}),
        out_bytes=draw(st.integers(0, 9)), in_bytes=draw(st.integers(0, 9)), out_bytes_per_s=draw(st.integers(1, 3)),
        in_bytes_per_s=draw(st.integers(1, 3)), can_send=draw(st.booleans()),
    )  # fmt: skip


def every_way(problem: GraphProblem) -> list[tuple[int, float]]:
    """Kept bytes and time of each choice of what to keep, to send and to run again, checked operator by operator."""
    tensors = [tensor for operation in problem.operations for tensor in operation.writes if tensor not in problem.boundaries]
    ways = []
    for fate in product("-ks" if problem.can_send else "-k", repeat=len(tensors)):
        kept = {tensor for tensor, letter in zip(tensors, fate, strict=True) if letter == "k"}
        sent = {tensor for tensor, letter in zip(tensors, fate, strict=True) if letter == "s"}
        for runs in product((False, True), repeat=len(problem.operations)):
            there = kept | sent | problem.boundaries
            legal = True
            for operation, runs_again in zip(problem.operations, runs, strict=True):
                if runs_again:
                    legal &= operation.is_repeatable and set(operation.reads) <= there
                    there = there | set(operation.writes)
            if legal and problem.needed <= there:
                moved = sum(problem.size_bytes[tensor] for tensor in sent)
                time = sum(
                    operation.time_s for operation, runs_again in zip(problem.operations, runs, strict=True) if runs_again
                )
                time += max(0, moved - problem.out_bytes) / problem.out_bytes_per_s
                time += max(0, moved - problem.in_bytes) / problem.in_bytes_per_s
                ways.append((sum(problem.size_bytes[tensor] for tensor in kept), time))
    return ways


@settings(max_examples=15)
@given(graphs())
def test_equals_brute_force_at_every_budget(problem: GraphProblem) -> None:
    if len(problem.size_bytes) > 7:
        problem = replace(problem, can_send=False)
    ways = every_way(problem)
    least = min(kept for kept, _ in ways)
    assert least_kept_bytes(problem) == least
    for budget in sorted({kept for kept, _ in ways})[:6]:
        solution = solve_graph(problem, budget)
        assert solution.extra_s == pytest.approx(min(time for kept, time in ways if kept <= budget), abs=1e-6)
        assert solution.saved_bytes <= budget
        assert solution.proof.is_exact
        assert solution.again == again_for(problem, (*solution.kept, *solution.sent))
    if least:
        with pytest.raises(InfeasibleError, match=f"the least that fits is {least} bytes"):
            solve_graph(problem, least - 1)
    front = [(option.saved_bytes, option.extra_s) for option in graph_options(problem, most=100)]
    best = sorted({(kept, min(time for k, time in ways if k <= kept)) for kept, _ in ways}, reverse=True)
    for kept, time in front:
        assert time == pytest.approx(dict(best)[kept], abs=1e-6)
    assert front[-1][0] == least or front[-1][1] == pytest.approx(min(time for _, time in ways), abs=1e-6)


CHAIN = GraphProblem(
    operations=(
        TimedOperation(name="norm", time_s=1.0, reads=(0,), writes=(1,)),
        TimedOperation(name="product", time_s=10.0, reads=(1,), writes=(2,)),
        TimedOperation(name="gelu", time_s=2.0, reads=(2,), writes=(3,)),
    ),
    size_bytes=(4, 4, 16, 16),
    needed=frozenset({0, 1, 2, 3}),
    boundaries=frozenset({0}),
)


def test_cheap_operators_run_again_first() -> None:
    """By hand: 36 bytes keep all; 32 drop the result of the norm (1 s), 20 that of gelu (2 s), 16 both, 4 product and gelu (12 s)."""
    found = [(option.saved_bytes, option.extra_s) for option in graph_options(CHAIN, most=9)]
    assert found == [(36, 0.0), (32, 1.0), (20, 2.0), (16, 3.0), (4, 12.0), (0, 13.0)]
    assert solve_graph(CHAIN, 19).again == (0, 2)
    assert solve_graph(CHAIN, 19).kept == (2,)


def test_a_link_with_room_spares_recompute() -> None:
    linked = replace(CHAIN, can_send=True, out_bytes=20, in_bytes=20, out_bytes_per_s=4.0, in_bytes_per_s=4.0)
    assert solve_graph(linked, 16).extra_s == 0.0
    assert solve_graph(linked, 0).extra_s == 2.0
    assert solve_graph(replace(linked, in_bytes=16), 16).extra_s == pytest.approx(1.0)


def test_bytes_before_the_backward_pass() -> None:
    assert backward_start_bytes(CHAIN, (1, 2, 3), ()) == 36
    assert backward_start_bytes(CHAIN, (), (0, 1, 2)) == 36
    lean = replace(CHAIN, needed=frozenset({3}))
    assert backward_start_bytes(lean, (), (0, 1, 2)) == 32


def test_less_memory_never_costs_less_time() -> None:
    times = [solve_graph(CHAIN, budget).extra_s for budget in range(0, 40, 2)]
    assert times == sorted(times, reverse=True)


@pytest.mark.slow
def test_options_of_traced_blocks_keep_what_autograd_keeps_and_make_the_chain_no_slower() -> None:
    from simulator.tracing.record import Setting
    from simulator.tracing.record_graph import record_graph
    from tests.small_models import traced

    device = load_hardware("h100-sxm")
    for name in ("residual-mlp", "spectral"):
        model = traced(name)
        chain = chain_of_workload(model.workload, device, first_micro_batch=True)
        wider = chain
        for stage, block in enumerate(model.workload.blocks):
            setting = Setting(chain=model.chain, index=stage, shared=model.shared, fresh_shared=frozenset())
            recorded = record_graph(setting)
            problem = graph_of_block(recorded, device)
            options = graph_options(problem, most=4)
            assert options[0].saved_bytes == block.options[0].saved_internal_bytes
            assert sum(len(operation.kernels) for operation in recorded.operations) == len(block.options[0].forward.kernels)
            wider = with_graph_options(wider, stage, problem, options)
        limit = minimum_limit_bytes(chain)
        assert minimum_limit_bytes(wider) <= limit
        assert solve_chain(wider, limit).time_s <= solve_chain(chain, limit).time_s * (1 + 1e-9)


def test_messages_of_wrong_arguments() -> None:
    operation = TimedOperation(name="norm", time_s=1.0, reads=(1,), writes=(2,))
    with pytest.raises(InputError, match="but norm reads tensor 1"):
        GraphProblem(operations=(operation,), size_bytes=(1, 1, 1), needed=frozenset(), boundaries=frozenset({0}))
    with pytest.raises(InputError, match="tensor 2 is made by norm too"):
        GraphProblem(
            operations=(replace(operation, reads=(0,)),) * 2,
            size_bytes=(1, 1, 1),
            needed=frozenset(),
            boundaries=frozenset({0}),
        )
    with pytest.raises(InputError, match="every tensor that is needed has a maker and a size"):
        GraphProblem(operations=(), size_bytes=(1,), needed=frozenset({1}), boundaries=frozenset({0}))
    with pytest.raises(InputError, match="most = 0: most >= 1 must hold"):
        graph_options(CHAIN, most=0)
