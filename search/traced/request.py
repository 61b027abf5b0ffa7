"""What a user asks of a search over several devices for a model that is traced, checked. Imports no torch."""

from __future__ import annotations

from dataclasses import dataclass

from hardware_models.errors import InputError
from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from search.search_request import SPLIT_BATCH
from search.study_key import fingerprint, study_text
from search.trainers import Trainer
from simulator.model_source import ModelSource
from simulator.parallel.check_traced import COMPUTE
from simulator.precision import PRODUCTS_IN, STORED_AS

ALLOWABLE = (SPLIT_BATCH, *(name for name in COMPUTE if name not in {"fp32", "fp16"}))
"""``split-batch``: micro-batches of a model that mixes samples (BatchNorm then sees these); the others compute products in fewer bits."""
TRAINERS = ("any",)
"""Whose limits a traced model may keep to: torch runs any module, the others build their own transformers."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TracedRequest:
    """What is asked for; everything else is found."""

    source: ModelSource
    """Of a model that is traced, at ``global_batch``."""
    cluster: Cluster
    """With exactly the devices to use."""
    device: DeviceProfile
    """Theirs."""
    global_batch: int
    computes: tuple[str, ...]
    """Number formats that the user allows for products, the model's own first."""
    budget_bytes: int | None = None
    """Most bytes allocated on a device; None: what it has."""
    splits_batch: bool = False
    """Whether a replica's share of the batch is split where the model mixes samples."""

    @property
    def room_bytes(self) -> int:
        """Most bytes of live tensors on a device."""
        room = self.device.memory_bytes - self.device.context_bytes
        return room if self.budget_bytes is None else min(self.budget_bytes, room)

    @property
    def text(self) -> str:
        """All that decides the answer; studies of the same text are one."""
        return study_text(
            self.source.name, fingerprint(self.source.workload(1)), self.source.seq_len, self.global_batch, self.cluster, fingerprint(self.device), self.computes,
            self.budget_bytes, self.splits_batch,
        )  # fmt: skip


def traced_request(
    source: ModelSource, cluster: Cluster, device: DeviceProfile, trainer: Trainer, *, global_batch: int, allow: tuple[str, ...] = (),
    budget_bytes: int | None = None,
) -> TracedRequest:  # fmt: skip
    """The request.

    Args:
        source: a model that is traced.
        cluster: with exactly the devices to use.
        device: their profile.
        trainer: whose limits hold.
        global_batch: samples per step.
        allow: of `ALLOWABLE`.
        budget_bytes: most that may be allocated on a device; None: what it has.

    Raises:
        InputError: names what cannot be, and what would do.
    """
    if trainer.name not in TRAINERS:
        rule = f"{trainer.name} trains transformers that it builds itself, and {source.name} is a module of its own"
        raise InputError(source="--trainer", key="", value=trainer.name, rule=rule, remedy=f"take {' or '.join(TRAINERS)}")
    for name in allow:
        if name not in ALLOWABLE:
            rule = f"known for a traced model over several devices are {', '.join(ALLOWABLE)}"
            raise InputError(source="--allow", key="", value=name, rule=rule)
    computes = tuple(dict.fromkeys((source.precision, *(name for name in allow if name != SPLIT_BATCH))))
    for name in computes:
        device.peak(PRODUCTS_IN.get(name, STORED_AS[name]))
    return TracedRequest(
        source=source, cluster=cluster, device=device, global_batch=global_batch, computes=computes, budget_bytes=budget_bytes,
        splits_batch=SPLIT_BATCH in allow,
    )  # fmt: skip
