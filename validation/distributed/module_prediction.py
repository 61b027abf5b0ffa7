"""What a rank that runs a split module is predicted to do: the very step of `ModuleRank`, on fake tensors among fake processes."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch.testing._internal.distributed.fake_pg import FakeStore
from torch.utils._python_dispatch import TorchDispatchMode, is_traceable_wrapper_subclass_type
from torch.utils._pytree import tree_leaves

from hardware_models.kernel import Kernel
from hardware_models.pricing import Price, price_together
from hardware_models.profile import DeviceProfile
from simulator.exposed_time import TIME_CLASSES
from simulator.lower import optimizer_elements_pass
from simulator.parallel.simulate_traced import compute_peak
from simulator.parallel.traced_replicas import Rings
from simulator.plan import Plan
from simulator.precision import in_precision
from simulator.program import Kind, Stream
from simulator.simulate import INTERVAL_Z
from simulator.timeline import MemoryProfile, Span, Timeline
from simulator.tracing.capture import build_fake
from simulator.tracing.compute_mode import LOSS_SCALED
from simulator.tracing.kernels_of import kernels_of
from simulator.tracing.live_storages import LiveStorages
from simulator.tracing.side_values import fake_activations
from simulator.tracing.traced_model import TracedModel, micro_batches
from validation.distributed.checkpointed_units import runs_again
from validation.distributed.job import LinkFacts
from validation.distributed.module_rank import ModuleRank
from validation.measure import peak_memory

_COLLECTIVES = ("c10d", "_c10d_functional")
"""Namespaces of operators that are collectives, or wait for them."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Collective:
    """One exchange among the ranks of an axis."""

    axis: str
    """``tp`` or ``dp``."""
    size_bytes: int
    """Of the whole tensor."""
    name: str
    """``all_reduce``, or another in which every rank's share goes around once."""

    def seconds(self, ranks: int, link: LinkFacts) -> float:
        """A ring (`simulator.parallel.traced_replicas.Rings`)."""
        return Rings(latency_s=link.latency_s, bytes_per_s=link.bytes_per_s)(self.name, float(self.size_bytes), ranks)


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleStep:
    """A step of rank 0, untimed; it holds the largest parts, other ranks less by a row of a parameter at most."""

    peak_bytes: int
    kernels: tuple[Kernel, ...]
    """Of forward and backward passes."""
    repeated: tuple[Kernel, ...]
    """Those that the backward pass runs again (recompute)."""
    updates: tuple[Kernel, ...]
    """Of the optimizer."""
    collectives: tuple[Collective, ...]


