"""Reserved memory: the memory events of a simulated step, replayed through the model of CUDA's caching allocator.

**Model**: parameters and the batch are allocated tensor by tensor, then the step's events in time order; the optimizer makes its states
at the end of the first step, as torch's do, in what the step has left in the cache. The step is repeated until one adds no segment:
what a long run reserves.

**Not modelled**: library workspaces; streams other than the allocating one; order of frees at one instant beyond the program's own.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

import numpy as np

from hardware_models.caching_allocator import DEFAULT_SETTINGS, AllocatorPeaks, AllocatorSettings
from hardware_models.compiled_allocator import StepCalls, replay_steps
from simulator.optimizer_states import OPTIMIZER_STATES, STEP_COUNT_BYTES
from simulator.program import MemoryClass
from simulator.timeline import MemoryProfile
from simulator.workload import Workload

MOST_SUMS = 4096
"""Sums of tensors that are looked at to find those that go together."""
MOST_STEPS = 8
"""Steps after which a replay ends even if the last one still added segments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class ResidentTensors:
    """Bytes of each tensor that is alive before a step and after it, in the order in which training makes them."""

    parameters: tuple[int, ...]
    """Parameters, then buffers and what else stays, as one."""
    batch: tuple[int, ...]
    optimizer_states: tuple[int, ...]
    """Made at the end of the first step."""
    moved: tuple[int, ...] = ()
    """Made first of all, and freed once ``parameters`` are there: what was copied into these."""
    masters: tuple[int, ...] = ()
    """Made after ``parameters``, before the first step."""


def resident_tensors(
    workload: Workload, resident_bytes: Sequence[int], *, num_microbatches: int, optimizer: str
) -> ResidentTensors:
    """The tensors that make up the resident bytes of a program (by `MemoryClass`)."""
    element_bytes = workload.gradient_bytes // max(1, sum(workload.optimizer_tensors))
    sizes = [elements * element_bytes for elements in workload.optimizer_tensors]
    count_bytes = (STEP_COUNT_BYTES[optimizer],) if STEP_COUNT_BYTES[optimizer] else ()
    states = [state for size in sizes for state in (*count_bytes, *[size] * OPTIMIZER_STATES[optimizer])]
    return ResidentTensors(
        parameters=_with_rest(sizes, resident_bytes[MemoryClass.PARAMETERS]),
        batch=_with_rest([workload.batch_bytes] * num_microbatches, resident_bytes[MemoryClass.BATCH]),
        optimizer_states=_with_rest(states, resident_bytes[MemoryClass.OPTIMIZER_STATES]),
    )


def _with_rest(sizes: Sequence[int], total: int) -> tuple[int, ...]:
    """Tensors that sum to a total: the known ones and one for what is left; the total alone where they are more than it."""
    rest = total - sum(sizes)
    return (total,) if rest < 0 else (*sizes, *([rest] if rest else []))


def reserved_peaks(
    profile: MemoryProfile,
    resident: ResidentTensors,
    *,
    update_s: float,
    settings: AllocatorSettings = DEFAULT_SETTINGS,
    capacity_bytes: int | None = None,
) -> AllocatorPeaks:
    """What the allocator allocates and reserves at most over a run of such steps.

    Args:
        profile: bytes over time of one device and step, by `MemoryClass`.
        resident: the tensors behind the profile's first row.
        update_s: when the optimizer begins to run.
        settings: the allocator's.
        capacity_bytes: what the device can give the allocator; None: no limit, so that the result says what would be needed.

    Returns:
        ``out_of_memory_at`` counts the calls of the whole run.
    """
    step, at_update = step_calls(profile, update_s=update_s)
    return repeated_peaks(step, at_update, resident, settings=settings, capacity_bytes=capacity_bytes)


def repeated_peaks(
    step: StepCalls,
    at_update: int,
    resident: ResidentTensors,
    *,
    settings: AllocatorSettings = DEFAULT_SETTINGS,
    capacity_bytes: int | None = None,
) -> AllocatorPeaks:
    """The same for a step given as calls of the allocator.

    Args:
        step: all that it allocates is freed in it.
        at_update: index of the first call after the optimizer began.
        resident: as in `reserved_peaks`, as are the settings and the capacity.
        settings: the allocator's.
        capacity_bytes: of the device.
    """
    end = 1 + int(step.names.max(initial=-1))
    made = _Made(end)
    moved, parameters = made.allocations(resident.moved), made.allocations(resident.parameters)
    gone = StepCalls(moved.names, np.zeros(len(moved.names), np.int64))
    lasting = (moved, parameters, gone, *(made.allocations(sizes) for sizes in (resident.masters, resident.batch)))
    before, after = (StepCalls(*(part[own] for part in step)) for own in (slice(at_update), slice(at_update, None)))
    first = (*lasting, before, made.allocations(resident.optimizer_states), after)
    whole = StepCalls(*(np.concatenate(parts) for parts in zip(*first, strict=True)))
    return replay_steps(whole, step, most_steps=MOST_STEPS, settings=settings, capacity_bytes=capacity_bytes)


