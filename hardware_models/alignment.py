"""Products whose rows begin at odd addresses: how much slower tensor cores are fed, and how that bounds a product's time."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from types import MappingProxyType
from typing import Annotated, Literal

import numpy as np
from numpy.typing import NDArray
from pydantic import Field

from hardware_models.errors import UnknownNameError
from hardware_models.kernel import COPY_BYTES, SECTOR_BYTES, Kernel, on_tensor_cores, row_bytes
from hardware_models.physical_law import SHARPNESS
from hardware_models.profile import DeviceProfile
from hardware_models.toml_file import Fraction, Name, NonNegative, Positive, Section, SourcedSection, read_section

ALIGNMENT_FILE = Path(__file__).parent / "data" / "alignment.toml"
_Rates = dict[Annotated[int, Field(ge=2, lt=COPY_BYTES)], Positive]


class LibrarySection(SourcedSection):
    """One ``[[version]]`` of the product library."""

    name: Name
    sector_share: Fraction
    plain: _Rates
    batched_float16: _Rates
    batched_bfloat16: _Rates
    relative_standard_error: NonNegative


class AlignmentFile(Section):
    """``alignment.toml``."""

    format: Literal[1]
    version: list[LibrarySection] = Field(min_length=1)


@dataclass(frozen=True, slots=True, kw_only=True)
class Alignment:
    """What misaligned rows cost under one version of the product library.

    **Model**: a product takes ``(t^s + (FLOPs / bound)^s)^(1/s)``, t its time with aligned rows and s = `SHARPNESS`. Rows that no 16-byte copy can fetch are loaded element by
    element through registers, so ``bound`` is so many FLOP per clock and multiprocessor, whatever the tensor cores' own rate; rows of 16 but not 32 bytes split the cache's
    sectors, which leaves ``sector_share`` of the peak.

    **Source**: NVIDIA, Matrix multiplication background user's guide, section on tensor core requirements (since cuBLAS 11.0 any size runs on tensor cores, most efficiently at
    multiples of 16 bytes, on A100 of 128); rates: ``data/alignment.toml``.

    **Not modelled**: which operand is misaligned; copies that align them first (``torch.compile``'s padding); TensorFloat-32; generations other than the measured one (on V100 even
    sizes reach 54 TFLOP/s where this says 69; an RTX 4090 reaches 112 at odd sizes where it says 132, pytorch/pytorch#181718).
    """

    library: str
    sector_share: float
    plain: Mapping[int, float]
    """FLOP per clock and multiprocessor by bytes of alignment."""
    batched: Mapping[str, Mapping[int, float]]
    """The same of batches, by dtype."""
    relative_standard_error: float
    source: str

    def bounds(self, kernels: Sequence[Kernel], profile: DeviceProfile) -> NDArray[np.float64]:
        """FLOP/s at which misaligned rows hold each of some products of one class and dtype; shape ``(len(kernels),)``."""
        first = kernels[0]
        rates = self.plain if first.kernel_class == "gemm" else self.batched[first.dtype]
        clocks = profile.num_multiprocessors * profile.boost_clock_hz
        sectors = self.sector_share * profile.peak(first.dtype)
        return np.array([rates[own] * clocks if (own := row_bytes(one)) < COPY_BYTES else sectors for one in kernels])

    def slowed(self, alone_s: NDArray[np.float64], kernels: Sequence[Kernel], profile: DeviceProfile) -> NDArray[np.float64]:
        """Seconds of products that take ``alone_s`` with aligned rows; shapes ``(len(kernels),)``."""
        loads_s = np.array([kernel.flops for kernel in kernels]) / self.bounds(kernels, profile)
        return np.asarray((alone_s**SHARPNESS + loads_s**SHARPNESS) ** (1.0 / SHARPNESS), dtype=np.float64)


def misaligned(kernel: Kernel) -> bool:
    """Whether a kernel is a product on tensor cores whose rows are no multiples of `SECTOR_BYTES`."""
    return on_tensor_cores(kernel) and row_bytes(kernel) < SECTOR_BYTES


def alignment_of(library: str = "") -> Alignment:
    """What misaligned rows cost under a version of the product library; empty: the newest.

    Raises:
        UnknownNameError: a library that the table does not hold.
    """
    known = _libraries()
    if not library:
        return next(iter(known.values()))
    if library not in known:
        raise UnknownNameError(source=str(ALIGNMENT_FILE), key="library", value=library, known=tuple(known))
    return known[library]


@lru_cache(maxsize=1)
def _libraries() -> Mapping[str, Alignment]:
    """The table, newest first."""
    sections = read_section(AlignmentFile, ALIGNMENT_FILE).version
    return MappingProxyType({one.name: _alignment(one) for one in sections})


def _alignment(section: LibrarySection) -> Alignment:
    batched = {"float16": MappingProxyType(section.batched_float16), "bfloat16": MappingProxyType(section.batched_bfloat16)}
    return Alignment(
        library=section.name, sector_share=section.sector_share, plain=MappingProxyType(section.plain), batched=MappingProxyType(batched),
        relative_standard_error=section.relative_standard_error, source=section.source,
    )  # fmt: skip
