"""Cases that the tests of exports share."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

from search.export_case import Case, resolved_plan
from simulator.parallel.orders import order_of
from simulator.plan import Batch, Memory, Parallel, Pipeline, Plan, Precision, Runtime

SEQ_LEN = 4096


def case_of(
    *, layers: int | None = 32, model: str | None = "llama3-8b", global_batch: int = 64, micro_batch: int = 1, schedule: str = "1f1b",
    partition: tuple[int, ...] | None = None, memory: dict[str, Any] | None = None, precision: dict[str, Any] | None = None,
    runtime: dict[str, Any] | None = None, **parallel: Any,
) -> Case:  # fmt: skip
    """A bf16 case: tp, pp and so on by name, other sections as tables."""
    plan = Plan(
        parallel=Parallel(**parallel),
        batch=Batch(global_batch=global_batch, micro_batch=micro_batch),
        pipeline=Pipeline(schedule=schedule, partition=partition),
        memory=Memory(**(memory or {})),
        precision=Precision(**({"compute": "bf16"} | (precision or {}))),
        runtime=Runtime(**(runtime or {})),
    )
    resolved = resolved_plan(plan, seq_len=SEQ_LEN)
    return Case(plan=resolved, layers=layers, model=model, order=order_of(resolved) if resolved.parallel.pp > 1 else None)


def without_seq_len(case: Case) -> Case:
    """The case of a plan whose model is unknown: nothing gives the tokens of a sample."""
    return replace(case, plan=replace(case.plan, batch=replace(case.plan.batch, seq_len=None)), layers=None, model=None)
