"""Which steps the replay suite runs: models by device kind, techniques one by one and together, what the search chooses at budgets, and torch's own means."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass, replace
from types import MappingProxyType

from hardware_models.errors import InfeasibleError, InputError
from hardware_models.profile import DeviceProfile
from search.device.host_cells import TECHNIQUES
from search.found_plan import Found
from search.plan_search import PlanSearch, SearchRequest
from simulator.model_source import ModelSource, model_source
from simulator.plan import Batch, Memory, Plan, Precision, Runtime
from simulator.plan_sections import ComputePrecision
from validation.bundle import BundleCase
from validation.replay_comparison import ReplayCase, bundle_case, replay_case

BUDGETS = (0.6, 0.4, 0.25)
"""Of the plain step's peak."""
HAND_MADE = ("checkpoint", "save_on_cpu", "checkpoint+save_on_cpu")


@dataclass(frozen=True, slots=True, kw_only=True)
class SuiteModel:
    """A model of the suite."""

    name: str
    model: str
    batch: int
    seq_len: int | None = None
    precisions: tuple[ComputePrecision, ...] = ("fp32",)
    more: tuple[str, ...] = ()
    """Of `BESIDE`."""


BESIDE = MappingProxyType({
    "bf16 alone": (Precision(compute="bf16", grads="bf16", master="bf16"), False), "fp8": (Precision(compute="fp8"), False),
    "compiled": (None, True), "fp8, compiled": (Precision(compute="fp8"), True),
})  # fmt: skip
"""Number formats (None: the model's first), and whether blocks are compiled: each run with nothing and with every block recomputed."""


def _small(function: str, batch: int, seq_len: int | None = None, more: tuple[str, ...] = ()) -> SuiteModel:
    return SuiteModel(name=function, model=f"validation.suite_models:{function}", batch=batch, seq_len=seq_len, more=more)


SUITES = MappingProxyType({
    "cpu": (_small("gpt", 8, 128, ("compiled",)), _small("llama", 8, 128), _small("vit", 8), _small("fno", 8), _small("resnet", 8), _small("unet", 2)),
    "cuda": (
        SuiteModel(name="gpt-xl", model="gpt-xl", batch=8, seq_len=1024, precisions=("bf16",), more=tuple(BESIDE)),
        SuiteModel(name="llama-1b", model="llama-1b", batch=4, seq_len=2048, precisions=("bf16",), more=("bf16 alone", "fp8", "compiled")),
        SuiteModel(name="vit-b16", model="vit-b16", batch=64, precisions=("bf16", "tf32"), more=("fp8", "compiled")),
        SuiteModel(name="fno2d", model="fno2d-plain", batch=64),
        SuiteModel(name="fno3d", model="fno3d-plain", batch=16),
        SuiteModel(name="resnet50", model="resnet50", batch=64, precisions=("tf32",)),
        SuiteModel(name="unet2d", model="unet2d", batch=16, precisions=("tf32",)),
    ),
})  # fmt: skip
"""By kind of device."""
ONE_BY_ONE = MappingProxyType({
    "none": Memory(), "selective": Memory(recompute="selective"), "full": Memory(recompute="full"),
    "activations 50% on host": Memory(activation_offload=0.5), "activations on host": Memory(activation_offload=1.0),
    "full, activations on host": Memory(recompute="full", activation_offload=1.0), "weights on host": Memory(weight_offload=1.0),
    "optimizer on host": Memory(optimizer_offload=1.0), "all on host": Memory(activation_offload=1.0, weight_offload=1.0, optimizer_offload=1.0),
})  # fmt: skip
"""Each run with the whole batch at once."""


def suite_cases(
    device: DeviceProfile, *, models: tuple[str, ...] = (), tell: Callable[[str], None] = lambda _: None
) -> list[BundleCase]:
    """The cases of a device's suite, model by model.

    Args:
        device: prices kernels for the search and for what is predicted beforehand.
        models: names of the suite's models to take; empty: all.
        tell: told what is being made, and of budgets that nothing fits.

    Raises:
        InputError: no such model in the suite.
    """
    suite = SUITES[device.kind]
    known = [model.name for model in suite]
    for name in models:
        if name not in known:
            raise InputError(source="--model", key="name", value=name, rule=f"models of this suite are {', '.join(known)}")
    chosen = [model for model in suite if not models or model.name in models]
    found = [case for model in chosen for precision in model.precisions for case in _cases(model, precision, device, tell)]
    return [*found, *(case for model in chosen for name in model.more for case in _beside(model, name, device, tell))]


