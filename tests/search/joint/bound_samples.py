"""Bounds beside simulated steps on random points of many spaces.

`python -m tests.search.joint.bound_samples --plans 10000` checks more of them than the tests do.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterator
from dataclasses import dataclass, replace

import numpy as np

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InfeasibleError, InputError
from hardware_models.network.cluster_file import load_cluster
from search.joint.bounded_space import bounded_space
from search.joint.layer_tables import LayerTables
from search.joint.memory_variants import memory_variants
from search.joint.space import JointRequest, joint_space
from search.joint.step_bounds import StepBounds
from search.stage_recompute import simulate_on_cluster
from search.trainers import TRAINERS
from simulator.model_source import ModelSource
from simulator.plan import Plan
from simulator.presets import preset

ROUNDING = 1e-9
"""Relative slack of a bound: sums in another order."""
MOST_DRAWN = 10
"""Points drawn for each plan asked for: most plans of a large space do not fit."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A request to draw points of."""

    model: str
    cluster: str
    gpus: int
    batch: int
    seq_len: int
    trainer: str = "any"
    layers: int | None = None
    """In place of the model's."""

    def request(self) -> JointRequest:
        """As a search asks it."""
        config = preset(self.model)
        return JointRequest(
            config=replace(config, layers=self.layers or config.layers), seq_len=self.seq_len, global_batch=self.batch,
            cluster=load_cluster(self.cluster).with_gpus(self.gpus), trainer=TRAINERS[self.trainer],
        )  # fmt: skip


SMALL = (
    Setting(model="gpt2", cluster="dgx-a100-80gb", gpus=4, batch=8, seq_len=128, layers=4),
    Setting(model="gpt2", cluster="hgx-h100", gpus=6, batch=12, seq_len=512, trainer="pytorch", layers=6),
    Setting(model="gpt2-xl", cluster="dgx-a100-80gb", gpus=16, batch=32, seq_len=512, layers=8, trainer="megatron"),
    Setting(model="llama3-8b", cluster="hgx-h100", gpus=16, batch=32, seq_len=512, layers=8, trainer="torchtitan"),
    Setting(model="mixtral-8x7b", cluster="hgx-h100", gpus=16, batch=32, seq_len=512, layers=8),
    Setting(model="mixtral-8x7b", cluster="dgx-a100-80gb", gpus=16, batch=32, seq_len=512, layers=8, trainer="deepspeed"),
    Setting(model="deepseek-v3", cluster="hgx-h100", gpus=32, batch=32, seq_len=512, layers=5, trainer="megatron"),
    Setting(model="gpt3-175b", cluster="selene", gpus=64, batch=64, seq_len=2048, layers=12),
)
"""Cheap to price and to simulate."""
LARGE = (
    Setting(model="gpt3-175b", cluster="selene", gpus=512, batch=512, seq_len=2048),
    Setting(model="gpt3-175b", cluster="selene", gpus=512, batch=512, seq_len=2048, trainer="megatron"),
    Setting(model="megatron-530b", cluster="selene", gpus=2240, batch=1920, seq_len=2048, trainer="megatron"),
    Setting(model="llama3-405b", cluster="hgx-h100", gpus=16384, batch=2048, seq_len=8192),
    Setting(model="llama3-405b", cluster="hgx-h100", gpus=16384, batch=128, seq_len=131072),
    Setting(model="llama3-70b", cluster="hgx-h100", gpus=256, batch=512, seq_len=8192, trainer="torchtitan"),
    Setting(model="mixtral-8x7b", cluster="hgx-h100", gpus=64, batch=256, seq_len=4096),
    Setting(model="deepseek-v3", cluster="hgx-h100", gpus=2048, batch=15360, seq_len=4096, trainer="megatron"),
    Setting(model="deepseek-v3", cluster="hgx-h100", gpus=256, batch=512, seq_len=4096),
)
"""Of the sizes for which plans are searched."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Checked:
    """A simulated plan of a point."""

    setting: Setting
    plan: Plan
    bound_s: float
    """The greater one of its point's and its own."""
    step_time_s: float

    @property
    def holds(self) -> bool:
        """Whether the bound is one."""
        return self.bound_s <= self.step_time_s * (1.0 + ROUNDING)

    def __str__(self) -> str:
        return f"bound {self.bound_s} s, simulated {self.step_time_s} s ({self.bound_s / self.step_time_s:.4f}): {self.setting}: {self.plan}"


def checked_points(setting: Setting, count: int, rng: np.random.Generator, *, optimal: bool) -> Iterator[Checked]:
    """Of random points, the plain plan and one that saves memory in a random way; plans that do not fit or that the simulator refuses are left out.

    A point that bounds call infeasible is tried too: its bound is infinite.

    Args:
        setting: whose points.
        count: of plans that fit, if `MOST_DRAWN` times as many points hold so many.
        rng: of the draw.
        optimal: whether ``recompute = "optimal"`` is among the ways: it takes long on stages of many layers.
    """
    whole = joint_space(setting.request())
    rows = rng.choice(len(whole), size=min(MOST_DRAWN * count, len(whole)), replace=False)
    space, request = replace(whole, points=whole.points.take(rows)), whole.request
    device = load_hardware(request.cluster.device)
    source = ModelSource(name=setting.model, config=request.config, batch=setting.batch, seq_len=setting.seq_len)
    tables = LayerTables(request, device)
    bounds, refined = bounded_space(space, device, tables).bound_s, StepBounds(tables, source)
    left = count
    for index in range(len(space)):
        if left <= 0:
            return
        plain = space.plan(index)
        ways = [memory for memory in memory_variants(request.trainer, plain) if optimal or memory.recompute != "optimal"]
        for memory in dict.fromkeys((ways[0], ways[int(rng.integers(len(ways)))])):
            plan = replace(plain, memory=memory)
            try:
                found = simulate_on_cluster(source, plan, request.cluster, reserved=False, device=device)
            except (InputError, InfeasibleError):
                continue
            own_s = refined.bounds(plain, {memory: refined.order(plan)}, np.inf)[0].seconds
            if found.fits:  # of others a bound says nothing
                left -= 1
                yield Checked(
                    setting=setting, plan=plan, bound_s=max(own_s, float(bounds[index])), step_time_s=found.step_time_s
                )


def main() -> None:
    """Prints each violated bound, and how close the others are."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--plans", type=int, default=10_000)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    settings = (*SMALL, *LARGE)
    share = -(-arguments.plans // len(settings))
    total = wrong = 0
    for setting in settings:
        rng, ratios = np.random.default_rng(arguments.seed), []
        for one in checked_points(setting, share, rng, optimal=setting in SMALL):
            ratios.append(one.bound_s / one.step_time_s)
            if not one.holds:
                wrong += 1
                print(one, flush=True)  # noqa: T201 - a command
        total += len(ratios)
        quarter, half, most = np.quantile(ratios, (0.25, 0.5, 1.0)) if ratios else (0.0, 0.0, 0.0)
        shown = f"{len(ratios)} plans, bound over time: lower quartile {quarter:.3f}, median {half:.3f}, most {most:.6f}"
        print(f"{setting}: {shown}", flush=True)  # noqa: T201
    print(f"{total} plans, {wrong} violations")  # noqa: T201


if __name__ == "__main__":
    main()
