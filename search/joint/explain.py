"""Why a plan wins: what each of its decisions brings against an expert's plan, one change at a time."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType

from hardware_models.errors import InfeasibleError, InputError
from simulator.plan import Plan

DECISIONS = MappingProxyType(
    {
        "degrees": ("parallel.tp", "parallel.pp", "parallel.dp", "parallel.cp", "parallel.ep", "parallel.dp_shard"),
        "pipeline order": ("pipeline.schedule", "parallel.virtual_stages", "pipeline.chimera_mode", "pipeline.memory_limit"),
        "partition": ("pipeline.partition",),
        "micro-batch": ("batch.micro_batch",),
        "ZeRO stage": ("memory.zero_stage",),
        "placement": ("parallel.order",),
        "context parallelism": ("parallel.cp_method",),
        "recompute": ("memory.recompute", "memory.block"),
        "offload": ("memory.activation_offload", "memory.weight_offload", "memory.grad_offload", "memory.optimizer_offload", "memory.offload_target"),
        "precision": ("precision.compute", "precision.grads", "precision.comm", "precision.optimizer"),
        "overlap": ("runtime.overlap_tp", "runtime.overlap_grad_reduce", "runtime.overlap_param_gather", "runtime.bucket_bytes", "runtime.prefetch_blocks"),
    }
)  # fmt: skip
"""Keys of a plan that are decided together."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Forecast:
    """What a plan is judged by."""

    step_time_s: float
    fits: bool


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


def contributions(best: Plan, expert: Plan, predict: Callable[[Plan], Forecast]) -> tuple[Contribution, ...]:
    """What our plan loses when a single decision is the expert's.

    **Not modelled**: decisions that only pay together; the sum of the parts is not the whole.

    Args:
        best: the plan that won.
        expert: the plan that it is set against.
        predict: the step time of a plan, and whether it fits.
    """
    return tuple(
        _contribution(decision, keys, best, expert, predict)
        for decision, keys in DECISIONS.items()
        if _text(best, keys) != _text(expert, keys)
    )


def _contribution(
    decision: str, keys: tuple[str, ...], best: Plan, expert: Plan, predict: Callable[[Plan], Forecast]
) -> Contribution:
    seconds, reason = None, ""
    try:
        found = predict(_exchanged(best, expert, keys))
    except (InputError, InfeasibleError) as error:
        reason = str(error)
    else:
        seconds, reason = (found.step_time_s, "") if found.fits else (None, "does not fit")
    return Contribution(
        decision=decision, ours=_text(best, keys), theirs=_text(expert, keys), step_time_s=seconds, reason=reason
    )


def _exchanged(best: Plan, expert: Plan, keys: tuple[str, ...]) -> Plan:
    """The best plan with the expert's values of some keys."""
    sections: dict[str, dict[str, object]] = {}
    for key in keys:
        section, name = key.split(".")
        sections.setdefault(section, {})[name] = getattr(getattr(expert, section), name)
    changed = {section: replace(getattr(best, section), **values) for section, values in sections.items()}
    return replace(best, **changed)


def _text(plan: Plan, keys: tuple[str, ...]) -> str:
    values = {key.split(".")[1]: getattr(getattr(plan, key.split(".")[0]), key.split(".")[1]) for key in keys}
    if "block" in values:
        blocks = values.pop("block")
        return str(values["recompute"]) + (f" and {len(blocks)} exceptions" if blocks else "")
    return ", ".join(f"{name} {value}" for name, value in values.items() if value is not None)
