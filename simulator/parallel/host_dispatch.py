"""What the host needs to launch a stage's passes: a pass is over no sooner than its last kernel was dispatched."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

from hardware_models.errors import InputError
from hardware_models.profile import DeviceProfile, HostDispatch
from simulator.parallel.host_python import NO_PYTHON, PythonSeconds
from simulator.parallel.stages import Stage, StageCost
from simulator.plan_sections import Runtime
from simulator.sequence import Operation
from simulator.workload import BlockOption, Pass

_MADE = frozenset({"gradient", "shared_gradient"})


@dataclass(frozen=True, slots=True, kw_only=True)
class DispatchSeconds:
    """The host's time for one micro-batch's passes through a stage."""

    forward_s: float
    backward_s: float
    """In full, recompute included."""
    weight_s: float
    """Of the backward pass, the kernels that make parameters' gradients."""


def dispatch_of(device: DeviceProfile) -> HostDispatch:
    """The host's time per kernel beside a device.

    Raises:
        InputError: the profile has no ``[host_dispatch]``.
    """
    if device.host_dispatch is None:
        raise InputError(
            source=device.name, key="host_dispatch", value=None, rule="a step on several devices needs the host's time per kernel",
            remedy="add a [host_dispatch] section to the profile's device.toml, or calibrate the machine",
        )  # fmt: skip
    return device.host_dispatch


def host_seconds(
    stage: Stage, operations: Sequence[Operation], dispatch: HostDispatch, runtime: Runtime, python: PythonSeconds = NO_PYTHON
) -> DispatchSeconds:
    """The host's time for the passes of a stage.

    **Model**: eager, a sum over kernels: ``eager_s`` each where Python runs the operator (forward, and forward again under checkpointing), ``autograd_backward_s`` each
    where autograd's thread does. Compiled: ``compiled_s`` for each kernel (of which fusion left fewer, see `compiled_kernels`) and ``compiled_call_s`` for each
    run of a block. CUDA graphs: ``cuda_graph_s`` for each kernel of a pass that is launched as a whole. Eager runs of a block take the trainer's own Python besides.

    **Source**: the profile's ``[host_dispatch]``, measured or published; `host_python`.

    **Not modelled**: launches of collectives and copies, Python between layers, the data loader's process, a garbage collection.

    Args:
        stage: whose passes.
        operations: order in which a micro-batch runs its blocks.
        dispatch: host's time per kernel.
        runtime: eager, compiled, or captured in graphs.
        python: the trainer's own, for one run of a block.
    """
    own = NO_PYTHON if runtime.compile or runtime.cuda_graphs else python
    forward_s = backward_s = weight_s = 0.0
    options: dict[int, str] = {}
    ran: set[int] = set()
    for operation in operations:
        block = stage.blocks[operation.block]
        if operation.kind == "B":
            option = block.option(options[operation.block])
            backward_s += own.backward_s + _seconds(option.backward_accumulate, dispatch, runtime, backward=True)
            weight_s += _weight_kernels(option) * _each(dispatch, runtime, backward=True)
            continue
        if operation.kind == "F_all":
            options[operation.block] = operation.option
        run = block.option(operation.option).forward if operation.kind == "F_all" else block.discard
        seconds = own.forward_s + _seconds(run, dispatch, runtime, backward=False)
        if operation.block in ran:
            backward_s += own.checkpoint_s + seconds
        else:
            forward_s += seconds
        ran.add(operation.block)
    return DispatchSeconds(forward_s=forward_s, backward_s=backward_s, weight_s=weight_s)


def with_dispatch(cost: StageCost, host: DispatchSeconds) -> StageCost:
    """The cost of a stage's passes with the host's time for them."""
    forward, backward = replace(cost.forward, host_s=host.forward_s), replace(cost.backward, host_s=host.backward_s)
    return replace(cost, forward=forward, backward=backward, weight_host_s=host.weight_s)


def _weight_kernels(option: BlockOption) -> int:
    """Kernels that make parameters' gradients or add them up."""
    made = {event.kernel for event in option.backward.memory if event.buffer in _MADE and event.delta_bytes > 0}
    return len(made) + max(0, len(option.backward_accumulate.kernels) - len(option.backward.kernels))


def _each(dispatch: HostDispatch, runtime: Runtime, *, backward: bool) -> float:
    """Seconds of the host for one kernel."""
    if runtime.cuda_graphs:
        return dispatch.cuda_graph_s
    if runtime.compile:
        return dispatch.compiled_s
    return dispatch.autograd_backward_s if backward else dispatch.eager_s


def _seconds(run: Pass, dispatch: HostDispatch, runtime: Runtime, *, backward: bool) -> float:
    """Seconds of the host for one run of a block."""
    called = dispatch.compiled_call_s if runtime.compile and not runtime.cuda_graphs else 0.0
    return called + len(run.kernels) * _each(dispatch, runtime, backward=backward)
