"""Tiny joint requests at random, and their optimum by brute force through the reference engine.

`python -m tests.search.joint.tiny_instances --bases 400 --seed 7` compares more of them than the tests do.
"""

from __future__ import annotations

import argparse
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.network.cluster_file import load_cluster
from hardware_models.profile import DeviceProfile
from search.joint.joint_search import JointResult, joint_search
from search.joint.space import JointRequest, JointSpace, joint_space
from search.stage_recompute import simulate_on_cluster
from search.trainers import TRAINERS, Trainer
from simulator.parallel.simulation import ParallelSimulation
from simulator.plan import Plan
from tests.search.joint.joint_cases import all_plans, device_of, small_config, source_of

MODELS = ("gpt2", "llama3-8b", "mixtral-8x7b")
CLUSTERS = ("dgx-a100-80gb", "hgx-h100")
GPUS = (2, 2, 3, 4, 4, 6, 8)
MOST_PLANS = 48
"""Of a request; those with more are drawn anew."""
BUDGETS = 5
"""Of a request: at random between the least and the most that its plans need, but one that is the need of a plan, and one a byte below it."""
LOOKED_AT = 6
"""Plans whose memory budgets are drawn from."""
SAME = 1e-9
"""Relative difference of equal times: the engines agree to it."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Simulated:
    """A plan whose memory does not follow the budget, with what the reference engine says of it."""

    plan: Plan
    step_time_s: float
    peak_bytes: int


class Base:
    """A request without a budget; what one device runs whole is simulated once for all of its budgets, as neither its recompute nor a cut into stages follows them.

    Args:
        request: with any number of plans.
        device: profile of the cluster's devices.
    """

    def __init__(self, request: JointRequest, device: DeviceProfile) -> None:
        self.request, self.device, self.source = request, device, source_of(request)
        self.known = [
            Simulated(plan=plan, step_time_s=found.step_time_s, peak_bytes=max(found.peak_memory_bytes))
            for plan in all_plans(joint_space(request))
            if not follows_budget(plan) and (found := self._simulated(plan, reserved=False)) is not None
        ]

    def _simulated(self, plan: Plan, *, reserved: bool) -> ParallelSimulation | None:
        """Through the reference engine; None where the simulator refuses the plan, or no sequence of it fits."""
        try:
            return simulate_on_cluster(
                self.source, plan, self.request.cluster, device=self.device, engine="simpy", reserved=reserved
            )
        except (InputError, InfeasibleError):
            return None

    def budgets(self, rng: np.random.Generator, count: int) -> list[int]:
        """Budgets that some plans keep and others break; none where no plan can be simulated."""
        open_plans = [plan for plan in all_plans(joint_space(self.request)) if plan.memory.recompute != "optimal"]
        found = [
            self._simulated(plan, reserved=False) for plan in rng.permutation(np.array(open_plans, dtype=object))[:LOOKED_AT]
        ]
        peaks = sorted({max(one.peak_memory_bytes) for one in found if one is not None})
        if not peaks:
            return []
        between = [int(rng.integers(peaks[0], peaks[-1] + 1)) for _ in range(count - 2)]
        exact = peaks[int(rng.integers(len(peaks)))]
        return [*between, exact, exact - 1]

    def least(self, budget_bytes: int) -> tuple[float, Plan | None]:
        """The least time of all plans that fit a budget, and its plan; infinite where none does.

        Nothing is left out: plans come in order of their times, and the first one that fits with the caching allocator's reserve is the answer.
        """
        request = replace(self.request, budget_bytes=budget_bytes)
        found = [one for one in self.known if one.peak_bytes <= budget_bytes]
        for plan in all_plans(joint_space(request)):
            result = self._simulated(plan, reserved=False) if follows_budget(plan) else None
            if result is not None and max(result.peak_memory_bytes) <= budget_bytes:
                found.append(Simulated(plan=plan, step_time_s=result.step_time_s, peak_bytes=max(result.peak_memory_bytes)))
        for one in sorted(found, key=lambda one: one.step_time_s):
            plan = replace(one.plan, memory=replace(one.plan.memory, budget_bytes=budget_bytes))
            result = self._simulated(plan, reserved=True)
            if result is not None and result.fits:
                return result.step_time_s, plan
        return float("inf"), None

    def searched(self, budget_bytes: int) -> JointResult | None:
        """The certified answer of the joint search; None where it proves that nothing fits.

        Raises:
            AssertionError: an answer without a limit of time is not certified, not legal, or does not fit.
        """
        request = replace(self.request, budget_bytes=budget_bytes)
        try:
            found = joint_search(request, self.source, self.device)
        except InfeasibleError:
            return None
        assert found.certified, f"gap {found.gap}"
        assert found.simulation.fits
        assert max(found.simulation.peak_memory_bytes) <= budget_bytes
        assert found.plan.num_gpus == request.cluster.num_gpus
        return found


def follows_budget(plan: Plan) -> bool:
    """Whether a plan with less memory is another plan."""
    return plan.memory.recompute == "optimal" or plan.num_stages > 1


def subset(rng: np.random.Generator, values: Sequence[object], *, most: int) -> tuple[object, ...]:
    """Some of the values in their order, at least one where there is one."""
    count = min(len(values), int(rng.integers(1, most + 1)))
    return tuple(values[place] for place in sorted(rng.choice(len(values), size=count, replace=False).tolist()))


def some_trainer(rng: np.random.Generator) -> Trainer:
    """A trainer that can do a part of what one of the known ones can; its rules hold."""
    whole = TRAINERS[str(rng.choice(sorted(TRAINERS)))]
    orders = whole.orders or ("tp-cp-ep-dp-pp", "tp-cp-ep-pp-dp", "tp-pp-cp-ep-dp")
    limits = {
        "schedules": subset(rng, [name for name in whole.schedules if not name.startswith("file")], most=3),
        "zero_stages": (0, *subset(rng, whole.zero_stages[1:], most=1)), "zero_stages_pipelined": (0, *subset(rng, whole.zero_stages_pipelined[1:], most=1)),
        "cp_methods": subset(rng, whole.cp_methods, most=1) if rng.random() < 0.3 else (), "recomputes": ("none", *subset(rng, whole.recomputes[1:], most=2)),
        "offloads": subset(rng, whole.offloads, most=2) if whole.name == "any" else whole.offloads, "orders": subset(rng, orders, most=2),
    }  # fmt: skip
    return replace(whole, **limits)  # type: ignore[arg-type]


def some_space(rng: np.random.Generator, most_plans: int) -> JointSpace:
    """A random request with few plans, as a space."""
    while True:
        gpus = int(rng.choice(GPUS))
        config = small_config(str(rng.choice(MODELS)), layers=int(rng.integers(2, 7)))
        batch = gpus * int(rng.choice([1, 2, 2, 4])) if rng.random() < 0.7 else int(rng.integers(1, 13))
        request = JointRequest(
            config=config, seq_len=int(rng.choice([128, 512])), global_batch=batch, cluster=load_cluster(str(rng.choice(CLUSTERS))).with_gpus(gpus),
            trainer=some_trainer(rng),
        )  # fmt: skip
        try:
            space = joint_space(request)
        except InfeasibleError:
            continue
        if 2 <= sum(1 for _ in all_plans(space)) <= most_plans:
            return space


@dataclass(frozen=True, slots=True, kw_only=True)
class Comparison:
    """A request with a budget, answered by both."""

    request: JointRequest
    least_s: float
    """By brute force; infinite where nothing fits."""
    plan: Plan | None
    """That takes it."""
    found: JointResult | None
    """By the search; None where nothing fits."""

    @property
    def agrees(self) -> bool:
        """Whether both say the same."""
        searched_s = self.found.simulation.step_time_s if self.found else float("inf")
        return self.least_s == searched_s or abs(searched_s - self.least_s) <= SAME * self.least_s

    def kinds(self) -> tuple[str, ...]:
        """What the answer makes use of."""
        if self.found is None:
            return ("infeasible",)
        plan = self.found.plan
        memory = plan.memory
        away = memory.optimizer_offload or memory.activation_offload or memory.weight_offload
        used = {
            "pipeline": plan.parallel.pp > 1,
            "recompute": memory.recompute != "none",
            "offload": bool(away),
            "sharding": memory.zero_stage > 0,
        }
        return tuple(name for name, present in used.items() if present)

    def __str__(self) -> str:
        asked, limits = self.request, self.request.trainer
        searched = "infeasible" if self.found is None else f"{self.found.simulation.step_time_s} s by {self.found.plan}"
        given = f"{asked.config.name} on {asked.cluster.num_gpus} of {asked.cluster.name}, batch {asked.global_batch} x {asked.seq_len}, {asked.budget_bytes} bytes"
        allowed = f"{limits.name}: {limits.schedules}, ZeRO {limits.zero_stages} {limits.zero_stages_pipelined}, {limits.recomputes}, {limits.offloads}, {limits.orders}"
        return f"brute force {self.least_s} s by {self.plan}, search {searched}: {given}, {allowed}"


def comparisons(seed: int, bases: int, *, budgets: int = BUDGETS, most_plans: int = MOST_PLANS) -> Iterator[Comparison]:
    """Both answers for some budgets of each of some random requests."""
    rng = np.random.default_rng(seed)
    for _ in range(bases):
        request = some_space(rng, most_plans).request
        base = Base(request, device_of(request))
        for budget in base.budgets(rng, budgets):
            least_s, plan = base.least(budget)
            shown = replace(request, budget_bytes=budget)
            yield Comparison(request=shown, least_s=least_s, plan=plan, found=base.searched(budget))


def main() -> None:
    """Prints where search and brute force differ, and what the answers make use of."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bases", type=int, default=400)
    parser.add_argument("--seed", type=int, default=7)
    arguments = parser.parse_args()
    counts: Counter[str] = Counter()
    for one in comparisons(arguments.seed, arguments.bases):
        counts.update(("instances", *one.kinds(), *(() if one.agrees else ("DIFFERENT",))))
        if not one.agrees:
            print(one, flush=True)  # noqa: T201 - a command
    print(dict(counts))  # noqa: T201


if __name__ == "__main__":
    main()
