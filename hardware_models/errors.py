"""What can be wrong with what a user gave us. Everything else is our own fault and raises as it is."""

from __future__ import annotations


class InputError(ValueError):
    """A file, flag or name that breaks a rule: says where, which value, the rule and what would do (exit status 2).

    Args:
        source: the file, flag or object that holds the value.
        key: the key or argument, dotted for nested ones; empty when the source as a whole is wrong.
        value: the offending value.
        rule: the violated relation, with its values.
        remedy: what would do instead.
    """

    def __init__(self, *, source: str, key: str, value: object, rule: str, remedy: str = "") -> None:
        self.source, self.key, self.value, self.rule, self.remedy = source, key, value, rule, remedy
        where = f"{source}: {key}" if key else source
        shown = "" if value is None else f" = {value!r}"
        super().__init__(f"{where}{shown}: {rule}" + (f"; {remedy}" if remedy else ""))


class UnknownNameError(InputError):
    """A name that no catalogue holds; lists the known ones."""

    def __init__(self, *, source: str, key: str, value: object, known: tuple[str, ...], remedy: str = "") -> None:
        self.known = known
        rule = "unknown name; known are " + ", ".join(known)
        super().__init__(source=source, key=key, value=value, rule=rule, remedy=remedy)


class InfeasibleError(ValueError):
    """No schedule satisfies the limits: names the limit and the smallest change that fits (exit status 3).

    The one exception that a search catches.

    Args:
        limit: the limit that nothing satisfies, with its value.
        smallest_change: what would.
        needed_bytes: the least memory that would fit, where memory is the limit.
    """

    def __init__(self, *, limit: str, smallest_change: str, needed_bytes: int = 0) -> None:
        self.limit, self.smallest_change, self.needed_bytes = limit, smallest_change, needed_bytes
        super().__init__(f"infeasible: {limit}; {smallest_change}")


class RunFailedError(RuntimeError):
    """A run on real processes that did not come to its end: says which one failed and why (exit status 1)."""
