"""What a user asks of a search on one device: model, batch, budget, objective, and what may be changed or used."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Literal

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.profile import DeviceProfile
from search.device.host_cells import TECHNIQUES, Technique
from search.study_key import fingerprint, study_text
from simulator.lower_host import host_lanes
from simulator.model_source import SIMULATED_PRECISIONS, TRACED_PRECISIONS, ModelSource
from simulator.plan import Batch, Plan, Precision
from simulator.plan_sections import ComputePrecision
from simulator.precision import PRODUCTS_IN, STORED_AS

Objective = Literal["time", "memory", "cost", "pareto"]
OBJECTIVES: tuple[Objective, ...] = ("time", "memory", "cost", "pareto")
SPLIT_BATCH = "split-batch"
PRECISIONS: tuple[ComputePrecision, ...] = ("tf32", "bf16")
ALLOWABLE = (SPLIT_BATCH, *PRECISIONS)
"""What a user may allow: ``split-batch`` splits the batch of a model that mixes samples (BatchNorm then sees micro-batches); a precision computes products in it."""
WITHIN = 0.05
"""Of the best time found, that the least memory may take more."""


@dataclass(frozen=True, slots=True, kw_only=True)
class SearchRequest:
    """What is asked for; everything else is found."""

    model: ModelSource
    device: DeviceProfile
    global_batch: int
    budget_bytes: int
    """Most bytes allocated on the device."""
    objective: Objective = "time"
    allow: tuple[str, ...] = ()
    optimizer: str = "adamw"
    techniques: tuple[Technique, ...] = ()
    """What may save memory beside smaller micro-batches; empty: all that the device can (`usable_techniques`)."""
    within: float = WITHIN
    """Of the best time, that the least memory may take more; infinite: as long as it takes."""

    def __post_init__(self) -> None:
        if self.global_batch < 1:
            raise InputError(source="--global-batch", key="", value=self.global_batch, rule="global_batch >= 1 must hold")
        if not self.within >= 0.0:
            raise InputError(source="--within", key="", value=self.within, rule="within >= 0 must hold")
        for name in self.allow:
            if name not in ALLOWABLE:
                raise InputError(source="--allow", key="", value=name, rule=f"known are {', '.join(ALLOWABLE)}")
            if name != SPLIT_BATCH:
                self._check_precision(name)
        for technique in self.techniques:
            if technique not in TECHNIQUES:
                raise UnknownNameError(source="techniques", key="", value=technique, known=TECHNIQUES)

    def _check_precision(self, name: str) -> None:
        known = TRACED_PRECISIONS if self.model.config is None else SIMULATED_PRECISIONS
        if name not in known:
            rule = f"{self.model.name} is generated on one device, in {', '.join(known)} only"
            raise InputError(
                source="--allow", key="", value=name, rule=rule, remedy="name a model that is traced, or take a cluster"
            )
        self.device.peak(PRODUCTS_IN.get(name, STORED_AS[name]))

    @property
    def used_techniques(self) -> tuple[Technique, ...]:
        """What may save memory."""
        return self.techniques or usable_techniques(self.device)[0]

    @property
    def precisions(self) -> tuple[ComputePrecision, ...]:
        """Number formats of products: the model's own, then what is allowed."""
        return tuple(dict.fromkeys((self.model.precision, *(name for name in self.allow if name != SPLIT_BATCH))))  # type: ignore[arg-type]

    def source_in(self, precision: ComputePrecision) -> ModelSource:
        """The model in a number format."""
        if precision == self.model.precision:
            return self.model
        batch = Batch(global_batch=self.model.batch, seq_len=self.model.seq_len)
        return self.model.with_plan_batch(Plan(batch=batch, precision=Precision(compute=precision)))

    def micro_batches(self) -> Iterator[int]:
        """Divisors of the batch, largest first; the whole batch alone for a model that mixes samples, unless splitting is allowed."""
        whole = self.global_batch
        yield whole
        if self.model.workload(whole).mixes_samples and SPLIT_BATCH not in self.allow:
            return
        yield from (size for size in range(whole - 1, 0, -1) if whole % size == 0)

    @property
    def text(self) -> str:
        """All that decides the answer; studies of the same text are one."""
        return study_text(
            self.model.name, fingerprint(self.model.workload(self.global_batch)), self.model.seq_len, self.model.precision, fingerprint(self.device),
            self.global_batch, self.budget_bytes, self.objective, self.allow, self.optimizer, self.used_techniques,
            self.within if self.objective == "memory" else math.nan,
        )  # fmt: skip


def usable_techniques(device: DeviceProfile) -> tuple[tuple[Technique, ...], str]:
    """What may save memory on a device, and why not all of it.

    A CPU is its own host: what goes there stays in the same memory.
    """
    if device.kind == "cpu":
        return ("recompute",), "a CPU is its own host"
    try:
        host_lanes(device)
    except InputError as error:
        return ("recompute",), str(error)
    return TECHNIQUES, ""
