"""What a user asks of a joint search, checked: number formats that device and trainer have, and orders that must be allowed by name."""

from __future__ import annotations

from hardware_models.errors import InputError
from hardware_models.network.cluster import Cluster
from hardware_models.profile import DeviceProfile
from search.joint.space import JointRequest
from search.trainers import Trainer
from simulator.model_source import DEFAULT_SEQ_LEN, ModelSource
from simulator.precision import PRODUCTS_IN, STORED_AS

PREFERRED = ("bf16", "fp16", "fp32")
"""Number format of products: the first that device and trainer have, unless more is allowed."""
ALLOWABLE = ("fp8", "fp16", "pipedream-2bw")
"""Changes what is computed: fewer bits in products, or older weights."""


def joint_request(
    source: ModelSource, cluster: Cluster, device: DeviceProfile, trainer: Trainer, *, global_batch: int, allow: tuple[str, ...] = (),
    budget_bytes: int | None = None,
) -> JointRequest:  # fmt: skip
    """The request.

    Args:
        source: a model that is generated from a configuration.
        cluster: with exactly the devices to use.
        device: their profile.
        trainer: whose limits hold.
        global_batch: samples per step.
        allow: of `ALLOWABLE`.
        budget_bytes: most that may be allocated on a device; None: what it has.

    Raises:
        InputError: names what cannot be, and what would do.
    """
    if source.config is None:
        raise InputError(
            source="--model", key="name", value=source.name, rule="over several devices a model is generated from its configuration, not traced",
            remedy="name a preset ('schedlab models') or a Hugging Face config.json",
        )  # fmt: skip
    for name in allow:
        if name not in ALLOWABLE:
            raise InputError(source="--allow", key="", value=name, rule=f"known for several devices are {', '.join(ALLOWABLE)}")
    usual = next((name for name in PREFERRED if _has(device, name) and _runs(trainer, name)), None)
    if usual is None:
        rule = f"{trainer.name} on {device.name} has none of {', '.join(PREFERRED)}"
        raise InputError(source="--hardware", key="device", value=device.name, rule=rule)
    more = tuple(name for name in allow if name in STORED_AS and name != usual)
    for name in more:
        if not _has(device, name) or not _runs(trainer, name):
            missing = device.name if not _has(device, name) else trainer.name
            raise InputError(
                source="--allow", key="", value=name, rule=f"{missing} has no products in {name}", remedy="leave it out"
            )
    return JointRequest(
        config=source.config, seq_len=source.seq_len or min(source.config.max_positions, DEFAULT_SEQ_LEN), global_batch=global_batch, cluster=cluster,
        trainer=trainer, computes=(usual, *more), budget_bytes=budget_bytes, extra_schedules=tuple(name for name in allow if name not in STORED_AS),
    )  # fmt: skip


def _has(device: DeviceProfile, compute: str) -> bool:
    """Whether the device has a rate for products of a format."""
    try:
        device.peak(PRODUCTS_IN.get(compute, STORED_AS[compute]))
    except InputError:
        return False
    return True


def _runs(trainer: Trainer, compute: str) -> bool:
    return not trainer.computes or compute in trainer.computes