class _Made:
    """Numbers allocations one after the other."""

    def __init__(self, first: int) -> None:
        self._next = first

    def allocations(self, sizes: Iterable[int]) -> StepCalls:
        """Calls for tensors; those without bytes are left out."""
        real = np.array([size for size in sizes if size], np.int64)
        begin, self._next = self._next, self._next + len(real)
        return StepCalls(np.arange(begin, self._next), real)


def step_calls(profile: MemoryProfile, *, update_s: float) -> tuple[StepCalls, int]:
    """A step as calls of the allocator, and the index of the first one after the optimizer began.

    A rise of a class is one tensor. A fall frees a tensor of that size: the oldest of transient ones (producers die before consumers),
    the youngest of others (backward passes run in reverse). A fall that no single tensor explains frees several that sum to it; where
    none do, the youngest that fit, and the rest of the fall waits for the class's next one. At the end everything is free.
    """
    tensors = TensorReader()
    changes = np.diff(profile.alive_bytes, axis=0)
    at_update: int | None = None
    for row, memory_class in np.argwhere(changes).tolist():
        if at_update is None and profile.time_s[row + 1] > update_s:
            at_update = len(tensors.calls)
        tensors.change(memory_class, int(changes[row, memory_class]))
    end = len(tensors.calls) if at_update is None else at_update
    for memory_class in list(tensors.alive):
        tensors.free_all(memory_class)
    names, size_bytes = np.array(tensors.calls, dtype=np.int64).reshape(-1, 2).T.copy()
    return StepCalls(names, size_bytes), end


def _sum_to(tensors: Sequence[tuple[int, int]], total: int) -> tuple[int, ...] | None:
    """Names of tensors that sum to a total, the youngest (last) preferred; None where none do or the search grows too large."""
    reached: dict[int, tuple[int, ...]] = {0: ()}
    for name, size in reversed(tensors):
        for before, names in list(reached.items()):
            if before + size <= total and before + size not in reached:
                reached[before + size] = (*names, name)
        if total in reached:
            return reached[total]
        if len(reached) > MOST_SUMS:
            return None
    return None


class TensorReader:
    """Live tensors of each class, while changes of bytes are read as tensors that come and go."""

    def __init__(self) -> None:
        self.calls: list[tuple[int, int]] = []
        """Name and bytes of what comes; 0 bytes: it goes."""
        self.alive: dict[int, dict[int, int]] = defaultdict(dict)
        """Per class: bytes by name, oldest first."""
        self.by_size: dict[tuple[int, int], list[int]] = defaultdict(list)
        """Names by class and size, oldest first."""
        self.owed: dict[int, int] = defaultdict(int)
        self.count = 0

    def change(self, memory_class: int, delta_bytes: int) -> None:
        """Reads one rise or fall of a class."""
        if delta_bytes > 0:
            self.allocate(memory_class, delta_bytes)
        elif delta_bytes < 0:
            self.free(memory_class, -delta_bytes)

    def allocate(self, memory_class: int, size: int) -> None:
        """A tensor comes."""
        name = self.count
        self.count += 1
        self.alive[memory_class][name] = size
        self.by_size[memory_class, size].append(name)
        self.calls.append((name, size))

    def free(self, memory_class: int, size: int) -> None:
        """Tensors of so many bytes go."""
        same = self.by_size[memory_class, size]
        if same:
            self._release(memory_class, same[0] if memory_class == MemoryClass.TRANSIENT else same[-1])
            return
        exact = _sum_to(list(self.alive[memory_class].items()), size)
        if exact is not None:
            for name in exact:
                self._release(memory_class, name)
            return
        owed = size + self.owed[memory_class]
        for name, alive in reversed(list(self.alive[memory_class].items())):
            if alive <= owed:
                owed -= alive
                self._release(memory_class, name)
        self.owed[memory_class] = owed

    def free_all(self, memory_class: int) -> None:
        """All tensors of a class go."""
        for name in list(self.alive[memory_class]):
            self._release(memory_class, name)

    def _release(self, memory_class: int, name: int) -> None:
        size = self.alive[memory_class].pop(name)
        self.by_size[memory_class, size].remove(name)
        self.calls.append((name, 0))
