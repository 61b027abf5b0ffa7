"""What a suite's archive says beside its predictions: errors of time and memory, their causes, the order of plans, and a folder of results."""

from __future__ import annotations

import json
import zipfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from hardware_models.errors import InputError
from hardware_models.files import whole_file
from hardware_models.profile import DeviceProfile
from hardware_models.units import GIB, MS_PER_S
from simulator.plan_file import write_plan
from simulator.sequence import format_sequence, keep_all
from simulator.simulate import Simulation, simulate, step_setting
from simulator.workload import Workload
from simulator.workload_json import workload_from_json
from validation.bundle import BundleCase
from validation.replay import CASE_FILE, ENVIRONMENT_FILE, WORKLOAD_FILE
from validation.replay_causes import Cause, cause_of, instruction_seconds
from validation.suite_order import PlanOrder, order_table, orders_of


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteRow:
    """One case, measured and, where it is a plan or the plain step, predicted."""

    case: BundleCase
    measured: Mapping[str, Any]
    predicted: Simulation | None
    cause: Cause | None
    slowness: float = 1.0
    """Time of the yardstick beside the steps over that in calibration: how much slower the machine was; 1 where not known (a GPU, whose clocks are in ``state``)."""

    @property
    def model(self) -> str:
        """The part of the name before the colon."""
        return self.case.name.partition(":")[0]

    @property
    def failed(self) -> str:
        """Why it did not run; empty where it did."""
        return str(self.measured.get("failed", "")).partition("\n")[0]

    @property
    def time_error(self) -> float | None:
        """Predicted step time over the measured median, minus 1."""
        return (
            None
            if self.predicted is None or self.failed
            else self.predicted.step_time_s / self.measured["step_time_s"]["median"] - 1
        )

    @property
    def measured_s(self) -> float:
        """Median step time at the speed that the machine had when it was calibrated."""
        return float(self.measured["step_time_s"]["median"]) / self.slowness

    @property
    def paired_error(self) -> float | None:
        """Error of the step time, machine's speed aside."""
        return None if self.predicted is None or self.failed else self.predicted.step_time_s / self.measured_s - 1

    @property
    def memory_error(self) -> float | None:
        """The same of allocated bytes."""
        return (
            None
            if self.predicted is None or self.failed
            else self.predicted.peak_allocated_bytes[0] / self.measured["allocated_bytes"] - 1
        )

    @property
    def reserved_error(self) -> float | None:
        """The same of reserved bytes."""
        return (
            None
            if self.predicted is None or self.failed
            else self.predicted.peak_reserved_bytes[0] / self.measured["reserved_bytes"] - 1
        )

    @property
    def bitwise(self) -> bool | None:
        """Whether loss and gradients are the plain module's on the same micro-batches; None where they were not compared."""
        matches = self.measured.get("gradients_match", ())
        same = [match for match in matches if match["reference"] == "same micro-batches"] or list(matches[:1])
        return bool(same[0]["bitwise"]) if same else None

    def to_json(self) -> dict[str, Any]:
        """One row of ``summary.json``."""
        return {
            "name": self.case.name, "kind": self.case.kind, "failed": self.failed, "time_error": self.time_error, "paired_error": self.paired_error, "slowness": self.slowness, "memory_error": self.memory_error,
            "reserved_error": self.reserved_error, "bitwise": self.bitwise, "cause": None if self.cause is None else self.cause.to_json(),
            "measured_s": None if self.failed else self.measured["step_time_s"]["median"],
            "predicted_s": None if self.predicted is None else self.predicted.step_time_s,
        }  # fmt: skip


