"""ReplaySession: one real module, its batch and optimizer, on which plans are run and measured beside the plain step."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, TypeVar

import torch

from hardware_models.host_memory import keep_freed_pages
from simulator.host_planner import host_schedule
from simulator.host_schedule import HostShares
from simulator.optimizer_states import OPTIMIZER_STATES
from simulator.sequence import Operation
from simulator.timeline import Timeline
from simulator.tracing.compute_mode import LOSS_SCALED
from simulator.tracing.eight_bit_linear import check_eight_bit
from simulator.tracing.live_storages import bytes_of, resize_storage, storage_of
from simulator.tracing.trace import Traced, compiling, trace
from simulator.tracing.traced_model import TracedModel, batch_size, micro_batches
from validation.hand_made import HandMadeRun
from validation.measure import PeakMemory, allocator_peak, peak_memory, synchronize
from validation.optimizer import FusedOptimizer
from validation.step_runs import PlainRun, ScheduledRun, StepOrder, StepRun

_Run = TypeVar("_Run", bound=StepRun)
_Gradients = tuple[torch.Tensor, list[torch.Tensor | None]]
"""Loss and gradients, on the host."""
DEFAULT_SEED = 0
FIRST_LOSS_SCALE = 2.0**16
"""Source: torch 2.13, torch/amp/grad_scaler.py: ``init_scale``."""


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientsMatch:
    """Loss and gradients of a plan against the plain module's."""

    reference: str
    bitwise: bool
    max_abs: float
    max_rel: float
    """Largest ||difference|| / ||reference|| over the parameters, in the Euclidean norm."""

    def to_json(self) -> dict[str, Any]:
        """As ``schedlab replay --json`` gives it."""
        return {"reference": self.reference, "bitwise": self.bitwise, "max_abs": self.max_abs, "max_rel": self.max_rel}


