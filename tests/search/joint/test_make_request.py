"""Requests: what may be asked for, and the messages for what may not."""

from __future__ import annotations

import pytest

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError
from hardware_models.network.cluster_file import cluster_of_device, load_cluster
from search.joint.make_request import joint_request
from search.joint.space import JointRequest
from search.trainers import TRAINERS
from simulator.model_source import model_source


def request(
    cluster: str = "hgx-h100", *, model: str = "gpt2", trainer: str = "any", allow: tuple[str, ...] = ()
) -> JointRequest:
    wired = load_cluster(cluster).with_gpus(8)
    device = load_hardware(wired.device)
    source = model_source(model, device=device, batch=8)
    return joint_request(source, wired, device, TRAINERS[trainer], global_batch=8, allow=allow)


def test_the_number_format_is_the_devices() -> None:
    assert request().computes == ("bf16",)
    assert request("dgx1-v100").computes == ("fp16",)
    assert request(allow=("fp8", "pipedream-2bw")).computes == ("bf16", "fp8")
    assert request(allow=("fp8", "pipedream-2bw")).extra_schedules == ("pipedream-2bw",)


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ({"allow": ("fp9",)}, ("--allow", "'fp9'", "fp8")),
        ({"cluster": "dgx-a100-80gb", "allow": ("fp8",)}, ("--allow", "a100-sxm-80gb has no products in fp8")),
        ({"trainer": "deepspeed", "allow": ("fp8",)}, ("deepspeed has no products in fp8",)),
        ({"model": "resnet50"}, ("--model", "generated from its configuration")),
    ],
)
def test_what_cannot_be_is_refused_with_what_would_do(arguments: dict[str, object], words: tuple[str, ...]) -> None:
    with pytest.raises(InputError) as raised:
        request(**arguments)  # type: ignore[arg-type]
    for word in words:
        assert word in str(raised.value)


def test_a_device_has_a_catalogued_cluster() -> None:
    found = cluster_of_device("h100-sxm", num_gpus=16)
    assert (found.device, found.num_gpus) == ("h100-sxm", 16)
    with pytest.raises(InputError, match="no catalogued cluster has 4 of this device"):
        cluster_of_device("t4", num_gpus=4)
