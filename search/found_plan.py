"""What a search on one device looks at and finds: points of the outer space, and plans."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from search.device.host_cells import HostCell
from search.step_evaluator import Candidate
from simulator.host_schedule import HostShares
from simulator.plan_sections import ComputePrecision
from simulator.sequence import format_sequence, parse_sequence


@dataclass(frozen=True, slots=True, kw_only=True)
class Point:
    """A point of the outer space: what is decided before recompute and activations."""

    micro_batch: int
    precision: ComputePrecision
    cell: HostCell

    @property
    def text(self) -> str:
        """Names the point in the study's storage."""
        return f"micro_batch={self.micro_batch},precision={self.precision},{self.cell.text}"


@dataclass(frozen=True, slots=True, kw_only=True)
class Found:
    """A plan: a candidate at a micro-batch and a precision."""

    micro_batch: int
    precision: ComputePrecision
    candidate: Candidate

    @property
    def recompute(self) -> str:
        """The plan's word for the sequence."""
        return self.candidate.name if self.candidate.name in {"none", "selective", "full"} else "optimal"

    def to_attributes(self) -> dict[str, Any]:
        """As a study keeps it; `from_attributes` reads it back."""
        one, shares = self.candidate, self.candidate.shares
        return {
            "micro_batch": self.micro_batch, "precision": self.precision, "recompute": one.name, "sequence": format_sequence(one.operations),
            "step_time_s": one.step_time_s, "peak_memory_bytes": one.peak_bytes, "host_bytes": one.host_bytes,
            "shares": None if shares is None else [list(shares.activations), list(shares.weights), shares.optimizer],
        }  # fmt: skip

    @classmethod
    def from_attributes(cls, found: dict[str, Any]) -> Found:
        """What `to_attributes` wrote."""
        shares = found["shares"]
        host = (
            None if shares is None else HostShares(activations=tuple(shares[0]), weights=tuple(shares[1]), optimizer=shares[2])
        )
        candidate = Candidate(
            name=str(found["recompute"]), operations=parse_sequence(str(found["sequence"])), shares=host, step_time_s=float(found["step_time_s"]),
            peak_bytes=int(found["peak_memory_bytes"]), host_bytes=int(found["host_bytes"]),
        )  # fmt: skip
        return cls(micro_batch=int(found["micro_batch"]), precision=found["precision"], candidate=candidate)


def rank(found: Found) -> tuple[float, int]:
    """Faster first, then less memory."""
    return found.candidate.step_time_s, found.candidate.peak_bytes


def summary(found: Found) -> dict[str, Any]:
    """What tables and JSON say of a plan."""
    one = found.candidate
    return {
        "micro_batch": found.micro_batch, "precision": found.precision, "recompute": one.name, "step_time_s": one.step_time_s,
        "peak_memory_bytes": one.peak_bytes, **({} if one.shares is None else shares_summary(one.shares)),
    }  # fmt: skip


def shares_summary(shares: HostShares) -> dict[str, float]:
    """Fractions on the host, means over blocks."""
    count = len(shares.activations)
    return {
        "activation_offload": sum(shares.activations) / count, "weight_offload": sum(shares.weights) / count, "optimizer_offload": shares.optimizer,
    }  # fmt: skip
