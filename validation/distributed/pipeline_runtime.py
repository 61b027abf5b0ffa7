"""torch's pipeline runtime, fed with our order: stages whose passes are those of `StageRun`."""

from __future__ import annotations

import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime
from torch.distributed.pipelining.stage import _PipelineStageBase

from simulator.pipeline.action import Order
from simulator.pipeline.messages import messages_csv, with_messages
from validation.distributed.stage_run import StageRun


@dataclass(frozen=True, slots=True, kw_only=True)
class Layout:
    """Shape, strides and dtype of a boundary as it lies in a receiver's memory."""

    shape: tuple[int, ...]
    stride: tuple[int, ...]
    dtype: torch.dtype

    def empty(self, device: torch.device) -> torch.Tensor:
        """A tensor to receive into."""
        return torch.empty_strided(self.shape, self.stride, dtype=self.dtype, device=device)

    def fitted(self, tensor: torch.Tensor) -> torch.Tensor:
        """The tensor if it lies so and fills its memory, else a copy that does."""
        fills = tensor.untyped_storage().nbytes() == tensor.numel() * tensor.element_size()
        if fills and tensor.stride() == self.stride:
            return tensor
        return self.empty(tensor.device).copy_(tensor)


def layout_of(boundary: torch.Tensor) -> Layout:
    """The layout of a boundary: its own where it fills its memory, else contiguous."""
    fills = boundary.untyped_storage().nbytes() == boundary.numel() * boundary.element_size()
    stride = boundary.stride() if fills else torch.empty(boundary.shape, device="meta").stride()
    return Layout(shape=tuple(boundary.shape), stride=tuple(stride), dtype=boundary.dtype)


def wire(tensor: torch.Tensor) -> torch.Tensor:
    """The tensor's memory as bytes in a row: what is sent and received, whatever its strides and dtype are."""
    size = tensor.numel() * tensor.element_size()
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage(), 0, (size,), (1,))


class BlockStage(_PipelineStageBase):
    """A stage as torch's runtime calls it; what is computed is `StageRun`'s, what is received and sent is one boundary."""

    def __init__(
        self, run: StageRun, *, index: int, num_stages: int, device: torch.device, group: dist.ProcessGroup | None,
        entering: Layout | None, leaving: Layout | None, next_is_here: bool,
    ) -> None:  # fmt: skip
        super().__init__(torch.nn.Module(), index, num_stages, device, group)
        self.run, self.entering, self.leaving, self.next_is_here = run, entering, leaving, next_is_here
        self._received: dict[int, torch.Tensor] = {}
        self._leaving: dict[int, torch.Tensor] = {}
        self._received_grads: dict[int, torch.Tensor] = {}
        self._leaving_grads: dict[int, torch.Tensor] = {}

    def forward_one_chunk(
        self, fwd_chunk_id: int, args: Any, kwargs: dict[str, Any] | None = None, save_forward_output: bool = True  # noqa: ARG002, FBT002 - torch's signature
    ) -> torch.Tensor:  # fmt: skip
        """The boundary after the stage, or the loss."""
        y = self.run.forward(fwd_chunk_id, kwargs or {}, self._received.pop(fwd_chunk_id, None))
        if self.leaving is not None and not self.next_is_here:
            self._leaving[fwd_chunk_id] = y
        return y

    def backward_one_chunk(
        self, bwd_chunk_id: int, loss: Any = None, full_backward: bool = True, last_backward: bool = False  # noqa: ARG002, FBT002 - torch's signature
    ) -> None:  # fmt: skip
        """The full backward pass, or the one for the input."""
        backward = self.run.backward if full_backward else self.run.backward_inputs
        grad = backward(bwd_chunk_id, self._received_grads.pop(bwd_chunk_id, None))
        if self.entering is not None:
            assert grad is not None
            self._leaving_grads[bwd_chunk_id] = grad

    def backward_weight_one_chunk(self, bwd_chunk_id: int, last_backward: bool = False) -> None:  # noqa: ARG002, FBT002 - torch's signature
        """The pass for the weights' gradients."""
        self.run.backward_weights(bwd_chunk_id)

    def get_fwd_recv_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """Memory for the boundary before, and its receipt."""
        if self.entering is None:
            return []
        self._received[fwd_chunk_id] = buffer = self.entering.empty(self.device)
        return [self._op(dist.irecv, wire(buffer), self.stage_index - 1)]

    def get_bwd_recv_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """Memory for the gradient of the boundary after, and its receipt."""
        if self.leaving is None:
            return []
        self._received_grads[bwd_chunk_id] = buffer = self.leaving.empty(self.device)
        return [self._op(dist.irecv, wire(buffer), self.stage_index + 1)]

    def get_fwd_send_ops(self, fwd_chunk_id: int) -> list[dist.P2POp]:
        """The boundary after, on its way."""
        assert self.leaving is not None
        return [self._op(dist.isend, wire(self.leaving.fitted(self._leaving.pop(fwd_chunk_id))), self.stage_index + 1)]

    def get_bwd_send_ops(self, bwd_chunk_id: int) -> list[dist.P2POp]:
        """The gradient of the boundary before, on its way."""
        assert self.entering is not None
        return [self._op(dist.isend, wire(self.entering.fitted(self._leaving_grads.pop(bwd_chunk_id))), self.stage_index - 1)]

    def set_local_fwd_input(self, prev_stage_outputs: Any, mb_index: int) -> None:
        """Takes the boundary from the stage before on this rank."""
        self._received[mb_index] = prev_stage_outputs

    def get_local_bwd_output(self, mb_index: int) -> Any:
        """Gives the gradient to the stage before on this rank."""
        return (self._leaving_grads.pop(mb_index),)

    def set_local_bwd_input(self, next_stage_bwd_outputs: tuple[torch.Tensor | None, ...], mb_index: int) -> None:
        """Takes the gradient from the stage after on this rank."""
        (grad,) = next_stage_bwd_outputs
        assert grad is not None
        self._received_grads[mb_index] = grad

    def clear_runtime_states(self) -> None:
        """Forgets what is in flight."""
        for states in (self._received, self._leaving, self._received_grads, self._leaving_grads):
            states.clear()
        self.run.abandon()

    def perform_reduce_grad(self, grad_scale_factor: int) -> None:
        """Nothing: the loss is scaled, and replicas sum their gradients after the passes."""

    def _op(self, kind: Callable[..., Any], tensor: torch.Tensor, stage: int) -> dist.P2POp:
        return dist.P2POp(kind, tensor, group=self.group, group_peer=self.stage_index_to_group_rank[stage])

    def _get_init_p2p_neighbors_ops(self) -> list[dist.P2POp]:
        return []

    def _prepare_forward_infra(self, num_microbatches: int, *_args: Any, **_kwargs: Any) -> Any:
        self.chunks = num_microbatches

    def _prepare_backward_infra(self, num_microbatches: int, *_args: Any, **_kwargs: Any) -> Any:
        self.chunks = num_microbatches

    def _create_grad_recv_info(self, act_send_info: dict[Any, Any]) -> tuple[Any, ...]:  # noqa: ARG002 - torch's signature
        return ()


