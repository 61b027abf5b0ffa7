"""Inner decisions of a point: what may be recomputed, and what may live on the host, in the order in which a search tries them."""

from __future__ import annotations

from collections.abc import Iterator
from itertools import product

from search.trainers import Trainer
from simulator.plan import Memory, Plan

_NONE, _HALF, _WHOLE = 0.0, 0.5, 1.0
_PARAMETERS_SHARDED = 3
"""ZeRO's stage."""


def memory_variants(trainer: Trainer, plan: Plan) -> Iterator[Memory]:
    """Ways to save memory that the trainer's table allows, the plain one first; the ZeRO stage and the budget are the plan's.

    With ``optimal`` each stage recomputes what its own rank's memory asks for (`search.stage_recompute`), so that it stands for none, selective and full
    where the trainer runs any mixture. Weights and optimizer states leave as whole classes, activations by half too.

    Args:
        trainer: whose limits hold.
        plan: the point's.
    """
    recomputes = ("none", "optimal") if "optimal" in trainer.recomputes else trainer.recomputes
    for states, activations, weights, recompute in product(
        _amounts(trainer, "optimizer_offload", (_NONE, _WHOLE)), _amounts(trainer, "activation_offload", (_NONE, _HALF, _WHOLE)),
        _amounts(trainer, "weight_offload", (_NONE, _WHOLE)), recomputes,
    ):  # fmt: skip
        if recompute == "optimal" and (activations or weights):
            continue  # refused so far: how much to recompute beside offload is another problem
        together = "grad_offload" in trainer.offloads and "activation_offload" not in trainer.offloads
        gradients = states if together or plan.memory.zero_stage == _PARAMETERS_SHARDED else _NONE
        yield Memory(
            zero_stage=plan.memory.zero_stage, budget_bytes=plan.memory.budget_bytes, recompute=recompute, optimizer_offload=states,
            activation_offload=activations, weight_offload=weights, grad_offload=gradients if "grad_offload" in trainer.offloads else _NONE,
        )  # fmt: skip


def _amounts(trainer: Trainer, name: str, amounts: tuple[float, ...]) -> tuple[float, ...]:
    return amounts if name in trainer.offloads else (_NONE,)
