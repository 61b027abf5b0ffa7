"""ChainProblem: what rematerialization on a chain must decide upon, in seconds and bytes."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field

from hardware_models.errors import InputError

_OPTION_NAME = re.compile(r"\w+")


@dataclass(frozen=True, slots=True, kw_only=True)
class ChainProblem:
    """A chain of L stages, each of which can run forward with a graph under one of several options.

    Boundary 0 is the input; stage i turns boundary i into boundary i + 1. A schedule ends the backward passes in the order L-1,
    ..., 0. State (i, l) is: boundary i is held, the stages above l have run backward, stages i..l must still do so. Its memory
    m is what remains for it once boundary i, and all that is kept for the stages below i, is held.

    Model:
        With held(l) = resident_bytes[l] + boundary_gradient_bytes[l + 1], which stays while stages i..l run forward, the
        least time T(m, i, l) is the smallest of two kinds of choices::

            keep boundary i, go to boundary j without graphs (F_ck i, F_e i+1, ..., F_e j-1), i < j <= l:
                sum(discard_s[i:j]) + T(m - boundary_bytes[j], j, l) + T(m, i, j - 1)
                if m >= held(l) + discard_peak_bytes[i]
                and m >= held(l) + boundary_bytes[k] + discard_peak_bytes[k]      for every k with i < k < j
            run stage i with a graph under option o (F_all i:o):
                forward_s[i][o] + backward_s[i][o] + T(m - saved_bytes[i][o], i + 1, l)        (0 for T where i = l)
                if m >= held(l) + forward_peak_bytes[i][o]
                and m >= resident_bytes[i] + backward_peak_bytes[i][o]

        A memory limit M, which includes boundary 0, is met by T(M - boundary_bytes[0], 0, L - 1).

    Source:
        Beaumont, Eyraud-Dubois, Herrmann, Joly, Shilova, "Optimal re-materialization strategies for heterogeneous chains" (rotor, ACM
        TOMS 2024); several options a stage: Zhao et al., "Rockmate" (rk-rotor, ICML 2023). Lasting bytes and separate
        forward peaks are ours.

    Not modelled:
        A kept boundary that is let go before its backward pass; transfers to the host; fragmentation.
    """

    discard_s: tuple[float, ...]
    """Time of stage i forward without a graph."""
    discard_peak_bytes: tuple[int, ...]
    """Most bytes that stage i forward without a graph adds to what is held: boundary i + 1 among them, boundary i not."""
    boundary_bytes: tuple[int, ...]
    """Size of each of the L + 1 boundaries."""
    boundary_gradient_bytes: tuple[int, ...]
    """Size of the gradient of each of the L + 1 boundaries; entry l + 1 is held while stages up to l run forward.

    The last entry is held from the start: 0 where the loss's own gradient is made by the backward pass of stage L - 1.
    """
    resident_bytes: tuple[int, ...]
    """Bytes that lastingly exist while stages up to l still wait for their backward pass; never grows with l.

    Parameter gradients of the stages above l in the first micro-batch of a step.
    """
    option_names: tuple[tuple[str, ...], ...]
    """Per stage, the names of its options."""
    forward_s: tuple[tuple[float, ...], ...]
    """Per stage and option: time of forward with a graph."""
    backward_s: tuple[tuple[float, ...], ...]
    """Per stage and option: time of backward."""
    saved_bytes: tuple[tuple[int, ...], ...]
    """Per stage and option: bytes held from forward to backward: boundary i + 1 among them, boundary i not."""
    forward_peak_bytes: tuple[tuple[int, ...], ...]
    """Per stage and option: most bytes that forward with a graph adds to what is held (what it saves among them), boundary i not."""
    backward_peak_bytes: tuple[tuple[int, ...], ...]
    """Per stage and option: most bytes during backward beyond boundary i, the lower stages' bytes and ``resident_bytes[i]``.

    Contains what the graph saved, the gradients of boundaries i + 1 and i, temporaries, and the lasting gradients that this stage
    is the first to leave behind.
    """
    source: str = field(default="chain problem", compare=False)
    """Where the values come from; begins every message about them."""

    @property
    def num_stages(self) -> int:
        """L."""
        return len(self.discard_s)

    def held_bytes(self, last: int) -> int:
        """Bytes that stay while stages up to ``last`` run forward: lasting ones and the gradient of boundary ``last + 1``."""
        return self.resident_bytes[last] + self.boundary_gradient_bytes[last + 1]

    def __post_init__(self) -> None:
        stages = self.num_stages
        if not stages:
            raise InputError(source=self.source, key="discard_s", value=self.discard_s, rule="a chain has at least one stage")
        for name in ("discard_peak_bytes", "resident_bytes", "option_names"):
            self._check_length(name, len(getattr(self, name)), stages, "one per stage")
        for name in ("boundary_bytes", "boundary_gradient_bytes"):
            self._check_length(name, len(getattr(self, name)), stages + 1, "stages + 1 boundaries")
        for name in ("discard_s", "discard_peak_bytes", "boundary_bytes", "boundary_gradient_bytes", "resident_bytes"):
            self._check_values(name, getattr(self, name))
        self._check_options()
        for name in ("forward_s", "backward_s", "saved_bytes", "forward_peak_bytes", "backward_peak_bytes"):
            rows = getattr(self, name)
            self._check_length(name, len(rows), stages, "one per stage")
            for stage, row in enumerate(rows):
                self._check_length(f"{name}[{stage}]", len(row), len(self.option_names[stage]), "one per option")
                self._check_values(f"{name}[{stage}]", row)
        self._check_resident()

    def _check_length(self, name: str, length: int, wanted: int, meaning: str) -> None:
        if length != wanted:
            rule = f"len({name}) == {meaning} must hold, but got {length} != {wanted}"
            raise InputError(source=self.source, key=name, value=None, rule=rule)

    def _check_values(self, name: str, values: Iterable[float]) -> None:
        for index, value in enumerate(values):
            if not (value >= 0 and math.isfinite(value)):
                raise InputError(source=self.source, key=f"{name}[{index}]", value=value, rule="0 <= value < inf must hold")

    def _check_options(self) -> None:
        for stage, names in enumerate(self.option_names):
            key = f"option_names[{stage}]"
            if not names or len(set(names)) != len(names):
                raise InputError(
                    source=self.source, key=key, value=names, rule="a stage has one or more options of distinct names"
                )
            for name in names:
                if _OPTION_NAME.fullmatch(name) is None:
                    rule = "an option's name is made of letters, digits and _ (it is written into sequences)"
                    raise InputError(source=self.source, key=key, value=name, rule=rule)

    def _check_resident(self) -> None:
        for last, (lower, upper) in enumerate(zip(self.resident_bytes, self.resident_bytes[1:], strict=False)):
            if lower < upper:
                raise InputError(
                    source=self.source, key=f"resident_bytes[{last}]", value=lower,
                    rule=f"resident_bytes[l] >= resident_bytes[l + 1] must hold, but got {lower} < {upper}",
                    remedy="count bytes that upper stages have left behind, in the order in which they run backward",
                )  # fmt: skip

    @classmethod
    def classic(
        cls,
        f: Sequence[float],
        b: Sequence[float],
        a: Sequence[int],
        abar: Sequence[int],
        of: Sequence[int] | None = None,
        ob: Sequence[int] | None = None,
    ) -> ChainProblem:
        """The chain of the rotor recurrence: one option, ``all``, whose forward takes as long with a graph as without.

        Args:
            f: forward time of each of the L stages, seconds.
            b: backward times, seconds.
            a: sizes a_0 ... a_L of the boundaries, bytes; also those of their gradients.
            abar: entry i is abar_{i+1}, what the graph of stage i saves, a_{i+1} among it, bytes.
            of: temporary bytes of each forward; 0 if not given.
            ob: temporary bytes of each backward; 0 if not given.

        Returns:
            The problem whose T is exactly the recurrence's Opt.

        Raises:
            InputError: lengths differ, a value is negative, or abar_{i+1} < a_{i+1}.

        Model:
            The recurrence asks for
            (1) m >= a_{i+1} + abar_{i+1} + of_i and (2) m >= a_i + a_{i+1} + abar_{i+1} + ob_i in Opt[m][i][i], also where F_all i
            begins a longer chain (it reuses that entry), and
            (3) m >= a_{l+1} + a_{i+1} + of_i and (4) m >= a_{l+1} + a_k + a_{k+1} + of_k for i < k < l in Opt[m][i][l].
            Hence::

                boundary_gradient_bytes = a, resident_bytes = 0, so that held(l) = a_{l+1}
                discard_peak_bytes[i]   = a_{i+1} + of_i                       (3), (4) of a run without graphs
                forward_peak_bytes[i]   = a_{i+1} + of_i                       (3) of F_all
                backward_peak_bytes[i]  = abar_{i+1} + a_{i+1} + max(of_i, a_i + ob_i)      (1), (2)
                saved_bytes[i]          = abar_{i+1}

            (4) of an F_all follows from the sub-chain's own (3) and (4), as abar >= a; so does that of the stages at and after j
            of a run to j.

        Source:
            rotor (TOMS 2024), the algorithm for persistent schedules.

        Not modelled:
            The true need of F_all i before the backward of l, a_{l+1} + abar_{i+1} + of_i: the recurrence has a_{i+1} in the
            place of a_{l+1}, so it can promise too little where boundaries grow. Fill the general terms to have the true one.
        """
        stages = len(f)
        of, ob = (of if of is not None else [0] * stages), (ob if ob is not None else [0] * stages)
        for name, values, wanted in (
            ("b", b, stages),
            ("abar", abar, stages),
            ("of", of, stages),
            ("ob", ob, stages),
            ("a", a, stages + 1),
        ):
            if len(values) != wanted:
                rule = f"len({name}) must be {wanted} for {stages} stages, but got {len(values)}"
                raise InputError(source="classic chain", key=name, value=None, rule=rule)
        for i in range(stages):
            if abar[i] < a[i + 1]:
                rule = f"abar[i] >= a[i + 1] must hold, but got {abar[i]} < {a[i + 1]}"
                raise InputError(
                    source="classic chain", key=f"abar[{i}]", value=abar[i], rule=rule, remedy="abar counts the output"
                )
        peaks = tuple(a[i + 1] + of[i] for i in range(stages))
        return cls(
            discard_s=tuple(f),
            discard_peak_bytes=peaks,
            boundary_bytes=tuple(a),
            boundary_gradient_bytes=tuple(a),
            resident_bytes=(0,) * stages,
            option_names=(("all",),) * stages,
            forward_s=tuple((time,) for time in f),
            backward_s=tuple((time,) for time in b),
            saved_bytes=tuple((size,) for size in abar),
            forward_peak_bytes=tuple((size,) for size in peaks),
            backward_peak_bytes=tuple((abar[i] + a[i + 1] + max(of[i], a[i] + ob[i]),) for i in range(stages)),
            source="classic chain",
        )