def suite_rows(
    cases: Sequence[BundleCase], archive: Path, device: DeviceProfile
) -> tuple[tuple[SuiteRow, ...], dict[str, Any]]:
    """Rows of a bundle's cases in its archive, predicted from what was traced where it ran, and the environment there.

    Raises:
        InputError: no such archive, or one of another bundle.
    """
    if not archive.is_file():
        raise InputError(
            source=str(archive),
            key="",
            value=None,
            rule="no such file",
            remedy="run the bundle: python -m validation.replay BUNDLE --out FILE",
        )
    rows = []
    with zipfile.ZipFile(archive) as files:
        names = set(files.namelist())
        for number, case in enumerate(cases):
            if CASE_FILE.format(number) not in names:
                continue
            measured = json.loads(files.read(CASE_FILE.format(number)))
            if measured["name"] != case.name:
                rule = f"the archive's case {number} is {measured['name']!r}, the bundle's {case.name!r}"
                raise InputError(
                    source=str(archive), key="name", value=measured["name"], rule=rule, remedy="name the bundle that was run"
                )
            traced = WORKLOAD_FILE.format(number)
            workload = workload_from_json(json.loads(files.read(traced))) if traced in names else None
            rows.append(_row(case, measured, workload, device))
        environment: dict[str, Any] = json.loads(files.read(ENVIRONMENT_FILE))
    return tuple(rows), environment


def _row(case: BundleCase, measured: Mapping[str, Any], workload: Workload | None, device: DeviceProfile) -> SuiteRow:
    predicted = None if workload is None or "failed" in measured else predict(case, workload, device)
    cause = None if predicted is None else cause_of(predicted, measured)
    return SuiteRow(case=case, measured=measured, predicted=predicted, cause=cause, slowness=_slowness(measured, device))


def _slowness(measured: Mapping[str, Any], device: DeviceProfile) -> float:
    timed = measured.get("yardstick_s")
    return float(timed["median"]) / device.yardstick_s if timed and device.yardstick_s else 1.0


