"""What a step may change on a module, put back when the step fails."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch


@contextmanager
def module_kept(module: torch.nn.Module, device: torch.device) -> Iterator[None]:
    """Gives a module back as it was if the body raises: buffers, gradients, modes and the random generators.

    Copies of the buffers are held on the host. Parameters keep their values as long as the learning rate is 0; those that were on the host come
    back with `validation.host_traffic.HostTraffic.leave`.
    """
    buffers = [buffer.detach().to("cpu", copy=True) for buffer in module.buffers()]
    gradients = [(parameter, parameter.grad) for parameter in module.parameters()]
    modes = [(part, part.training) for part in module.modules()]
    host, accelerator = torch.get_rng_state(), torch.cuda.get_rng_state(device) if device.type == "cuda" else None
    try:
        yield
    except BaseException:
        with torch.no_grad():
            for buffer, value in zip(module.buffers(), buffers, strict=True):
                buffer.copy_(value)
        for parameter, gradient in gradients:
            parameter.grad = gradient
        for part, training in modes:
            part.training = training
        torch.set_rng_state(host)
        if accelerator is not None:
            torch.cuda.set_rng_state(accelerator, device)
        raise
