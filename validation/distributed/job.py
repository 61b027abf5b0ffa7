"""What a process of a replay is told to do, and what rank 0 says of all when it is done."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from simulator.model_source import ModelSource, model_source
from simulator.pipeline.action import Order
from simulator.plan import Plan
from simulator.sequence import Operation
from simulator.timeline import Span
from validation.measure import StepTimes
from validation.session import GradientsMatch

DEFAULT_TIMEOUT_S = 600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Job:
    """A replay over several processes; each gets the same."""

    model: str
    batch: int | None
    """Samples of a step over all replicas; None: the model's."""
    seq_len: int | None
    plan: Plan
    """With its batch resolved."""
    order: Order
    """Of each pipeline."""
    sequence: tuple[Operation, ...] | None
    """Of the whole model's blocks, where the plan names a file."""
    steps: int
    """Timed ones."""
    device: str
    """``cpu`` or ``cuda``."""
    timeout_s: float = DEFAULT_TIMEOUT_S
    """Longest wait for another rank, and longest silence."""
    seed: int = 0

    @property
    def source(self) -> ModelSource:
        """The model."""
        return model_source(self.model, batch=self.batch, seq_len=self.seq_len)


@dataclass(frozen=True, slots=True, kw_only=True)
class RankReport:
    """What one rank measured."""

    rank: int
    peak_bytes: int
    """Live tensor bytes at most; on CUDA what the caching allocator counts."""
    reserved_bytes: int
    resident_bytes: int
    """Before the step."""
    spans: tuple[Span, ...]
    match: GradientsMatch
    num_compared: int
    """Parameters whose gradients were compared."""


@dataclass(frozen=True, slots=True, kw_only=True)
class LinkFacts:
    """How messages between neighbouring processes travel, measured between ranks 0 and 1."""

    latency_s: float
    bytes_per_s: float


@dataclass(frozen=True, slots=True, kw_only=True)
class JobReport:
    """What all ranks measured."""

    times: StepTimes
    """Of a step, from the moment at which all ranks begin to the end of the slowest."""
    ranks: tuple[RankReport, ...]
    link: LinkFacts
    threads: int
    """Of each process."""
    environment: dict[str, Any]
