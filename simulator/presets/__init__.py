"""Presets: transformer families generated from their configurations, without torch."""

from __future__ import annotations

from simulator.presets.build import build_workload
from simulator.presets.config import Experts, LatentAttention, TransformerConfig
from simulator.presets.hugging_face import load_config
from simulator.presets.table import PRESETS, preset

__all__ = ["PRESETS", "Experts", "LatentAttention", "TransformerConfig", "build_workload", "load_config", "preset"]
