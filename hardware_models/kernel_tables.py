"""Published timings of kernels: CSV formats, told apart by their columns, into one kind of row."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from types import MappingProxyType

from hardware_models.bandwidth_ramp import LaunchMode
from hardware_models.csv_table import Cells, format_of, required_format, rows_of
from hardware_models.errors import InputError
from hardware_models.kernel import Kernel
from hardware_models.units import DTYPE_BYTES, GB, TFLOP, US_PER_S

DTYPES: Mapping[str, str] = MappingProxyType(
    {
        "bfloat16": "bfloat16", "bf16": "bfloat16", "float16": "float16", "fp16": "float16", "half": "float16", "float32": "float32", "fp32": "float32",
        "float": "float32", "tf32": "tf32", "fp8": "float8_e4m3fn", "fp8_block": "float8_e4m3fn", "int8": "int8",
    }
)  # fmt: skip
"""torch's names of the dtypes that tables write."""
LOOP_STACK = "loop"
"""Stack of rows that are rates of products one after the other, without a pause."""
TRAINING_ATTENTION = "transformer-engine"
"""Stack of attention as training frameworks run it (cuDNN and FlashAttention 2 through Transformer Engine); each timed alone, by a profiler's trace."""


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedKernel:
    """One timing."""

    device: str
    """As the table writes it."""
    stack: str
    kernel: Kernel
    seconds: float
    op: str
    """Name that errors are reported under."""
    source: str
    line: int
    """Of the file, the header being 1."""

    @property
    def sustained(self) -> bool:
        """Whether the kernel was timed in a loop that heats the board, as a training step does."""
        return self.stack == LOOP_STACK


def gemm_kernel(m: int, n: int, k: int, dtype: str, *, op: str = "mm", result_dtype: str | None = None) -> Kernel:
    """C[m, n] = A[m, k] B[k, n]; the result of eight-bit operands is bfloat16 unless said."""
    operand = DTYPE_BYTES[dtype]
    result = DTYPE_BYTES[result_dtype or ("bfloat16" if operand == 1 else dtype)]
    return Kernel(
        kernel_class="gemm", op=op, shape=(m, n, k), dtype=dtype, flops=2 * m * n * k, read_bytes=operand * k * (m + n), written_bytes=result * m * n,
    )  # fmt: skip


def attention_kernel(
    batch: int,
    heads: int,
    kv_heads: int,
    query_len: int,
    kv_len: int,
    head_dim: int,
    dtype: str,
    *,
    causal: bool,
    backward: bool = False,
) -> Kernel:
    """Fused attention, forward or backward; FLOPs in full."""
    width = DTYPE_BYTES[dtype] * head_dim * batch
    query, keys = width * heads * query_len, width * kv_heads * kv_len
    passes = 2 if backward else 1
    return Kernel(
        kernel_class="attention", op="attention_backward" if backward else "attention", shape=(batch, heads, kv_heads, query_len, kv_len, head_dim, int(causal)),
        dtype=dtype, flops=passes * 4 * batch * heads * query_len * kv_len * head_dim, read_bytes=passes * (query + 2 * keys), written_bytes=passes * query,
    )  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class TimedStream:
    """Timing of a benchmark kernel that only moves bytes (one 8-byte number a thread and operand)."""

    device: str
    launch: LaunchMode
    moved_bytes: float
    read_fraction: float
    seconds: float
    """Of one kernel; of ``moved_bytes`` at the rate that the table states where it states a rate."""
    op: str
    line: int


def read_streams(path: str | Path) -> tuple[TimedStream, ...]:
    """Timings of small kernels by size, or rates of memory by pattern.

    Raises:
        InputError: no such file, the columns are those of no known table, or a value breaks a rule; names file, line and column.
    """
    path = Path(path)
    read = required_format(path, _STREAM_FORMATS)
    return tuple(timed for cells in _rows(path) for timed in read(cells))


def is_stream_table(path: str | Path) -> bool:
    """Whether `read_streams` knows the file's header."""
    return format_of(Path(path), _STREAM_FORMATS) is not None


def read_kernels(path: str | Path) -> tuple[TimedKernel, ...]:
    """Timings of a CSV file.

    Raises:
        InputError: no such file, the columns are those of no known table, or a value breaks a rule; names file, line and column.
    """
    path = Path(path)
    read = required_format(path, _FORMATS)
    return tuple(read(cells) for cells in _rows(path))


