"""Plans that the simulator refuses: counted by the rule that they break, so that a search says what it has not looked at."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Iterable, Mapping

from hardware_models.errors import InputError

_NUMBERS = re.compile(r"(?<![\w.-])\d+(\.\d+)?(?![\w-])")
"""Numbers that stand alone, not those within names such as 1f1b or bf16."""


def reason_of(refusal: InputError) -> str:
    """The key and the rule that a plan breaks, values as #, so that the plans that break one rule have one reason."""
    return _NUMBERS.sub("#", f"{refusal.key}: {refusal.rule}" if refusal.key else refusal.rule)


def together(parts: Iterable[Mapping[str, int]]) -> dict[str, int]:
    """Refused plans of several parts by their reason, most of them first; ties by the reason's text."""
    found: Counter[str] = Counter()
    for part in parts:
        found.update(part)
    return dict(sorted(found.items(), key=lambda one: (-one[1], one[0])))


def refusal_line(refused: Mapping[str, int]) -> str:
    """What a user reads of them, in one line; empty where nothing was refused."""
    if not refused:
        return ""
    reasons = "; ".join(f"{count:,} x {reason}" for reason, count in refused.items())
    return f"{sum(refused.values()):,} plans were not looked at, for the simulator refuses them: {reasons}"
