"""A step time that no plan of a cell is below: recompute against what the link to the host can carry."""

from __future__ import annotations

from functools import cached_property

import numpy as np

from search.device.host_cells import HostBytes, HostCell
from search.recompute import RecomputeSolver
from search.step_evaluator import StepEvaluator
from simulator.lower import optimizer_pass
from simulator.lower_host import HostLanes

OFFLOAD_STEPS = 48
"""Amounts of offloaded activations between none and all at which the bound is taken."""


class DeviceBound:
    """Bounds of one workload's cells.

    Args:
        evaluator: of the workload.
        solver: its recompute problem.
        lanes: the way to the host; None where nothing may go there.
        activations: whether activations may.

    **Model**: let a plan send X bytes of activations of each of n micro-batches to the host. The same sequence with X bytes more memory needs none of that, so that its passes
    take at least R(m + X), the chain's least time in the memory m that the cell leaves at most. The link must bring X in and out n times beside what parameters and gradients
    move: at the moment at which they all are away they have gone before and come back after. The host's updates follow the first gradient of the last micro-batch::

        T >= min over X of max(n R(m + X) + update on the device, n X / rate out + n X / rate in, bytes in / rate in, bytes out / rate out, both / rate of both)
        T >= (n - 1) least micro-batch + least forward + update on the host

    R falls and the traffic grows with X, so that between two amounts the bound takes R of the larger and the traffic of the smaller.

    **Source**: ours, after the bound of `search.solvers.offload_solver`; R is `search.chain_solver`'s, its memory raised by all that the chain problem can overstate.

    **Not modelled**: latencies, slow-down of kernels beside copies, memory that copies under way take: all of them only add. Schedules that are not memory-persistent.
    """

    def __init__(
        self, evaluator: StepEvaluator, solver: RecomputeSolver, lanes: HostLanes | None, *, activations: bool
    ) -> None:
        self.evaluator, self.solver, self.lanes = evaluator, solver, lanes
        self._activations = activations and lanes is not None
        setting = evaluator.setting
        self.host = HostBytes(evaluator.workload, num_microbatches=setting.num_microbatches, optimizer=setting.optimizer)

    def lower_bound_s(self, budget_bytes: int, cell: HostCell) -> float:
        """Seconds that no plan of a cell within the budget is below."""
        if self.lanes is None or (not self._activations and cell == HostCell()):
            return self.solver.lower_bound_s(budget_bytes)
        room = budget_bytes + self.host.most_freed_bytes(cell) + self.host.most_gradients_freed_bytes(cell)
        sent = np.linspace(0.0, self._most_sent_bytes, OFFLOAD_STEPS) if self._activations else np.zeros(1)
        passes_s = self.solver.passes_bounds_s(room + sent.astype(np.int64))
        step_s = passes_s + self._device_update_s(cell.optimizer_high)
        links_s = np.array([self._links_s(amount, cell) for amount in sent])
        if len(sent) > 1:
            step_s = np.append(step_s[1:], step_s[-1])
        return float(max(np.maximum(step_s, links_s).min(), self._host_update_bound_s(cell)))

    def _links_s(self, sent_bytes: float, cell: HostCell) -> float:
        """Least seconds in which the link moves what a cell asks for and so many bytes of activations of each micro-batch."""
        assert self.lanes is not None
        traffic, moved = self.host.least_traffic(cell), self.evaluator.setting.num_microbatches * sent_bytes
        into, out = traffic.in_bytes + moved, traffic.out_bytes + moved
        lanes = self.lanes
        one_way = (into / lanes.to_device_bytes_per_s, out / lanes.to_host_bytes_per_s, (into + out) / lanes.both_bytes_per_s)
        return max(*one_way, moved / lanes.to_device_bytes_per_s + moved / lanes.to_host_bytes_per_s)

    def _host_update_bound_s(self, cell: HostCell) -> float:
        """The host begins once the first gradient of the last micro-batch is there, after that micro-batch's forward passes."""
        assert self.lanes is not None
        updated = self.host.least_traffic(cell).updated_bytes
        if not updated:
            return 0.0
        count = self.evaluator.setting.num_microbatches
        before_s = self.solver.least_passes_s * (count - 1) / count + self.solver.least_forward_s
        return before_s + updated / self.lanes.update_bytes_per_s

    def _device_update_s(self, most_hosted: float) -> float:
        """Least time of the device's part of the optimizer's step: the tensors of most seconds a byte, up to the fraction's bytes, are the host's."""
        seconds, sizes = self._update_kernels
        order = np.argsort(-seconds / sizes, kind="stable")
        before = np.concatenate(([0.0], np.cumsum(sizes[order])))[:-1]
        taken = np.clip((most_hosted * sizes.sum() - before) / sizes[order], 0.0, 1.0)
        return float((seconds[order] * (1.0 - taken)).sum())

    @cached_property
    def _update_kernels(self) -> tuple[np.ndarray, np.ndarray]:
        """Seconds and elements of each parameter's update."""
        run = optimizer_pass(self.evaluator.workload, optimizer=self.evaluator.setting.optimizer)
        elements = np.array([kernel.shape[0] for kernel in run.kernels], np.float64)
        return np.diff(self.evaluator.prices.offsets(run)), elements

    @cached_property
    def _most_sent_bytes(self) -> float:
        """All that a micro-batch's graphs and boundaries hold."""
        blocks = self.evaluator.workload.blocks
        kept = sum(max(option.saved_internal_bytes for option in block.options) + block.output_bytes for block in blocks)
        return float(kept)
