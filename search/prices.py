"""Prices: what an hour of a device costs, and so a step and a token."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hardware_models.errors import InputError
from hardware_models.text_files import text_of, toml_of

HOUR_S = 3600.0


@dataclass(frozen=True, slots=True, kw_only=True)
class Prices:
    """Currency per hour of a device, its share of host, network and power included."""

    source: str
    currency: str
    per_hour: Mapping[str, float]
    """By the device's catalogue name."""

    def cost(self, device: str, *, num_gpus: int, step_time_s: float, tokens: float) -> dict[str, Any]:
        """What a step costs.

        **Model**: devices x price x time; tokens (samples, for models without a sequence) are those of the whole step.

        Args:
            device: catalogue name.
            num_gpus: devices that are paid for.
            step_time_s: of the step.
            tokens: that the step trains on.

        Raises:
            InputError: the file has no price of the device.
        """
        if device not in self.per_hour:
            rule = f"no price of this device; priced are {', '.join(self.per_hour) or 'none'}"
            raise InputError(
                source=self.source,
                key=f"per_hour.{device}",
                value=None,
                rule=rule,
                remedy="add it: currency per device and hour",
            )
        per_step = num_gpus * self.per_hour[device] * step_time_s / HOUR_S
        return {
            "currency": self.currency, "per_gpu_hour": self.per_hour[device], "per_step": per_step, "per_token": per_step / tokens
        }  # fmt: skip


def read_prices(path: Path) -> Prices:
    """The prices of a TOML file: ``currency = "USD"`` and a table ``per_hour`` with a number for each device.

    Raises:
        InputError: no such file, TOML that does not parse, another key, or a price that is no positive number.
    """
    source = str(path)
    table = toml_of(text_of(path, remedy="give the path of a price file"), source=source)
    for key in table:
        if key not in {"currency", "per_hour"}:
            raise InputError(source=source, key=key, value=table[key], rule="unknown key; known are currency, per_hour")
    currency, per_hour = table.get("currency"), table.get("per_hour")
    if not isinstance(currency, str) or not currency:
        raise InputError(source=source, key="currency", value=currency, rule='a name such as "USD" must be given')
    if not isinstance(per_hour, dict) or not per_hour:
        rule = "a table of prices by device must be given"
        raise InputError(source=source, key="per_hour", value=per_hour, rule=rule, remedy="[per_hour]\nh100-sxm = 2.5")
    for name, value in per_hour.items():
        if isinstance(value, bool) or not isinstance(value, int | float) or not (value > 0 and math.isfinite(value)):
            raise InputError(source=source, key=f"per_hour.{name}", value=value, rule="0 < price < inf must hold")
    return Prices(source=source, currency=currency, per_hour={name: float(value) for name, value in per_hour.items()})