class ReplaySession:
    """Runs plain and scheduled steps of one module. The learning rate is 0: every step costs what it costs and begins alike.

    Args:
        model: builds the module and its batch.
        device: ``cpu`` or ``cuda``.
        optimizer: ``adamw`` or ``sgd``.
        precision: of `simulator.tracing.compute_mode.PRECISIONS`.
        compiled: whether scheduled steps run compiled blocks; the plain step is eager.
        seed: of the weights and of every step's random numbers.
    """

    def __init__(
        self,
        model: TracedModel,
        *,
        device: str = "cpu",
        optimizer: str = "adamw",
        precision: str = "fp32",
        compiled: bool = False,
        seed: int = DEFAULT_SEED,
    ) -> None:
        self.device = torch.device(device)
        if self.device.type == "cpu":
            keep_freed_pages()
        torch.manual_seed(seed)
        check_eight_bit(precision, self.device)
        module, inputs = model.build_in(precision)
        self.name, self.seed, self.precision = model.name, seed, precision
        self.module = module.to(self.device)
        self.batch = {key: value.to(self.device) if isinstance(value, torch.Tensor) else value for key, value in inputs.items()}
        self.optimizer = FusedOptimizer(self.module.parameters(), name=optimizer, learning_rate=0.0)
        self._compiled = compiled
        self._traces: dict[int, Traced] = {}
        self._running: dict[int, Traced] = {}
        self._runs: list[StepRun] = []
        self._expected: dict[int, _Gradients] = {}
        if precision in LOSS_SCALED:
            self.optimizer.loss_scale = FIRST_LOSS_SCALE
            self._halve_loss_scale()

    def _halve_loss_scale(self) -> None:
        """Finds the scale at which a dynamic one comes to rest: the first whose gradients are all finite."""
        while self.optimizer.loss_scale > 1.0:
            _, gradients = self._gradients(self.plain())
            if all(gradient is None or bool(gradient.isfinite().all()) for gradient in gradients):
                return
            self.optimizer.loss_scale /= 2.0

    @property
    def global_batch(self) -> int:
        """Samples in the batch."""
        return batch_size(self.batch)

    def traced(self, micro_batch: int) -> Traced:
        """The module's blocks at a micro-batch."""
        if micro_batch not in self._traces:
            self._traces[micro_batch] = trace(
                self.module,
                micro_batches(self.batch, micro_batch)[0],
                name=self.name,
                precision=self.precision,
                compiled=self._compiled,
            )
        return self._traces[micro_batch]

    def _running_blocks(self, micro_batch: int) -> Traced:
        """The blocks that steps run: those that were traced, compiled once for all steps where they are (on their first call)."""
        if micro_batch not in self._running:
            traced = self.traced(micro_batch)
            chain = compiling().compiled_chain(traced.chain, traced.workload.blocks) if self._compiled else traced.chain
            self._running[micro_batch] = replace(traced, chain=chain)
        return self._running[micro_batch]

    def scheduled(self, operations: Sequence[Operation], micro_batch: int, shares: HostShares | None = None) -> ScheduledRun:
        """The blocks under a sequence, with fractions of bytes on the host."""
        traced = self._running_blocks(micro_batch)
        pieces = micro_batches(self.batch, micro_batch)
        host = None
        if shares is not None:
            host = host_schedule(
                traced.workload, operations, shares, num_microbatches=len(pieces), optimizer_states=OPTIMIZER_STATES[self.optimizer.name]
            )  # fmt: skip
        order = StepOrder(traced=traced, operations=tuple(operations), host=host)
        tensors = [_tensors(piece) for piece in pieces]
        return self._known(ScheduledRun(self.module, tensors, self.device, order, self.optimizer))

    def wait(self) -> None:
        """Returns once the device is idle."""
        synchronize(self.device)

    def plain(self, micro_batch: int | None = None) -> PlainRun:
        """The module as it is, on the whole batch or on each micro-batch."""
        pieces = micro_batches(self.batch, micro_batch or self.global_batch)
        return self._known(PlainRun(self.module, pieces, self.device, self.optimizer, self.precision))

    def hand_made(self, means: str, micro_batch: int) -> HandMadeRun:
        """The module with torch's own means of saving memory (`validation.hand_made`)."""
        pieces = micro_batches(self.batch, micro_batch)
        return self._known(HandMadeRun(self.module, pieces, self.device, self.optimizer, self.precision, means=means))

    def _known(self, run: _Run) -> _Run:
        self._runs.append(run)
        return run

    @contextmanager
    def once(self, run: _Run) -> Iterator[_Run]:
        """A run that is forgotten afterwards, with the optimizer states that its steps have made."""
        try:
            yield run
        finally:
            self._runs.remove(run)
            for optimizer in run.optimizers():
                optimizer.forget_states()

    def settle(self) -> None:
        """Takes the module's tensors off the device and puts them back there, as they were when it was built, and gives what the allocator kept back to a GPU.

        Steps that keep weights on the host leave them elsewhere in the allocator's segments, where they would hold memory of later steps.
        """
        own = {storage_of(tensor): tensor.detach() for tensor in (*self.module.parameters(), *self.module.buffers())}
        kept = [bytes_of(tensor).to("cpu", copy=True) for tensor in own.values()]
        for tensor in own.values():
            resize_storage(tensor, 0)
        if self.device.type == "cuda":
            torch.cuda.empty_cache()
        for tensor, value in zip(own.values(), kept, strict=True):
            resize_storage(tensor, value.numel())
            bytes_of(tensor).copy_(value)

    def match(self, cases: Sequence[tuple[StepRun, int]]) -> list[tuple[GradientsMatch, ...]]:
        """Loss and gradients of (run, micro-batch) pairs against the plain module.

        Every run begins with the same weights, buffers and random numbers.

        Returns:
            For each pair the match on the same micro-batches and, where the batch is split, that on the unsplit batch.
        """
        found: list[list[GradientsMatch]] = [[] for _ in cases]
        sizes = sorted({size for _, size in cases})
        for reference_size in dict.fromkeys([*sizes, self.global_batch]):
            against = [index for index, (_, size) in enumerate(cases) if reference_size in {size, self.global_batch}]
            if not against:
                continue
            if reference_size not in self._expected:
                self._expected[reference_size] = self._gradients(self.plain(reference_size))
            expected = self._expected[reference_size]
            for index in against:
                run, size = cases[index]
                name = "same micro-batches" if size == reference_size else "unsplit batch"
                found[index].append(_compare(name, self._gradients(run), expected))
        return [tuple(sorted(matches, key=lambda match: match.reference)) for matches in found]

    def peak(self, run: StepRun) -> PeakMemory:
        """Peak memory of a whole step; the optimizer's states, of this kind of step only, exist before it."""
        for other in self._runs:
            for optimizer in other.optimizers():
                optimizer.forget_states()
        with run.inside():
            run()
            states = [tensor for optimizer in run.optimizers() for tensor in optimizer.state_tensors]
            resident = [*self.module.parameters(), *self.module.buffers(), *states, *_tensors(self.batch).values()]
            counts = (
                allocator_peak if self._compiled and self.device.type == "cpu" else partial(peak_memory, device=self.device)
            )
            found = counts(run, resident)
        return replace(found, host_bytes=run.host_bytes)

    def timeline(self, run: ScheduledRun) -> Timeline:
        """Measured spans of one whole step."""
        with run.inside():
            run()
            return run.timeline()

    def _gradients(self, run: StepRun) -> _Gradients:
        with self._buffers_kept(), run.inside():
            torch.manual_seed(self.seed)
            loss = run.gradients().cpu()
            found = [run.gradient_of(name, parameter) for name, parameter in self.module.named_parameters()]
            scale = self.optimizer.loss_scale
            return loss, [None if gradient is None else gradient.cpu() / scale for gradient in found]

    @contextmanager
    def _buffers_kept(self) -> Iterator[None]:
        before = [buffer.clone() for buffer in self.module.buffers()]
        yield
        with torch.no_grad():
            for buffer, value in zip(self.module.buffers(), before, strict=True):
                buffer.copy_(value)


def _compare(
    reference: str,
    found: _Gradients,
    expected: _Gradients,
) -> GradientsMatch:
    (loss, gradients), (expected_loss, expected_gradients) = found, expected
    every = list(zip(gradients, expected_gradients, strict=True))
    pairs = [(a, b) for a, b in every if a is not None and b is not None and a.numel()]
    return GradientsMatch(
        reference=reference, bitwise=torch.equal(loss, expected_loss) and all(_same(a, b) for a, b in every),
        max_abs=max((float((a - b).abs().max()) for a, b in pairs), default=0.0),
        max_rel=max((_relative(a, b) for a, b in pairs), default=0.0),
    )  # fmt: skip


def _tensors(batch: Mapping[str, Any]) -> dict[str, torch.Tensor]:
    return {key: value for key, value in batch.items() if isinstance(value, torch.Tensor)}


def _same(a: torch.Tensor | None, b: torch.Tensor | None) -> bool:
    return (a is None and b is None) or (a is not None and b is not None and torch.equal(a, b))


def _relative(a: torch.Tensor, b: torch.Tensor) -> float:
    scale = float(torch.linalg.vector_norm(b))
    return float(torch.linalg.vector_norm(a - b)) / scale if scale else float(torch.linalg.vector_norm(a - b))
