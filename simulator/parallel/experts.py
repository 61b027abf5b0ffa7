"""Experts on the ranks of a cluster: what each rank holds of them."""

from __future__ import annotations

from simulator.parallel.stages import Stage
from simulator.plan_sections import Parallel
from simulator.presets import TransformerConfig

EXPERT_BLOCK = "experts"
_MATRICES = 3
"""Of a SwiGLU network: gate, up, down."""


def expert_elements(stage: Stage, config: TransformerConfig, split: Parallel) -> int:
    """Parameters of routed experts that a rank of a stage holds; the router and shared experts, which all ranks hold, are not among them."""
    if config.experts is None:
        return 0
    layers = sum(block.name == EXPERT_BLOCK for block in stage.blocks)
    return layers * (config.experts.num_experts // split.ep) * _MATRICES * config.hidden * (config.experts.ffn // split.tp)
