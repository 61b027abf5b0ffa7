"""What a user means by a model: a preset, a ``config.json``, a named definition, ``package.module:function`` or ``FILE.py:function``.

Families of transformers are generated from their configuration, without torch, for GPUs; what runs on a CPU, and everything else,
is traced, so that replay can run what was predicted.
"""

from __future__ import annotations

import importlib
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from typing import Any

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.profile import DeviceProfile
from simulator.models import MODELS
from simulator.plan import Plan, check_model, check_single_device, resolve_batch
from simulator.presets import PRESETS, TransformerConfig, build_workload, load_config, preset
from simulator.workload import Workload

SIMULATED_PRECISIONS = ("fp32",)
"""Precisions of a plan in which transformers are generated for one device so far."""
TRACED_PRECISIONS = ("fp32", "tf32", "bf16", "fp16", "fp8", "int8")
"""Those in which models are traced."""
DEFAULT_BATCH = 8
DEFAULT_SEQ_LEN = 2048
MOST_TOKENS = 1e12
"""Tokens of a step; beyond it lie slips of the keyboard, and sizes that leave 64 bits."""


@dataclass(frozen=True, kw_only=True)
class ModelSource:
    """A model whose workload can be had at any micro-batch."""

    name: str
    config: TransformerConfig | None
    """None: the model is traced."""
    batch: int | None = None
    """Samples per step; None: the model's own."""
    seq_len: int | None = None
    precision: str = "fp32"
    """The mode in which a traced model runs (`simulator.plan.Precision.mode`)."""
    compiled: bool = False
    """Whether a traced model runs compiled, block by block."""
    _workloads: dict[int, Workload] = field(default_factory=dict, repr=False, compare=False)
    _traces: dict[int, Any] = field(default_factory=dict, repr=False, compare=False)

    def __post_init__(self) -> None:
        size = (self.batch or 1) * (self.seq_len or 1)
        if size > MOST_TOKENS:
            raise InputError(
                source=f"model {self.name}", key="batch, seq_len", value=(self.batch, self.seq_len),
                rule=f"batch * seq_len <= {MOST_TOKENS:.0e} must hold, but got {size:.3g}", remedy="give samples and tokens, not bytes",
            )  # fmt: skip

    @cached_property
    def _tracing(self) -> Any:
        """The one part that needs torch, loaded when a model is traced."""
        return importlib.import_module("simulator.tracing.traced_model")

    @cached_property
    def definition(self) -> Any:
        """The `simulator.tracing.traced_model.TracedModel`.

        Raises:
            InputError: the model has no definition that can run.
        """
        return self._tracing.traced_model(self.name, batch=self.batch, seq_len=self.seq_len)

    @cached_property
    def global_batch(self) -> int:
        """Samples per step unless a plan says otherwise."""
        if self.batch is not None:
            return self.batch
        if self.config is not None:
            return DEFAULT_BATCH
        if self.name in MODELS:
            return MODELS[self.name].batch
        return int(self.traced(None).workload.micro_batch)

    def traced(self, micro_batch: int | None) -> Any:
        """The `simulator.tracing.trace.Traced` of a micro-batch, traced once."""
        key = micro_batch or 0
        if key not in self._traces:
            self._traces[key] = self.definition.traced(micro_batch, self.precision, compiled=self.compiled)
        return self._traces[key]

    def workload(self, micro_batch: int) -> Workload:
        """One micro-batch's workload, made once: traced in its precision, generated in float32.

        Raises:
            InputError: the trace fails.
        """
        if micro_batch not in self._workloads:
            if self.config is None:
                self._workloads[micro_batch] = self.traced(micro_batch).workload
            else:
                seq_len = self.seq_len or min(self.config.max_positions, DEFAULT_SEQ_LEN)
                self._workloads[micro_batch] = build_workload(
                    self.config, micro_batch=micro_batch, seq_len=seq_len, dtype="float32"
                )
        return self._workloads[micro_batch]

    def resolve(self, plan: Plan) -> Plan:
        """The plan with this model's batch where it gives none, checked against the model and what one device can do.

        Raises:
            InputError: names the rule that the plan breaks.
        """
        if self.config is not None:
            config = self.config
            experts = config.experts.num_experts if config.experts else None
            check_model(
                plan, heads=config.heads, kv_heads=config.num_kv_heads, layers=config.layers, experts=experts,
                seq_len=self.seq_len or min(config.max_positions, DEFAULT_SEQ_LEN),
            )  # fmt: skip
        is_traced = self.config is None
        check_single_device(plan, compute=TRACED_PRECISIONS if is_traced else SIMULATED_PRECISIONS, compiled=is_traced)
        return resolve_batch(plan, batch=self.global_batch, seq_len=self.seq_len)

    def with_plan_batch(self, plan: Plan) -> ModelSource:
        """This model at the batch, sequence length and precision that a plan asks for, compiled or not."""
        batch, seq_len = plan.batch.global_batch or self.batch, plan.batch.seq_len or self.seq_len
        return (
            self
            if (batch, seq_len, plan.precision.mode, plan.runtime.compile)
            == (self.batch, self.seq_len, self.precision, self.compiled)
            else replace(
                self,
                batch=batch,
                seq_len=seq_len,
                precision=plan.precision.mode,
                compiled=plan.runtime.compile,
                _workloads={},
                _traces={},
            )
        )


def model_source(
    name: str, *, device: DeviceProfile | None = None, batch: int | None = None, seq_len: int | None = None
) -> ModelSource:
    """The model of a name.

    Args:
        name: a preset, the path of a Hugging Face ``config.json``, a named definition, ``package.module:function`` or ``FILE.py:function``.
        device: decides for names that are both: generated for GPUs, traced for a CPU or for None.
        batch: samples per step; default: the model's.
        seq_len: tokens per sample; default: the model's.

    Raises:
        UnknownNameError: none of these; lists the known names.
        InputError: a file that is no configuration of a known family.
    """
    generated = device is not None and device.kind != "cpu"
    config: TransformerConfig | None = None
    if name.endswith(".json"):
        config = load_config(Path(name))
    elif ":" in name:
        pass
    elif name in PRESETS and (generated or name not in MODELS):
        config = preset(name)
    elif name not in MODELS:
        known = tuple(sorted({*PRESETS, *MODELS}))
        raise UnknownNameError(
            source="--model",
            key="name",
            value=name,
            known=known,
            remedy="or give a config.json, package.module:function or FILE.py:function",
        )
    return ModelSource(name=name, config=config, batch=batch, seq_len=seq_len)
