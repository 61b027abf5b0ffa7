"""In which format gradients and parameters travel, and what changing into it and back costs (``precision.comm``)."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from types import MappingProxyType

from hardware_models.kernel import Kernel
from simulator.lower import Price

WIRE_DTYPES: Mapping[str, str] = MappingProxyType({"bf16": "bfloat16", "fp8": "float8_e4m3fn", "int8": "int8"})
"""torch's names of the formats."""
SCALED_BLOCK = 256
"""Elements that share a scale: DeepSpeed's quantizer for ZeRO++ (deepspeed/runtime/zero/config.py, ``zero_quantized_weights``; csrc/quantization): its default group."""
SCALE_BYTES = 4
_ONE_BYTE = frozenset({"fp8", "int8"})


@dataclass(frozen=True, slots=True, kw_only=True)
class WireFormat:
    """A format of one byte an element with a scale per block, or none.

    **Model**: NCCL cannot add such numbers, so that a scatter is an all-to-all of the parts, which each rank turns back and adds up: inside a node, then of what is left across nodes
    (`mesh.two_steps`). A sum over all ranks is that and an all-gather of the result in the same format. Sender and receiver run one memory-bound kernel each, on the stream of the collective.

    **Source**: Wang et al. 2023, "ZeRO++" (arXiv 2306.10209), sections 3.1 (weights) and 3.3 (gradients).

    **Not modelled**: four bits; that the next step's kernels overlap this one's transfer; rounding's effect on training.
    """

    comm: str
    price: Price

    @property
    def quantizes(self) -> bool:
        """Whether numbers are scaled and rounded on the way."""
        return self.comm in _ONE_BYTE

    def sent_bytes(self, elements: float, element_bytes: int) -> float:
        """Bytes of so many elements on the wire; ``element_bytes`` is their size in memory."""
        if self.quantizes:
            return elements * (1.0 + SCALE_BYTES / SCALED_BLOCK)
        return elements * (min(element_bytes, 2) if self.comm == "bf16" else element_bytes)

    def change_s(self, elements: float, *, read_bytes: float, written_bytes: float) -> float:
        """Seconds of a kernel that reads and writes so many bytes an element; 0 where nothing is quantised."""
        return self.pass_s(elements, read_bytes=read_bytes, written_bytes=written_bytes) if self.quantizes else 0.0

    def pass_s(self, elements: float, *, read_bytes: float, written_bytes: float) -> float:
        """Seconds of a kernel that reads and writes so many bytes an element, whatever the format."""
        if elements < 1.0:
            return 0.0
        count = round(elements)
        kernel = Kernel(
            kernel_class="pointwise", op="quantize", shape=(count,), dtype="float32", flops=0, read_bytes=round(elements * read_bytes),
            written_bytes=max(1, round(elements * written_bytes)),
        )  # fmt: skip
        return float(self.price([kernel])[0])
