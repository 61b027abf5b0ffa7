"""What ``schedlab what-if`` prints: the step as it is, what was asked for, and which values of the hardware its time hangs on."""

from __future__ import annotations

from collections.abc import Sequence

from rich.console import Group, RenderableType

from simulator.what_if import KNOBS, Effect, Prediction
from validation.reports import table_of

LEAST_CHANGE = 1e-3
"""A value that moves the step by less, to either side, is named in one line with the others."""

Pair = tuple[Effect, Effect]
"""A value made better, and made worse."""


def what_if_report(
    model: str, base: Prediction, asked: Sequence[Effect], pairs: Sequence[Pair], factor: float
) -> RenderableType:
    """The whole answer.

    Args:
        model: as the user named it.
        base: the step without any change.
        asked: what ``--set`` asked for: together first, then each alone.
        pairs: each value of the hardware better and worse.
        factor: by which.
    """
    parts: list[RenderableType] = [
        f"{model}: {base.step_time_s:.4g} s a step, bottleneck {base.bottleneck}, {_fits(fits=base.fits)}"
    ]
    rows: list[tuple[str, ...]]
    if asked:
        rows = [
            (one.key, one.value, f"{one.step_time_s:.4g}", _change(one), one.bottleneck, _fits(fits=one.fits)) for one in asked
        ]
        parts.append(table_of("What was asked", ("value", "set to", "step (s)", "change", "bottleneck", "memory"), rows))
    shown, quiet = telling(pairs)
    if shown:
        columns = ("value", "what it is", "better", "step (s)", "change", "worse", "step (s)", "change", "what else changes")
        rows = [_pair_row(pair, base) for pair in shown]
        parts.append(table_of(f"What the time hangs on: each value {factor:g} times better and worse", columns, rows))
    if quiet:
        parts.append(f"Less than {LEAST_CHANGE:.1%} to either side: {', '.join(better.key for better, _ in quiet)}.")
    return Group(*parts)


def telling(pairs: Sequence[Pair]) -> tuple[list[Pair], list[Pair]]:
    """Pairs that move the step or what fits, and those that do not."""
    shown = [
        pair
        for pair in pairs
        if any(abs(1.0 / one.speedup - 1.0) >= LEAST_CHANGE for one in pair) or pair[0].fits != pair[1].fits
    ]
    return shown, [pair for pair in pairs if pair not in shown]


def _pair_row(pair: Pair, base: Prediction) -> tuple[str, ...]:
    better, worse = pair
    shifts = [f"{one.value}: {text}" for one in pair if (text := _shift(one, base))]
    cells = [cell for one in (better, worse) for cell in (one.value, f"{one.step_time_s:.4g}", _change(one))]
    return better.key, KNOBS[better.key].text, *cells, "; ".join(shifts)


def _shift(one: Effect, base: Prediction) -> str:
    """What a change does beside moving the time; empty where nothing."""
    moved = [f"bottleneck {one.bottleneck}"] if one.bottleneck != base.bottleneck else []
    return ", ".join(moved + ([_fits(fits=one.fits)] if one.fits != base.fits else []))


def _change(one: Effect) -> str:
    return f"{1.0 / one.speedup - 1.0:+.1%}"


def _fits(*, fits: bool) -> str:
    return "fits" if fits else "does not fit"