@dataclass(frozen=True, slots=True, kw_only=True)
class ModuleSimulation:
    """A step's predicted consequence, alike on every rank.

    **Not modelled**: collectives beside compute; classes of memory; what the allocator reserves beyond live tensors.
    """

    plan: Plan
    device: DeviceProfile
    step: ModuleStep
    price: Price
    """All kernels of a rank."""
    slowdown: float
    update_s: float
    repeat_s: float
    """Kernels that run again."""
    exchange_s: Mapping[str, float]
    """By axis."""
    model_flops: int
    """Of a step over all ranks."""
    tokens: int

    @property
    def profiles(self) -> tuple[MemoryProfile, ...]:
        """None: the peak alone is predicted."""
        return ()

    @property
    def step_time_s(self) -> float:
        """Kernels, exchanges and update after each other."""
        return self.slowdown * self.price.total_s + sum(self.exchange_s.values())

    @property
    def peak_memory_bytes(self) -> tuple[int, ...]:
        """Most bytes of live tensors of a rank."""
        return (self.step.peak_bytes,)

    @property
    def needed_bytes(self) -> int:
        """What must fit the device: on a CPU all ranks together, which share its memory."""
        if self.device.kind == "cpu":
            return self.step.peak_bytes * self.plan.num_gpus
        return self.step.peak_bytes + self.device.context_bytes

    @property
    def fits_device(self) -> bool:
        """Whether what is needed is there."""
        return self.needed_bytes <= self.device.memory_bytes

    @property
    def _parts(self) -> dict[str, float]:
        compute_s = self.slowdown * self.price.total_s - self.update_s - self.repeat_s
        own = {"compute": compute_s, "recompute": self.repeat_s, "optimizer": self.update_s}
        return dict.fromkeys(TIME_CLASSES, 0.0) | own | dict(self.exchange_s)

    @property
    def timeline(self) -> Timeline:
        """Of rank 0: a span per class of time."""
        parts, spans, start_s = self._parts, [], 0.0
        lanes = {
            "compute": (Stream.COMPUTE, Kind.FORWARD), "recompute": (Stream.COMPUTE, Kind.RECOMPUTE), "tp": (Stream.TP, Kind.TRANSFER), "dp": (Stream.DP, Kind.TRANSFER),
            "optimizer": (Stream.COMPUTE, Kind.OPTIMIZER),
        }  # fmt: skip
        for name, (stream, kind) in lanes.items():
            if parts[name] > 0.0:
                end_s = start_s + parts[name]
                spans.append(
                    Span(device=0, stream=stream, kind=kind, name=name, micro_batch=-1, block=-1, start_s=start_s, end_s=end_s)
                )
                start_s = end_s
        return Timeline(spans=tuple(spans))

    def to_json(self) -> dict[str, object]:
        """The keys of ``schedlab simulate --json``."""
        step_s, ranks, peak = self.step_time_s, self.plan.num_gpus, compute_peak(self.plan, self.device)
        half = INTERVAL_Z * self.price.relative_standard_error * step_s
        rate, budget, parts = self.model_flops / step_s / ranks, self.plan.memory.budget_bytes, self._parts
        hardware_rate = rate + sum(kernel.flops for kernel in self.step.repeated) / step_s
        return {
            "step_time_s": step_s, "step_time_interval_s": [max(0.0, step_s - half), step_s + half], "tokens_per_s_per_gpu": self.tokens / step_s / ranks,
            "model_flops_per_s_per_gpu": rate, "mfu": rate / peak, "hfu": hardware_rate / peak, "peak_memory_bytes": list(self.peak_memory_bytes),
            "peak_reserved_bytes": list(self.peak_memory_bytes), "peak_host_bytes": 0, "peak_memory_breakdown": {},
            "fits": self.fits_device and (budget is None or self.step.peak_bytes <= budget), "time_breakdown_s": parts,
            "bottleneck": max(parts, key=lambda name: parts[name]), "num_events": len(self.step.kernels) + len(self.step.collectives),
            "evidence": list(self.price.evidence),
        }  # fmt: skip


class _StepReader(LiveStorages):
    """Notes kernels and collectives.

    Args:
        axes: of the mesh, by the name of their group.
    """

    def __init__(self, axes: Mapping[str, str]) -> None:
        super().__init__(lambda _, __: None)
        self._axes = axes
        self.kernels: list[Kernel] = []
        self.repeated: list[Kernel] = []
        self.collectives: list[Collective] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = super().__torch_dispatch__(func, types, args, kwargs)
        if out is NotImplemented:
            return out
        values = (*args, *(kwargs or {}).values())
        if func.namespace not in _COLLECTIVES:
            (self.repeated if runs_again() else self.kernels).extend(kernels_of(func, values, out))
            return out
        axis = next((self._axes[name] for value in values if (name := _group_name(value)) in self._axes), None)
        if axis is not None:  # else it waits for one, or wraps its result
            sizes = [
                leaf.numel() * leaf.element_size() for leaf in tree_leaves((values, out)) if isinstance(leaf, torch.Tensor)
            ]
            summed = "allreduce" in func.overloadpacket.__name__.replace("_", "")
            name = "all_reduce" if summed else "all_gather"
            self.collectives.append(Collective(axis=axis, size_bytes=max(sizes, default=0), name=name))
        return out


def _group_name(value: Any) -> str:
    """The process group that an argument of a collective names; empty where it is another argument."""
    if isinstance(value, torch.ScriptObject):
        value = dist.ProcessGroup.unbox(value)
    if isinstance(value, dist.ProcessGroup):
        return str(value.group_name)
    return value if isinstance(value, str) else ""


