"""What every schedule asks of its sizes, and how it refuses others."""

from __future__ import annotations

from hardware_models.errors import InputError


def check_sizes(schedule: str, *, num_ranks: int, num_microbatches: int, virtual_stages: int = 1) -> None:
    """Refuses counts below one.

    Raises:
        InputError: names the count.
    """
    sizes = {"num_ranks": num_ranks, "num_microbatches": num_microbatches, "virtual_stages": virtual_stages}
    for key, value in sizes.items():
        if value < 1:
            raise size_error(schedule, key, value, f"{key} >= 1 must hold, but got {value}")


def size_error(schedule: str, key: str, value: object, rule: str, remedy: str = "") -> InputError:
    """The error of a schedule that does not exist at a size."""
    return InputError(source=f"schedule {schedule}", key=key, value=value, rule=rule, remedy=remedy)
