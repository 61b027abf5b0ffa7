"""At which sizes each schedule exists, and how it refuses others."""

from __future__ import annotations

from hardware_models.errors import InputError

EVEN_RANKS = ("chimera", "dualpipe")
"""Schedules of two directions: half of the ranks begin each."""
FULL_TWICE = ("dualpipe", "dualpipe-v")
"""Schedules that need two micro-batches a rank to fill."""
AT_LEAST_RANKS = ("pipedream-2bw",)


def check_sizes(schedule: str, *, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> None:
    """Refuses sizes at which the schedule does not exist.

    Raises:
        InputError: names the count and the rule.
    """
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches, "virtual_stages": virtual_stages}
    for key, value in sizes.items():
        if value < 1:
            raise size_error(schedule, key, value, f"{key} >= 1 must hold, but got {value}")
    if schedule in EVEN_RANKS and num_ranks % 2:
        raise size_error(schedule, "num_ranks", num_ranks, f"num_ranks must be even, but got {num_ranks}")
    if schedule in FULL_TWICE and num_microbatches < 2 * num_ranks:
        rule = f"num_microbatches >= 2 * num_ranks must hold, but got {num_microbatches} < {2 * num_ranks}"
        raise size_error(schedule, "num_microbatches", num_microbatches, rule, "take more, or fewer ranks")
    if schedule == "dualpipe" and num_microbatches % 2:
        rule = f"num_microbatches must be even, but got {num_microbatches}"
        raise size_error(schedule, "num_microbatches", num_microbatches, rule, "take one more")
    if schedule in AT_LEAST_RANKS and num_microbatches < num_ranks:
        rule = f"num_microbatches >= num_ranks must hold, but got {num_microbatches} < {num_ranks}"
        raise size_error(schedule, "num_microbatches", num_microbatches, rule, "accumulate over more micro-batches")
    if schedule == "interleaved":
        round_size(schedule, num_ranks, num_microbatches)


def round_size(schedule: str, num_ranks: int, num_microbatches: int) -> int:
    """Micro-batches that go through a chunk before the next chunk is due.

    Raises:
        InputError: the rounds are not equal.
    """
    rounds = max(1, num_microbatches // num_ranks)
    if num_microbatches % rounds:
        rule = (
            "num_microbatches % max(1, num_microbatches // num_ranks) == 0 must hold, but got "
            f"{num_microbatches} % {rounds} = {num_microbatches % rounds}"
        )
        near = num_microbatches - num_microbatches % num_ranks
        raise size_error(schedule, "num_microbatches", num_microbatches, rule, f"take {near} or {near + num_ranks}")
    return num_microbatches // rounds


def size_error(schedule: str, key: str, value: object, rule: str, remedy: str = "") -> InputError:
    """The error of a schedule that does not exist at a size."""
    return InputError(source=f"schedule {schedule}", key=key, value=value, rule=rule, remedy=remedy)
