"""What torch's optimizers keep and move, by name."""

from __future__ import annotations

OPTIMIZER_STATES = {"adamw": 2, "sgd": 0}
"""Tensors of the parameter's own size that an optimizer keeps."""
STEP_COUNT_BYTES = {"adamw": 4, "sgd": 0}
"""The step count that torch's optimizers keep for each parameter tensor."""
OPTIMIZER_PASSES = {"adamw": (4, 3), "sgd": (2, 1)}
"""(reads, writes) of the parameter's size in one fused step: parameter, gradient and states."""