class CopiesOfGloo(TorchDispatchMode):
    """Context in which scattered sums copy what they sum, as gloo does: it sums a copy of the whole tensor and hands a part of it out.

    **Source**: torch 2.13, torch/csrc/distributed/c10d/ProcessGroupGloo.cpp (``reduce_scatter_tensor_coalesced``); seen as a storage of the input's size beside it in measured steps. NCCL makes none.
    """

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        if any(is_traceable_wrapper_subclass_type(one) for one in types):
            return NotImplemented  # they take themselves apart first
        sums = func.namespace in _COLLECTIVES and "reduce_scatter" in func.overloadpacket.__name__
        sizes = [leaf.numel() for leaf in tree_leaves((args, kwargs)) if isinstance(leaf, torch.Tensor)]
        copies = [
            leaf.clone() for leaf in tree_leaves((args, kwargs)) if sums and isinstance(leaf, torch.Tensor) and leaf.numel() == max(sizes)
        ]  # fmt: skip
        out = func(*args, **(kwargs or {}))
        del copies
        return out


@contextmanager
def _fake_processes(count: int) -> Iterator[None]:
    """Context in which this process is rank 0 of several whose collectives do nothing."""
    dist.init_process_group("fake", rank=0, world_size=count, store=FakeStore())
    try:
        yield
    finally:
        dist.destroy_process_group()


def module_step(model: TracedModel, plan: Plan, *, num_microbatches: int, gloo: bool) -> ModuleStep:
    """The second step of rank 0, from fake tensors: no memory for weights, no other process.

    **Model**: live tensor bytes, one count per storage, of the code that replay runs; torch's FSDP2 and parallel styles make their own buffers in it.

    Args:
        model: its definition.
        plan: with its batch resolved.
        num_microbatches: of a rank.
        gloo: whether processes exchange through it (on a CPU); else through NCCL.
    """
    (module, inputs), fake_mode = build_fake(model.build)
    pieces = micro_batches(inputs, plan.batch.micro_batch or 1)[:num_microbatches]
    with _fake_processes(plan.num_gpus), fake_activations(fake_mode):
        rank = ModuleRank(plan, module, pieces, device=torch.device("cpu"))
        rank.step()

        def step() -> None:
            with CopiesOfGloo() if gloo else nullcontext():  # type: ignore[no-untyped-call]
                rank.step()

        peak = peak_memory(step, rank.resident, device=torch.device("cpu"))
        with _StepReader({rank.mesh.get_group(axis).group_name: axis for axis in rank.mesh.mesh_dim_names or ()}) as reader:
            rank.gradients()
            rank.gather()
        sizes = [(part.numel(), part.numel() * part.element_size()) for part in rank.optimizer.parameters]
    scaled = plan.precision.compute in LOSS_SCALED
    updates = optimizer_elements_pass(sizes, optimizer=plan.precision.optimizer, loss_scaled=scaled).kernels
    return ModuleStep(
        peak_bytes=peak.allocated_bytes, kernels=tuple(reader.kernels), repeated=tuple(reader.repeated), updates=updates,
        collectives=tuple(reader.collectives),
    )  # fmt: skip


def simulate_module(
    step: ModuleStep, plan: Plan, device: DeviceProfile, link: LinkFacts, *, slowdown: float, model_flops: int, tokens: int
) -> ModuleSimulation:
    """A step with the times of kernels, each ``slowdown`` times the profile's, and of collectives over a link."""
    degrees = {axis: getattr(plan.parallel, axis) for axis in ("tp", "dp") if getattr(plan.parallel, axis) > 1}

    def together(*groups: Sequence[Kernel]) -> Price:
        return price_together([in_precision(kernel, plan.precision.compute) for group in groups for kernel in group], device)

    return ModuleSimulation(
        plan=plan, device=device, step=step, price=together(step.kernels, step.repeated, step.updates), slowdown=slowdown,
        update_s=slowdown * together(step.updates).total_s, repeat_s=slowdown * together(step.repeated).total_s,
        exchange_s={
            axis: sum(one.seconds(degree, link) for one in step.collectives if one.axis == axis) for axis, degree in degrees.items()
        },
        model_flops=model_flops, tokens=tokens,
    )  # fmt: skip
