"""Pieces of the script that `search.export_pytorch` writes."""

COMMON = '''
import os
from pathlib import Path

import torch
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import checkpoint_wrapper
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import CPUOffloadPolicy, FSDPModule, MixedPrecisionPolicy, OffloadPolicy, fully_shard

$constants
WIDTH = 64  # of the stand-in blocks


def blocks(stage: int = 0) -> list[nn.Module]:
    """Your blocks of a stage, in order. These stand in for them."""
    return [nn.Sequential(nn.Linear(WIDTH, WIDTH), nn.GELU()) for _ in range(LAYERS_OF_STAGE[stage])]


def parallelize(own: list[nn.Module], mesh: DeviceMesh) -> FSDPModule:
    """One module of all blocks, each one recomputed, compiled and sharded as the plan says."""
    dtypes = {"bf16": torch.bfloat16}
    policy = MixedPrecisionPolicy(param_dtype=dtypes.get(COMPUTE), reduce_dtype=torch.float32)
    how = {
        "mesh": mesh["dp_replicate", "dp_shard"],
        "mp_policy": policy,
        "reshard_after_forward": GATHER_EACH_PASS,
        "offload_policy": CPUOffloadPolicy() if OFFLOAD else OffloadPolicy(),
    }
    made = [checkpoint_wrapper(block) if RECOMPUTE else block for block in own]
    for block in made:
        if COMPILE:
            block.compile()
        fully_shard(block, **how)
    whole = fully_shard(nn.Sequential(*made), **how)
    if mesh.device_type == "cpu":
        whole.set_force_sum_reduction_for_comms(True)  # gloo cannot average
        for block in whole:
            block.set_force_sum_reduction_for_comms(True)
    return whole


def start() -> DeviceMesh:
    """The mesh of all ranks, pipeline outermost."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cuda":
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
    if COMPUTE == "tf32":
        torch.set_float32_matmul_precision("high")
    return init_device_mesh(device, tuple(MESH.values()), mesh_dim_names=tuple(MESH))

'''
"""What both kinds of script begin with; ``$constants`` are the plan's."""

ACCUMULATE = '''
def train_step(whole: FSDPModule, optimizer: torch.optim.Optimizer, batches: list[torch.Tensor]) -> float:
    """The mean loss of a step over the micro-batches of this replica."""
    total = 0.0
    for number, batch in enumerate(batches):
        last = number == len(batches) - 1
        whole.set_requires_gradient_sync(last or SCATTER_EACH_MICRO_BATCH)
        whole.set_reshard_after_backward(last or GATHER_EACH_PASS)
        loss = whole(batch).float().square().mean() / len(batches)  # your loss
        loss.backward()
        total += loss.item()
    optimizer.step()
    optimizer.zero_grad()
    return total


def main() -> None:
    mesh = start()
    torch.manual_seed(0)
    whole = parallelize(blocks(), mesh).to("cpu" if OFFLOAD else mesh.device_type)
    optimizer = getattr(torch.optim, OPTIMIZER)(whole.parameters(), lr=1e-3)
    batches = [torch.randn(MICRO_BATCH, WIDTH, device=mesh.device_type) for _ in range(NUM_MICROBATCHES)]
    print(f"rank {mesh.get_rank()}: loss {train_step(whole, optimizer, batches):.6f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
'''
"""Without a pipeline."""

PIPELINE = '''
def pipeline(wholes: list[FSDPModule], mesh: DeviceMesh):
    """The schedule of this rank's stages, in exactly the plan's order."""
    from torch.distributed.pipelining import PipelineStage
    from torch.distributed.pipelining.schedules import _PipelineScheduleRuntime

    group, count = mesh["pp"].get_group(), sum(map(len, STAGES_OF_RANK))
    own = STAGES_OF_RANK[mesh["pp"].get_local_rank()]
    stages = [
        PipelineStage(whole, number, count, torch.device(mesh.device_type), group=group)
        for number, whole in zip(own, wholes, strict=True)
    ]
    schedule = _PipelineScheduleRuntime(stages, n_microbatches=NUM_MICROBATCHES, loss_fn=loss_of)
    schedule._load_csv(str(Path(__file__).with_name(ORDER_FILE)))
    return schedule


def loss_of(out: torch.Tensor, target: torch.Tensor) -> torch.Tensor:
    """Your loss of a micro-batch."""
    return (out.float() - target).square().mean()


def main() -> None:
    mesh = start()
    torch.manual_seed(0)
    own = STAGES_OF_RANK[mesh["pp"].get_local_rank()]
    wholes = [parallelize(blocks(stage), mesh).to("cpu" if OFFLOAD else mesh.device_type) for stage in own]
    optimizer = getattr(torch.optim, OPTIMIZER)([one for whole in wholes for one in whole.parameters()], lr=1e-3)
    schedule, last = pipeline(wholes, mesh), sum(map(len, STAGES_OF_RANK)) - 1
    batch = torch.randn(MICRO_BATCH * NUM_MICROBATCHES, WIDTH, device=mesh.device_type)
    losses: list[torch.Tensor] = []
    schedule.step(*([batch] if 0 in own else []), target=batch if last in own else None, losses=losses)
    optimizer.step()
    optimizer.zero_grad()
    if losses:
        print(f"rank {mesh.get_rank()}: loss {torch.stack(losses).mean().item():.6f}", flush=True)
    torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
'''
"""With one."""