def is_kernel_table(path: str | Path) -> bool:
    """Whether `read_kernels` knows the file's header.

    Raises:
        InputError: no such file.
    """
    return format_of(Path(path), _FORMATS) is not None


def _rows(path: Path) -> Iterator[_Cells]:
    return (_Cells(path=cells.path, line=cells.line, values=cells.values) for cells in rows_of(path))


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cells(Cells):
    """A row of kernels."""

    def count(self, column: str) -> int:
        value = self.number(column)
        if value != int(value):
            raise self.error(column, value, "a whole number")
        return int(value)

    def dtype(self, column: str) -> str:
        text = self.text(column)
        if text.lower() not in DTYPES:
            raise self.error(column, text, f"one of {', '.join(DTYPES)}")
        return DTYPES[text.lower()]

    def parts(self, column: str) -> dict[str, str]:
        """``name=value`` pairs of a cell."""
        pairs = [part.split("=", 1) for part in self.text(column).split(", ")]
        if any(len(pair) != 2 for pair in pairs):  # noqa: PLR2004 - a name and a value
            raise self.error(column, self.text(column), "name=value pairs, separated by a comma and a space")
        return {name.strip(): value.strip() for name, value in pairs}

    def timed(self, kernel: Kernel, *, device: str, stack: str, op: str, seconds: float) -> TimedKernel:
        return TimedKernel(
            device=device,
            stack=stack,
            kernel=kernel,
            seconds=seconds,
            op=op,
            source=self.values.get("source", ""),
            line=self.line,
        )


def _gemm(cells: _Cells) -> TimedKernel:
    kernel = gemm_kernel(cells.count("m"), cells.count("n"), cells.count("k"), cells.dtype("dtype"))
    return cells.timed(
        kernel,
        device=cells.text("device"),
        stack=cells.text("kernel_source"),
        op="gemm",
        seconds=cells.number("latency_us") / US_PER_S,
    )


def _prefill(cells: _Cells) -> TimedKernel:
    length = cells.count("seq")
    kernel = attention_kernel(
        cells.count("batch"),
        cells.count("n_heads"),
        cells.count("n_kv_heads"),
        length,
        length,
        cells.count("head_dim"),
        cells.dtype("dtype"),
        causal=True,
    )
    return cells.timed(
        kernel,
        device=cells.text("device"),
        stack=cells.text("kernel"),
        op="attention_prefill",
        seconds=cells.number("latency_us") / US_PER_S,
    )


def _decode(cells: _Cells) -> TimedKernel:
    kernel = attention_kernel(
        cells.count("batch"), cells.count("n_heads"), cells.count("n_kv_heads"), 1, cells.count("kv_len"), cells.count("head_dim"), cells.dtype("dtype"),
        causal=False,
    )  # fmt: skip
    return cells.timed(
        kernel,
        device=cells.text("device"),
        stack=cells.text("kernel"),
        op="attention_decode",
        seconds=cells.number("latency_us") / US_PER_S,
    )


_STAGES = MappingProxyType({"TN": "gemm_forward", "NN": "gemm_input_gradient", "NT": "gemm_weight_gradient"})
"""Pass that multiplies in a layout, of an ``nn.Linear``."""
_LOOP_ATTENTION = ("sdp_fwd", "sdp_bwd")
"""Attention's names in tables of rates: forward, backward."""


