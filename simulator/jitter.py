"""Jitter and stragglers: the same program with durations sampled beforehand."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace

import numpy as np

from simulator.program import Program, Stream


def with_jitter(
    program: Program, generator: np.random.Generator, *, relative_deviation: float = 0.0, stragglers: Mapping[int, float] | None = None
) -> Program:  # fmt: skip
    """A program whose instructions take longer or shorter than priced.

    **Model**: each duration and each transfer's bytes are multiplied by an independent log-normal factor with mean 1 and the given relative standard deviation; on a
    straggler, compute is multiplied by its factor besides. Memory events keep their share of the duration.

    Args:
        program: priced.
        generator: of random numbers.
        relative_deviation: standard deviation over mean, at least 0.
        stragglers: factor on the compute of a device, positive; 1.1 is ten percent slower.

    Raises:
        ValueError: a deviation below 0, a factor that is not positive, or a device that the program does not have.
    """
    if relative_deviation < 0.0:
        raise ValueError(f"relative_deviation >= 0 must hold, but got {relative_deviation}")
    sigma = float(np.sqrt(np.log1p(relative_deviation**2)))
    factors = (
        np.exp(generator.normal(-(sigma**2) / 2.0, sigma, program.num_instructions))
        if sigma
        else np.ones(program.num_instructions)
    )
    sizes = factors[program.transfers.instruction]
    for device, factor in (stragglers or {}).items():
        if not 0 <= device < program.num_devices or factor <= 0.0:
            raise ValueError(
                f"0 <= device < {program.num_devices} and factor > 0 must hold, but got device {device}, factor {factor}"
            )
        factors = np.where((program.device == device) & (program.stream == Stream.COMPUTE), factors * factor, factors)
    events = np.repeat(factors, np.diff(program.memory_offsets))
    return replace(
        program, duration_s=program.duration_s * factors, memory_time_s=program.memory_time_s * events,
        transfers=replace(program.transfers, size_bytes=program.transfers.size_bytes * sizes),
    )  # fmt: skip
