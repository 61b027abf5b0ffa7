"""Why a predicted step time differs from the measured one: the instructions compared one by one, and the largest cause named."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from hardware_models.units import MS_PER_S
from simulator.program import Stream
from simulator.simulate import Simulation

BOUND_BY_HOST = 0.9
"""Host seconds over step seconds from which on a GPU's step waits for its kernels to be launched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Cause:
    """The largest part of a difference."""

    name: str
    """``kernel price``, ``dispatch``, ``overlap`` (copies and waits for them), or ``between instructions``."""
    seconds: float
    """Predicted minus measured."""
    instruction: str
    """The kind and block that differ most."""
    parts_s: Mapping[str, float]
    """Predicted minus measured seconds of each cause."""

    @property
    def text(self) -> str:
        """In a table's cell."""
        return f"{self.name} {self.seconds * MS_PER_S:+.1f} ms" + (f" ({self.instruction})" if self.instruction else "")

    def to_json(self) -> dict[str, Any]:
        """As written down."""
        return {"name": self.name, "seconds": self.seconds, "instruction": self.instruction, "parts_s": dict(self.parts_s)}


def compute_seconds(rows: Sequence[Sequence[Any]]) -> dict[str, float]:
    """Seconds on the compute stream by instruction's name; of one name together.

    Args:
        rows: (stream, name, start, end).
    """
    found: dict[str, float] = defaultdict(float)
    for stream, name, start_s, end_s in rows:
        if stream == Stream.COMPUTE.name:
            found[name] += end_s - start_s
    return dict(found)


def predicted_rows(predicted: Simulation) -> list[tuple[str, str, float, float]]:
    """(stream, name, start, end) of every predicted span, in the form of measured ones."""
    return [(span.stream.name, span.name, span.start_s, span.end_s) for span in predicted.timeline.spans]


def instruction_seconds(predicted: Simulation, measured: Mapping[str, Any]) -> dict[str, dict[str, float]]:
    """Predicted and measured seconds of each instruction of the compute stream, by name; empty where they were not measured."""
    if "spans" not in measured:
        return {}
    ours, theirs = compute_seconds(predicted_rows(predicted)), compute_seconds(measured["spans"])
    return {
        name: {"predicted_s": ours.get(name, 0.0), "measured_s": theirs.get(name, 0.0)}
        for name in dict.fromkeys([*ours, *theirs])
    }


def cause_of(predicted: Simulation, measured: Mapping[str, Any]) -> Cause | None:
    """The largest cause of the difference in step time; None where instructions were not measured.

    **Model**: step = seconds inside instructions of the compute stream + seconds between them, both for predicted and measured. Inside: prices of kernels, or
    the host's dispatch where it took about as long as the step. Between: waits for copies where some were made, else the host's own work.

    **Not modelled**: kernels that copies beside them slow down count as their price.
    """
    if "spans" not in measured:
        return None
    rows = predicted_rows(predicted)
    ours, theirs = compute_seconds(rows), compute_seconds(measured["spans"])
    step_s = measured["step_time_s"]["median"]
    end_s = max(row[3] for row in measured["spans"])
    scale = min(1.0, step_s / end_s)  # the step whose spans were taken may have been slower than the median
    inside = {name: ours.get(name, 0.0) - scale * theirs.get(name, 0.0) for name in {*ours, *theirs}}
    between = (predicted.step_time_s - sum(ours.values())) - (step_s - scale * sum(theirs.values()))
    copies = any(row[0] != Stream.COMPUTE.name for row in rows)
    host_bound = predicted.device.kind != "cpu" and measured["host_time_s"]["median"] > BOUND_BY_HOST * step_s
    parts = {
        "dispatch" if host_bound else "kernel price": sum(inside.values()),
        "overlap" if copies else "between instructions": between,
    }
    name = max(parts, key=lambda key: abs(parts[key]))
    worst = max(inside, key=lambda key: abs(inside[key])) if inside and name in {"dispatch", "kernel price"} else ""
    return Cause(name=name, seconds=parts[name], instruction=worst, parts_s=parts)