def _beside(model: SuiteModel, name: str, device: DeviceProfile, tell: Callable[[str], None]) -> Iterator[BundleCase]:
    """A model in other formats or compiled."""
    precision, compiled = BESIDE[name]
    tell(f"{model.name}, {name}: tracing")
    base = Plan(
        batch=Batch(global_batch=model.batch, seq_len=model.seq_len), precision=precision or Precision(compute=model.precisions[0]),
        runtime=Runtime(compile=compiled),
    )  # fmt: skip
    source = model_source(model.model, batch=model.batch, seq_len=model.seq_len).with_plan_batch(base)
    for recompute in ("none", "full"):
        plan = replace(base, memory=ONE_BY_ONE[recompute])
        title = f"{model.name}, {name}: {recompute}"
        yield bundle_case(replay_case(plan, source, device, name=title), source, device)


def _cases(
    model: SuiteModel, precision: ComputePrecision, device: DeviceProfile, tell: Callable[[str], None]
) -> Iterator[BundleCase]:
    base = Plan(batch=Batch(global_batch=model.batch, seq_len=model.seq_len), precision=Precision(compute=precision))
    source = model_source(model.model, batch=model.batch, seq_len=model.seq_len).with_plan_batch(base)
    title = model.name if len(model.precisions) == 1 else f"{model.name} {precision}"
    tell(f"{title}: tracing")
    plain = bundle_case(replay_case(base, source, device, name=f"{title}: plain"), source, device)
    yield replace(plain, kind="plain", operations=())
    for name, memory in ONE_BY_ONE.items():
        yield bundle_case(replay_case(replace(base, memory=memory), source, device, name=f"{title}: {name}"), source, device)
    halves = replace(base, batch=replace(base.batch, micro_batch=max(1, model.batch // 2)), memory=Memory(recompute="full"))
    yield bundle_case(replay_case(halves, source, device, name=f"{title}: full, half the batch"), source, device)
    yield from _searched(source, device, title, tell)
    for means in HAND_MADE:
        yield replace(plain, name=f"{title}: {means}", kind=means, operations=(), predicted={}, program={})


def _searched(source: ModelSource, device: DeviceProfile, title: str, tell: Callable[[str], None]) -> Iterator[BundleCase]:
    """What the joint search chooses at each budget that something fits; on a CPU what it sends to the host leaves the step's live tensors, not the machine's memory."""
    space = PlanSearch(
        SearchRequest(
            model=source,
            device=device,
            global_batch=source.global_batch,
            budget_bytes=device.memory_bytes,
            techniques=TECHNIQUES,
        )
    )
    plain = space.plain().peak_bytes
    budgets = {f"searched, {share:.0%}": round(share * plain) for share in BUDGETS}
    refused: list[str] = []
    for name, budget in budgets.items():
        try:
            found = space.best_within(budget)
        except InfeasibleError as error:
            tell(f"{title}: {name} of the plain peak: {error.smallest_change}")
            refused.append(f"{budget / plain:.0%}")
            continue
        yield _found(space, found, budget, f"{title}: {name}")
    if refused:
        least = space.least().peak_bytes
        name = f"searched, {least / plain:.0%} (the least that fits; {' and '.join(refused)} do not)"
        yield _found(space, space.best_within(least), least, f"{title}: {name}")


def _found(space: PlanSearch, found: Found, budget: int, name: str) -> BundleCase:
    """What a search found under a budget, as a case."""
    plan = space.plan_of(found)
    plan = replace(plan, memory=replace(plan.memory, budget_bytes=budget))
    case = ReplayCase(name=name, plan=plan, operations=found.candidate.operations)
    return bundle_case(case, space.request.model, space.request.device)
