"""Why a plan wins: what each of its decisions brings against an expert's plan, one change at a time, and the way from one to the other."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from hardware_models.errors import InfeasibleError, InputError
from simulator.plan import Plan

DECISIONS: Mapping[str, tuple[str, ...]] = MappingProxyType(
    {
        "degrees": ("parallel.tp", "parallel.pp", "parallel.dp", "parallel.cp", "parallel.ep", "parallel.dp_shard"),
        "sequence parallelism": ("parallel.sequence_parallel",),
        "pipeline order": ("pipeline.schedule", "parallel.virtual_stages", "pipeline.chimera_mode", "pipeline.memory_limit"),
        "partition": ("pipeline.partition",),
        "micro-batch": ("batch.micro_batch",),
        "ZeRO stage": ("memory.zero_stage",),
        "placement": ("parallel.order",),
        "context parallelism": ("parallel.cp_method",),
        "recompute": ("memory.recompute", "memory.block"),
        "offload": (
            "memory.activation_offload", "memory.weight_offload", "memory.grad_offload", "memory.optimizer_offload", "memory.offload_target", "memory.delayed_update"
        ),
        "precision": ("precision.compute", "precision.grads", "precision.comm", "precision.optimizer"),
        "overlap": (
            "runtime.overlap_tp", "runtime.overlap_grad_reduce", "runtime.overlap_param_gather", "runtime.bucket_bytes", "runtime.prefetch_blocks", "runtime.optimizer_sync"
        ),
        "kernels": ("runtime.flash_attention", "runtime.compile", "runtime.cuda_graphs"),
    }
)  # fmt: skip
"""Keys of a plan that are decided together."""
GIVEN = frozenset({"batch.global_batch", "batch.seq_len", "memory.budget_bytes", "precision.master", "runtime.framework"})
"""Keys of a plan that the request gives."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a plan is judged by."""

    step_time_s: float
    fits: bool


Predict = Callable[[Plan], Forecast]


@dataclass(frozen=True, slots=True, kw_only=True)
class Contribution:
    """One decision in which the winner and the expert differ."""

    decision: str
    ours: str
    theirs: str
    step_time_s: float | None
    """Of our plan with the expert's decision; None: there is no such plan, or it does not fit."""
    reason: str
    """Why there is none; empty where there is one."""

    def to_json(self, best_s: float) -> dict[str, object]:
        """Its fields, and what it brings where our plan takes ``best_s``."""
        return {
            "decision": self.decision, "ours": self.ours, "theirs": self.theirs, "step_time_s": self.step_time_s, "brings": self.brings(best_s), "reason": self.reason
        }  # fmt: skip

    def brings(self, best_s: float) -> float | None:
        """Part of the step's time that the decision saves: time without it over time with it, less 1."""
        return None if self.step_time_s is None else self.step_time_s / best_s - 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One step on the way from the expert's plan to ours."""

    decisions: tuple[str, ...]
    """One; several where no single one of those that are left gives a plan that exists and fits."""
    theirs: str
    ours: str
    before_s: float
    after_s: float

    @property
    def brings(self) -> float:
        """Part of the step's time that the change saves: time before over time after, less 1."""
        return self.before_s / self.after_s - 1.0

    def to_json(self) -> dict[str, object]:
        """Its fields, and what it brings."""
        return {
            "decisions": list(self.decisions), "theirs": self.theirs, "ours": self.ours, "before_s": self.before_s, "after_s": self.after_s, "brings": self.brings
        }  # fmt: skip


def differing(one: Plan, other: Plan) -> tuple[str, ...]:
    """Decisions in which two plans differ."""
    return tuple(
        decision for decision, keys in DECISIONS.items() if any(_value(one, key) != _value(other, key) for key in keys)
    )


def contributions(best: Plan, expert: Plan, predict: Predict) -> tuple[Contribution, ...]:
    """What our plan loses when a single decision is the expert's.

    **Not modelled**: decisions that only pay together; the sum of the parts is not the whole.

    Args:
        best: the plan that won.
        expert: the plan that it is set against.
        predict: the step time of a plan, and whether it fits.
    """
    return tuple(_contribution(decision, best, expert, predict) for decision in differing(best, expert))


def changes(best: Plan, expert: Plan, predict: Predict) -> tuple[Change, ...]:
    """The way from the expert's plan to ours, one decision after the other: each time the one that saves most, so that what all of them bring multiplies to the whole.

    Only plans that exist and fit are on the way; where no single decision leads to one, those that are left are taken together. The expert's own plan need not fit.

    Args:
        best: the plan that won.
        expert: where the way begins.
        predict: the step time of a plan, and whether it fits.
    """
    plan, left, found = expert, list(differing(best, expert)), []
    before_s, best_s = predict(expert).step_time_s, predict(best).step_time_s
    while left:
        tried = {decision: _time_of(plan, best, decision, predict) for decision in left} if len(left) > 1 else {}
        known = {decision: seconds for decision, seconds in tried.items() if seconds is not None}
        taken = (min(known, key=lambda decision: known[decision]),) if known else tuple(left)
        after_s = known[taken[0]] if known else best_s
        found.append(
            Change(decisions=taken, theirs=_texts(plan, taken), ours=_texts(best, taken), before_s=before_s, after_s=after_s)
        )
        plan, before_s, left = _exchanged(plan, best, taken), after_s, [decision for decision in left if decision not in taken]
    return tuple(found)


def _contribution(decision: str, best: Plan, expert: Plan, predict: Predict) -> Contribution:
    keys, seconds, reason = DECISIONS[decision], None, ""
    try:
        found = predict(_exchanged(best, expert, (decision,)))
    except (InputError, InfeasibleError) as error:
        reason = str(error)
    else:
        seconds, reason = (found.step_time_s, "") if found.fits else (None, "does not fit")
    return Contribution(
        decision=decision, ours=_text(best, keys), theirs=_text(expert, keys), step_time_s=seconds, reason=reason
    )


def _time_of(plan: Plan, other: Plan, decision: str, predict: Predict) -> float | None:
    """Seconds of a plan with another one's decision; None where there is no such plan, or it does not fit."""
    try:
        found = predict(_exchanged(plan, other, (decision,)))
    except (InputError, InfeasibleError):
        return None
    return found.step_time_s if found.fits else None


def _exchanged(plan: Plan, other: Plan, decisions: tuple[str, ...]) -> Plan:
    """The plan with another one's values of some decisions.

    Raises:
        InputError: they break a rule of plans.
    """
    sections: dict[str, dict[str, object]] = {}
    for key in (key for decision in decisions for key in DECISIONS[decision]):
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = _value(other, key)
    changed = {section: replace(getattr(plan, section), **values) for section, values in sections.items()}
    return replace(plan, **changed)


def _value(plan: Plan, key: str) -> object:
    section, name = key.split(".")
    found: object = getattr(getattr(plan, section), name)
    return found


def _texts(plan: Plan, decisions: tuple[str, ...]) -> str:
    return "; ".join(_text(plan, DECISIONS[decision]) for decision in decisions)


def _text(plan: Plan, keys: tuple[str, ...]) -> str:
    values = {key.split(".")[1]: _value(plan, key) for key in keys}
    if "block" in values:
        blocks = plan.memory.block
        return str(values["recompute"]) + (f" and {len(blocks)} exceptions" if blocks else "")
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