def _efficiency(cells: _Cells) -> TimedKernel:
    """A rate of a kernel inside a loop: ``op`` matmul, group_matmul, sdp_fwd or sdp_bwd, ``shape`` as name=value pairs."""
    op, sizes = cells.text("op"), cells.parts("shape")
    stack = TRAINING_ATTENTION if op in {"sdp_fwd", "sdp_bwd"} else LOOP_STACK

    def size(name: str) -> int:
        text = sizes.get(name, "")
        if not (text.isascii() and text.isdecimal() and int(text) > 0):
            raise cells.error("shape", sizes.get(name), f"{name}=<whole number above 0>")
        return int(text)

    if op == "matmul":
        result = sizes.get("out_dtype", "bf16").lower()
        if result not in DTYPES:
            raise cells.error("shape", result, f"out_dtype is one of {', '.join(DTYPES)}")
        kernel = gemm_kernel(size("b") * size("m"), size("n"), size("k"), "bfloat16", result_dtype=DTYPES[result])
        name = _STAGES.get(sizes.get("layout", "TN"), "gemm_forward")
        counted = float(kernel.flops)
    elif op == "group_matmul":
        groups, m, n, k = size("ng"), size("M"), size("N"), size("K")
        one = gemm_kernel(m, n, k, "bfloat16")
        kernel = Kernel(
            kernel_class="batched_gemm", op="_grouped_mm", shape=(groups, m, n, k), dtype="bfloat16", flops=groups * one.flops,
            read_bytes=groups * one.read_bytes, written_bytes=groups * one.written_bytes,
        )  # fmt: skip
        name, counted = "grouped_gemm", float(kernel.flops)
    elif op not in _LOOP_ATTENTION:
        raise cells.error("op", op, f"one of matmul, group_matmul, {', '.join(_LOOP_ATTENTION)}")
    else:
        length, backward = size("seq_len"), op == "sdp_bwd"
        kernel = attention_kernel(
            size("batch"),
            size("head_num"),
            size("kv_head_num"),
            length,
            length,
            size("qk_head_dim"),
            "bfloat16",
            causal=True,
            backward=backward,
        )
        name, counted = ("attention_backward" if backward else "attention_prefill"), kernel.flops * (1.25 if backward else 1.0)
    return cells.timed(
        kernel,
        device=cells.text("system"),
        stack=stack,
        op=name,
        seconds=counted / (cells.number("achieved_tflops") * TFLOP),
    )


_FORMATS: tuple[tuple[frozenset[str], Callable[[_Cells], TimedKernel]], ...] = (
    (frozenset({"m", "n", "k", "dtype", "device", "kernel_source", "latency_us"}), _gemm),
    (frozenset({"device", "kernel", "dtype", "batch", "seq", "n_heads", "n_kv_heads", "head_dim", "latency_us"}), _prefill),
    (frozenset({"device", "kernel", "dtype", "batch", "kv_len", "n_heads", "n_kv_heads", "head_dim", "latency_us"}), _decode),
    (frozenset({"system", "op", "shape", "achieved_tflops"}), _efficiency),
)
"""Columns of a table, and what reads its rows."""


_MODES: Mapping[str, LaunchMode] = MappingProxyType({"stream launch": "stream", "cudaGraph": "graph"})
_PATTERNS = MappingProxyType({"init_write_GBps": 0.0, "read_GBps": 1.0, "scale_GBps": 0.5, "triad_GBps": 2 / 3})
"""Part of the traffic of a memory benchmark that is read: write only, read only, one of each, two reads and a write."""
RATE_BYTES = 4.0 * GB
"""Traffic that stands for a stated rate: far beyond every cache."""


def _small(cells: _Cells) -> Iterator[TimedStream]:
    mode = cells.text("mode")
    if mode not in _MODES:
        raise InputError(
            source=str(cells.path),
            key=f"line {cells.line}, mode",
            value=mode,
            rule=f"one of {', '.join(_MODES)}",
            remedy="correct the row or remove it",
        )
    yield TimedStream(
        device=cells.text("gpu"), launch=_MODES[mode], moved_bytes=cells.number("bytes_moved"), read_fraction=0.5,
        seconds=cells.number("time_per_kernel_us") / US_PER_S, op="small_kernel", line=cells.line,
    )  # fmt: skip


def _memory(cells: _Cells) -> Iterator[TimedStream]:
    for column, fraction in _PATTERNS.items():
        if (cells.values.get(column) or "").strip():
            yield TimedStream(
                device=cells.text("gpu"), launch="stream", moved_bytes=RATE_BYTES, read_fraction=fraction, seconds=RATE_BYTES / (cells.number(column) * GB),
                op=f"memory_{column.removesuffix('_GBps')}", line=cells.line,
            )  # fmt: skip


_STREAM_FORMATS: tuple[tuple[frozenset[str], Callable[[_Cells], Iterator[TimedStream]]], ...] = (
    (frozenset({"gpu", "mode", "bytes_moved", "time_per_kernel_us"}), _small),
    (frozenset({"gpu", "init_write_GBps", "read_GBps", "scale_GBps", "triad_GBps"}), _memory),
)
