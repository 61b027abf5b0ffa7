"""What a trainer's own Python takes around its kernels: modules, autograd functions, scripted fusions, forked random states, checkpointing."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType

from simulator.parallel.framework import AA_SCALING
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


@dataclass(frozen=True, slots=True, kw_only=True)
class HostStalls:
    """Seconds for which an idle device waits for its host before a pass, where the trainer synchronises the two."""

    batch_s: float = 0.0
    """Before each forward pass, on every stage: the micro-batch is fetched, sent round the tensor parallel group, and its sizes are read back."""
    exchange_s: float = 0.0
    """Around each exchange with a neighbour that the host waits for, beyond its bytes."""
    attention_s: float = 0.0
    """In each forward run of fused attention, before which the host reads a number back."""


NO_STALLS = HostStalls()
_BATCH_S, _EXCHANGE_S = 0.51e-3, 17e-6
_READ_BACK_S, _ATTENTION_S = 30e-6, 24e-6
_STALLS: Mapping[str, HostStalls] = MappingProxyType(
    {
        "megatron-lm@2021": HostStalls(batch_s=_BATCH_S, exchange_s=_EXCHANGE_S),
        "megatron-core@2023": HostStalls(batch_s=_BATCH_S, exchange_s=_EXCHANGE_S),
        "megatron-core": HostStalls(exchange_s=_EXCHANGE_S),
        **dict.fromkeys(AA_SCALING, HostStalls(attention_s=_ATTENTION_S)),
    }
)
"""By framework. Until the end of 2023 every stage of Megatron read a batch, with copies that wait for the device (``broadcast_data``, megatron/core/tensor_parallel/data.py); later ones
do so on the first and the last stage, without waiting. Exchanges end in ``torch.cuda.synchronize`` (``batch_p2p_sync``, megatron/core/pipeline_parallel/p2p_communication.py), so nothing is on the
device while the host posts one.

**Source**: batch: 524, 520 and 522 ms for 1,024 micro-batches between synchronising timers, GPT of 40 layers on 8 GPUs in September 2021 (``batch-generator`` of a log of Megatron-LM v2.5;
0.71 ms each in four of BERT on a DGX A100, xduan7/scalable-transformer docs/megatron_bert_345m.md). Exchange: 17 us of Python to post a send and a receipt and wait for both (``python -m validation.layer_host_time``
on AMD EPYC Genoa, torch 2.13.0). Aleph Alpha's trainer reads the longest sequence's length back before each fused attention (``get_max_seq_length``: ``.item()``; Aleph-Alpha/scaling @01b9d21dba
src/scaling/core/nn/attention/attention.py): a copy of few bytes takes 30 us (te42kyfo/gpu-benches README.md @1c36d509ee, cuda-memcpy), and what follows up to the kernel's launch 24 us of Python (three views and an
autograd function of 16 arguments, same command).

**Not modelled**: what NCCL takes to launch, beyond a message's latency; the return from ``synchronize``."""


def stalls_of(framework: str, architecture: str) -> HostStalls:
    """Stalls of a framework beside devices of an architecture; the batch's were measured on such a host, those of exchanges take longer on older ones."""
    found, slower = _STALLS.get(framework, NO_STALLS), OLDER_HOSTS.get(architecture, 1.0)
    read_back_s = _READ_BACK_S + found.attention_s * slower if found.attention_s else 0.0
    return replace(found, exchange_s=found.exchange_s * slower, attention_s=read_back_s)