class _Runtime(_PipelineScheduleRuntime):
    """torch's runtime without its own checks of shapes: boundaries are known from the trace."""

    def __init__(self, stages: list[BlockStage], num_microbatches: int) -> None:
        super().__init__(stages, num_microbatches, loss_fn=_loss_itself, scale_grads=False)  # type: ignore[no-untyped-call]

    def _initialize_stages(self, *_args: Any, **_kwargs: Any) -> None:
        for stage in self._stages:
            stage.chunks = self._n_microbatches
            stage.has_backward = True


def _loss_itself(output: torch.Tensor, _target: None) -> torch.Tensor:
    return output


class PipelineStep:
    """Runs one step's passes of a rank under an order.

    Args:
        order: of the whole pipeline; torch's runtime loads it as CSV, messages included.
        stages: this rank's.
    """

    def __init__(self, order: Order, stages: Sequence[BlockStage]) -> None:
        self.stages = list(stages)
        self._runtime = _Runtime(self.stages, order.num_microbatches)
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "order.csv"
            path.write_text(messages_csv(with_messages(order)), encoding="utf-8", newline="")
            self._runtime._load_csv(str(path), format="compute_comms")  # noqa: SLF001 - torch's only entrance for orders of one's own

    def __call__(self, micro_batches: Sequence[Mapping[str, torch.Tensor]]) -> torch.Tensor | None:
        """The mean loss over this pipeline's micro-batches where the last stage is here, else None."""
        losses: list[torch.Tensor] = []
        for stage in self.stages:
            stage.clear_runtime_states()
        self._runtime._step_microbatches(  # noqa: SLF001 - step() would cut the batch its own way
            kwarg_mbs=[dict(one) for one in micro_batches], target_mbs=[None] * len(micro_batches), losses=losses
        )
        if not any(stage.is_last for stage in self.stages):
            return None
        total = losses[0]
        for loss in losses[1:]:
            total = total + loss
        return total