def predict(case: BundleCase, workload: Workload, device: DeviceProfile) -> Simulation:
    """A case on a device, from the workload of one of its micro-batches."""
    operations = case.operations or keep_all(len(workload.blocks))
    setting = replace(step_setting(case.plan, len(workload.blocks)), num_microbatches=case.batch // workload.micro_batch)
    return simulate(workload, operations, device, setting)


def summary_of(rows: Sequence[SuiteRow]) -> dict[str, Any]:
    """Errors over all rows, and by model how well the order of its plans is known beforehand (`validation.suite_order`)."""
    times = np.abs([row.time_error for row in rows if row.time_error is not None])
    paired = np.array([row.paired_error for row in rows if row.paired_error is not None])
    memory = np.abs([row.memory_error for row in rows if row.memory_error is not None])
    reserved = np.abs([row.reserved_error for row in rows if row.reserved_error is not None])
    compared = [row.bitwise for row in rows if row.bitwise is not None and row.case.kind == "plan"]
    return {
        "num": len(rows), "num_failed": sum(bool(row.failed) for row in rows), "num_predicted": len(times),
        "time": _errors(times), "paired_time": _errors(np.abs(paired)), "paired_bias": float(np.mean(paired)) if len(paired) else None, "allocated": _errors(memory), "reserved": _errors(reserved), "num_compared": len(compared), "num_bitwise": sum(compared),
        "order": [one.to_json() for one in orders(rows)],
    }  # fmt: skip


def _errors(errors: np.ndarray[Any, np.dtype[np.float64]]) -> dict[str, float] | None:
    return (
        {"median": float(np.median(errors)), "p90": float(np.quantile(errors, 0.9)), "max": float(errors.max())}
        if len(errors)
        else None
    )


def orders(rows: Sequence[SuiteRow]) -> tuple[PlanOrder, ...]:
    """Of every model's plans, and of all: by the times measured, which were taken in turn."""
    times: dict[str, list[tuple[float, list[float]]]] = {}
    for row in rows:
        if row.predicted is not None and not row.failed and row.case.kind == "plan":
            times.setdefault(row.model, []).append((row.predicted.step_time_s, row.measured["step_time_s"]["seconds"]))
    return orders_of(times)


def suite_table(rows: Sequence[SuiteRow]) -> str:
    """The rows as a Markdown table."""
    lines = [
        "| step | predicted ms | measured ms (p10, p90) | error | machine's slowness | error without it | allocated GiB: predicted | measured | error | gradients | largest residual |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.failed:
            lines.append(f"| {row.case.name} | | failed: {row.failed[:80]} | | | | | | | | |")
            continue
        times = row.measured["step_time_s"]
        measured = f"{times['median'] * MS_PER_S:.1f} ({times['p10'] * MS_PER_S:.1f}, {times['p90'] * MS_PER_S:.1f})"
        allocated = f"{row.measured['allocated_bytes'] / GIB:.4f}"
        gradients = (
            ""
            if row.bitwise is None
            else "bitwise"
            if row.bitwise
            else f"rel {row.measured['gradients_match'][0]['max_rel']:.0e}"
        )
        if row.predicted is None:
            lines.append(f"| {row.case.name} | | {measured} | | {row.slowness:.2f} | | | {allocated} | | {gradients} | |")
            continue
        lines.append(
            f"| {row.case.name} | {row.predicted.step_time_s * MS_PER_S:.1f} | {measured} | {row.time_error:+.1%} | {row.slowness:.2f} | {row.paired_error:+.1%} "
            f"| {row.predicted.peak_allocated_bytes[0] / GIB:.4f} | {allocated} | {row.memory_error:+.2%} | {gradients} "
            f"| {'' if row.cause is None else row.cause.text} |"
        )
    return "\n".join(lines) + "\n"


def memory_table(rows: Sequence[SuiteRow]) -> str:
    """Memory of every predicted step as a Markdown table: a row a rank (the suite runs on one device, which is rank 0); GiB."""
    lines = [
        "| step | rank | allocated: predicted | measured | error | reserved: predicted | measured | error | on the host: predicted | measured |",
        "|---|---|---|---|---|---|---|---|---|---|",
    ]
    for row in rows:
        if row.failed or row.predicted is None:
            continue
        found = row.predicted
        for rank, (allocated, reserved) in enumerate(zip(found.peak_allocated_bytes, found.peak_reserved_bytes, strict=True)):
            lines.append(
                f"| {row.case.name} | {rank} | {allocated / GIB:.4f} | {row.measured['allocated_bytes'] / GIB:.4f} | {row.memory_error:+.2%} | {reserved / GIB:.4f} "
                f"| {row.measured['reserved_bytes'] / GIB:.4f} | {row.reserved_error:+.2%} | {found.peak_host_bytes / GIB:.4f} | {row.measured['host_bytes'] / GIB:.4f} |"
            )
    return "\n".join(lines) + "\n"


def write_results(rows: Sequence[SuiteRow], environment: Mapping[str, Any], device: DeviceProfile, out: Path) -> dict[str, Any]:
    """Writes plans, predicted, measured (also instruction by instruction), environment, summary and table into a folder; the summary."""
    summary = summary_of(rows) | {"device": device.name, "provenance": device.provenance}
    for row in rows:
        if row.case.kind == "plan":
            name = "".join(letter if letter.isalnum() else "-" for letter in row.case.name)
            memory = replace(row.case.plan.memory, recompute=f"file:{name}.seq")
            (out / "plans").mkdir(parents=True, exist_ok=True)
            write_plan(replace(row.case.plan, memory=memory), out / "plans" / f"{name}.toml")
            (out / "plans" / f"{name}.seq").write_text(format_sequence(row.case.operations), encoding="utf-8")
    tables = {
        "environment.json": environment, "summary.json": summary | {"rows": [row.to_json() for row in rows]},
        "measured.json": [{key: value for key, value in row.measured.items() if key != "spans"} for row in rows],
        "instructions.json": {row.case.name: instruction_seconds(row.predicted, row.measured) for row in rows if row.predicted is not None},
        "predicted.json": {row.case.name: row.predicted.to_json() for row in rows if row.predicted is not None},
    }  # fmt: skip
    for name, table in tables.items():
        with whole_file(out / name) as temporary:
            temporary.write_text(json.dumps(table, indent=1), encoding="utf-8")
    for name, text in {
        "table.md": suite_table(rows),
        "memory.md": memory_table(rows),
        "order.md": order_table(orders(rows)),
    }.items():
        with whole_file(out / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return summary
