"""Which sequence a plan for one device means: its own rule, or the solver's answer where it says ``optimal``."""

from __future__ import annotations

from hardware_models.profile import DeviceProfile
from search.device.device_solver import DeviceSolver
from search.recompute import RecomputeSolver
from simulator.host_schedule import host_shares
from simulator.plan import Plan
from simulator.recompute import check_no_exceptions, operations_of
from simulator.sequence import Operation
from simulator.simulate import step_setting
from simulator.workload import Workload


def optimal_recompute(plan: Plan, workload: Workload, device: DeviceProfile) -> tuple[Operation, ...]:
    """The sequence that ``recompute = "optimal"`` stands for beside the plan's fractions on the host: the fastest that is found within ``memory.budget_bytes``, else the device's memory.

    Raises:
        InfeasibleError: no sequence fits.
        InputError: the plan sets the recompute of single blocks too, or sends something to a host whose link is not known.
    """
    check_no_exceptions(plan)
    shares = host_shares(plan, len(workload.blocks))
    budget = plan.memory.budget_bytes or device.memory_bytes - device.context_bytes
    recompute = RecomputeSolver(workload, device, step_setting(plan, len(workload.blocks)))
    return DeviceSolver(recompute, ("recompute",)).best_beside(budget, shares).operations


def sequence_of(plan: Plan, workload: Workload, device: DeviceProfile, **options: object) -> tuple[Operation, ...]:
    """The sequence of any plan: the plan's own rule, or the solver's answer where it says ``optimal``."""
    if plan.memory.recompute == "optimal":
        return optimal_recompute(plan, workload, device)
    return operations_of(plan, workload, **options)  # type: ignore[arg-type]
