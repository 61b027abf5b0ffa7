"""Best bound first beside samplers that know no bounds, on some settings: ``python -m search.joint.sampler_comparison --out search/results``.

A sampler may simulate ten times as many plans as the search over the same space did, the experts' plans that it begins with counted too. All plans are judged by the same simulation.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from math import inf
from pathlib import Path

from hardware_models.catalogue import load_hardware
from hardware_models.network.cluster_file import load_cluster
from hardware_models.profile import DeviceProfile
from search.joint.batch_study import Progress
from search.joint.bounded_space import bounded_space
from search.joint.evaluate import Evaluator
from search.joint.experts import experts
from search.joint.joint_search import Baseline, joint_search
from search.joint.make_request import joint_request
from search.joint.sampled_study import SAMPLERS, Judge, SampledRun, run_sampled
from search.joint.sampler_curves import OURS, CurvePoint, write_curves
from search.joint.sampler_figures import sampler_figure
from search.joint.space import JointRequest, joint_space
from search.trainers import TRAINERS
from simulator.figures import save_figure
from simulator.model_source import ModelSource, model_source

TIMES = 10
"""Simulations of a sampler for each one of the search."""
SEEDS = 1
TIME_LIMIT_S = 120.0
"""Of the search, where no proof ends it."""
CURVES_FILE, FIGURE_FILE = "samplers.csv", "samplers.png"


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """A model on some devices of a cluster, for a trainer."""

    model: str
    trainer: str
    cluster: str
    gpus: int
    global_batch: int

    @property
    def name(self) -> str:
        """As figures and files call it."""
        return f"{self.model}, {self.trainer}, {self.gpus} GPUs of {self.cluster}, batch {self.global_batch}"

    def asked(self) -> tuple[JointRequest, ModelSource, DeviceProfile]:
        """What both kinds of search are asked."""
        cluster = load_cluster(self.cluster).with_gpus(self.gpus)
        device = load_hardware(cluster.device)
        source = model_source(self.model, device=device, batch=self.global_batch)
        return joint_request(source, cluster, device, TRAINERS[self.trainer], global_batch=self.global_batch), source, device


SETTINGS = (
    Setting(model="gpt2-medium", trainer="torchtitan", cluster="dgx-a100-80gb", gpus=8, global_batch=16),
    Setting(model="gpt2-large", trainer="any", cluster="hgx-h100", gpus=8, global_batch=32),
    Setting(model="gpt3-175b", trainer="any", cluster="selene", gpus=64, global_batch=64),
)


def compared(
    setting: Setting, *, times: int = TIMES, seeds: int = SEEDS, time_limit_s: float = TIME_LIMIT_S
) -> Iterator[CurvePoint]:
    """Curves of the search and of each sampler: a point at each better plan, and one at the end.

    Args:
        setting: what is searched for.
        times: simulations of a sampler for each one of the search, experts' plans counted.
        seeds: runs of each sampler.
        time_limit_s: of the search; the samplers have none.
    """
    request, source, device = setting.asked()
    passed: list[Progress] = []
    found = joint_search(request, source, device, time_limit_s=time_limit_s, on_progress=passed.append)
    own = passed[-1].num_simulated
    space = joint_space(request)
    evaluator = Evaluator(space, source, device)
    begun = found.num_probed + _experts_simulated(evaluator, found.baselines)
    yield from _curve(setting, OURS, 0, passed, begun)
    judge = Judge(evaluator)
    bound_s = float(bounded_space(space, device).bound_s.min())
    most = times * (begun + own)
    for sampler in SAMPLERS:
        for seed in range(seeds):
            run = SampledRun(sampler=sampler, seed=seed, max_simulations=most)
            passed = []
            run_sampled(space, judge, run, request=setting.name, bound_s=bound_s, on_progress=passed.append)
            yield from _curve(setting, sampler, seed, passed, 0)


def _experts_simulated(evaluator: Evaluator, baselines: Sequence[Baseline]) -> int:
    """Experts' plans that a search simulated: of a rule those whose bounds are below its answer, or all if none fits."""
    answers = {one.name: one.step_time_s if one.fits else inf for one in baselines}
    rules = [expert for expert in experts(evaluator.space.request) if expert.name in answers]
    return sum(
        max(1, sum(answers[rule.name] == inf or evaluator.bound_s(plan) < answers[rule.name] for plan in rule.plans))
        for rule in rules
    )


def _curve(setting: Setting, method: str, seed: int, passed: Sequence[Progress], begun: int) -> Iterator[CurvePoint]:
    before = (inf, inf)
    for place, one in enumerate(passed):
        state = (one.incumbent, one.lower_bound)
        if state != before or place == len(passed) - 1:
            yield CurvePoint(
                setting=setting.name, method=method, seed=seed, simulations=begun + one.num_simulated, best_s=one.incumbent, bound_s=one.lower_bound
            )  # fmt: skip
        before = state


def main(arguments: Sequence[str]) -> None:
    """Runs all settings, writes curves and figure, and prints where each method ended."""
    parser = argparse.ArgumentParser(
        prog="python -m search.joint.sampler_comparison", description="Compare the search with samplers."
    )
    parser.add_argument("--out", type=Path, required=True, help=f"folder that gets {CURVES_FILE} and {FIGURE_FILE}")
    parser.add_argument("--seeds", type=int, default=SEEDS, help="runs of each sampler")
    parser.add_argument("--time-limit", type=float, default=TIME_LIMIT_S, help="seconds of the search, where no proof ends it")
    options = parser.parse_args(arguments)
    points: list[CurvePoint] = []
    for setting in SETTINGS:
        for point in compared(setting, seeds=options.seeds, time_limit_s=options.time_limit):
            points.append(point)
            text = f"{point.setting}: {point.method} {point.seed}: {point.simulations} simulations, {point.best_s:.5g} s"
            print(text, flush=True)  # noqa: T201 - its output
        write_curves(points, options.out / CURVES_FILE)
    save_figure(sampler_figure(points), options.out / FIGURE_FILE)


if __name__ == "__main__":
    main(sys.argv[1:])
