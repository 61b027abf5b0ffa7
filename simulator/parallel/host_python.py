"""What a trainer's own Python takes around its kernels: modules, autograd functions, scripted fusions, forked random states, checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from simulator.parallel.recompute import MEGATRON


@dataclass(frozen=True, slots=True, kw_only=True)
class PythonSeconds:
    """Host seconds for one run of a block (half a layer) beyond its kernels' own dispatch, on the host that was measured."""

    forward_s: float = 0.0
    backward_s: float = 0.0
    checkpoint_s: float = 0.0
    """Once more for a block that runs again in the backward pass: states saved, restored and forked."""


BARE_OPERATOR_S = 2e-6
"""An operator without autograd from Python, no kernel of it launched, on the host that was measured (as `_MEGATRON_LAYER`)."""
NO_PYTHON = PythonSeconds()
"""Of kernels that a captured graph or a compiled wrapper launches."""
_MEGATRON_LAYER = PythonSeconds(forward_s=265e-6, backward_s=240e-6, checkpoint_s=220e-6)
"""Half of a layer written as Megatron-LM v2.5 writes it, less 17 kernels forward and 36 backward at the 2 us that a bare operator took there: 570 us forward, 550 us backward, 2.13 ms
both with checkpointing (``python -m validation.layer_host_time`` on AMD EPYC Genoa, torch 2.13.0, least disturbed of four runs; others up to 25% longer)."""
PYTHON: Mapping[str, PythonSeconds] = MappingProxyType(dict.fromkeys(MEGATRON, _MEGATRON_LAYER))
"""By framework; others are taken as bare kernels: not measured."""
OLDER_HOSTS: Mapping[str, float] = MappingProxyType(dict.fromkeys(("pascal", "volta", "turing", "ampere"), 1.48))
"""Time on the hosts that an architecture's nodes were sold with over that on the measured one, where they are older. EPYC 7742 (DGX A100: NVIDIA data sheet) against Genoa: 1.19 and 1.14
in instructions per clock (AMD on Zen 3, 2020, and Zen 4 EPYC, 2022), 3.7 over 3.4 GHz boost. Hosts before it count as it: at least."""


def python_seconds(framework: str, architecture: str) -> PythonSeconds:
    """Host seconds of a framework's Python for one run of a block, on the hosts of an architecture; zeros where nothing was measured."""
    own, slower = PYTHON.get(framework, NO_PYTHON), OLDER_HOSTS.get(architecture, 1.0)
    return PythonSeconds(
        forward_s=own.forward_s * slower, backward_s=own.backward_s * slower, checkpoint_s=own.checkpoint_s * slower
    )
