"""Tables of published timings: every format read, every broken row refused with file, line, column and rule."""

from __future__ import annotations

import csv
from pathlib import Path

import pytest

from hardware_models.errors import InputError
from hardware_models.kernel_tables import DTYPES, TimedKernel, attention_kernel, gemm_kernel, is_kernel_table, read_kernels

GEMM = {
    "device": "NVIDIA A100-SXM4-80GB", "dtype": "bfloat16", "kernel_source": "torch_flow", "m": "8", "n": "1024", "k": "2048", "latency_us": "12.5",
    "source": "a table",
}  # fmt: skip
PREFILL = {
    "device": "NVIDIA B200", "kernel": "flash", "dtype": "bf16", "batch": "2", "seq": "512", "n_heads": "8", "n_kv_heads": "2", "head_dim": "128",
    "latency_us": "31.25", "source": "a table",
}  # fmt: skip
DECODE = {**{key: value for key, value in PREFILL.items() if key != "seq"}, "kv_len": "4096"}
LOOP = {
    "system": "b200_bf16", "op": "matmul", "shape": "b=2, m=16, k=64, n=32, layout=NN, accumulate=False, out_dtype=bf16", "achieved_tflops": "0.5",
    "source": "a table",
}  # fmt: skip
ATTENTION_SHAPE = "batch=1, seq_len=4096, head_num=32, kv_head_num=8, qk_head_dim=128, v_head_dim=128"


def table(path: Path, *rows: dict[str, str]) -> Path:
    with path.open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, fieldnames=list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    return path


def read_one(tmp_path: Path, row: dict[str, str]) -> TimedKernel:
    (found,) = read_kernels(table(tmp_path / "rows.csv", row))
    return found


def refusal(tmp_path: Path, row: dict[str, str]) -> InputError:
    with pytest.raises(InputError) as caught:
        read_kernels(table(tmp_path / "rows.csv", row))
    assert str(tmp_path / "rows.csv") in str(caught.value)
    return caught.value


def test_product_row(tmp_path: Path) -> None:
    found = read_one(tmp_path, GEMM)
    assert found.kernel == gemm_kernel(8, 1024, 2048, "bfloat16")
    assert found.seconds == pytest.approx(12.5e-6)
    assert (found.device, found.stack, found.op, found.source, found.line) == (
        "NVIDIA A100-SXM4-80GB",
        "torch_flow",
        "gemm",
        "a table",
        2,
    )
    assert not found.sustained


def test_prefill_row(tmp_path: Path) -> None:
    found = read_one(tmp_path, PREFILL)
    assert found.kernel == attention_kernel(2, 8, 2, 512, 512, 128, "bfloat16", causal=True)
    assert (found.op, found.stack, found.seconds) == ("attention_prefill", "flash", pytest.approx(31.25e-6))


def test_decode_row(tmp_path: Path) -> None:
    found = read_one(tmp_path, DECODE)
    assert found.kernel.shape == (2, 8, 2, 1, 4096, 128, 0)
    assert found.op == "attention_decode"


@pytest.mark.parametrize(
    ("layout", "op"), [("TN", "gemm_forward"), ("NN", "gemm_input_gradient"), ("NT", "gemm_weight_gradient")]
)
def test_rate_of_a_product_in_a_loop(tmp_path: Path, layout: str, op: str) -> None:
    found = read_one(tmp_path, LOOP | {"shape": LOOP["shape"].replace("NN", layout)})
    assert found.kernel.shape == (2 * 16, 32, 64)
    assert found.seconds == pytest.approx(2 * 32 * 32 * 64 / 0.5e12)
    assert (found.op, found.sustained) == (op, True)


def test_rate_of_a_product_with_a_wide_result(tmp_path: Path) -> None:
    found = read_one(tmp_path, LOOP | {"shape": LOOP["shape"].replace("out_dtype=bf16", "out_dtype=fp32")})
    assert found.kernel.written_bytes == 4 * 32 * 32


def test_rate_of_grouped_products(tmp_path: Path) -> None:
    found = read_one(tmp_path, LOOP | {"op": "group_matmul", "shape": "ng=4, M=128, N=256, K=512, dtype=bf16"})
    assert (found.kernel.kernel_class, found.kernel.op, found.kernel.shape) == (
        "batched_gemm",
        "_grouped_mm",
        (4, 128, 256, 512),
    )
    assert found.seconds == pytest.approx(4 * 2 * 128 * 256 * 512 / 0.5e12)


@pytest.mark.parametrize(
    ("op", "name", "products"), [("sdp_fwd", "attention_prefill", 2), ("sdp_bwd", "attention_backward", 5)]
)
def test_rate_of_attention_counts_the_whole_square(tmp_path: Path, op: str, name: str, products: int) -> None:
    found = read_one(tmp_path, LOOP | {"op": op, "shape": ATTENTION_SHAPE, "achieved_tflops": "100"})
    assert found.op == name
    assert found.seconds == pytest.approx(products * 2 * 32 * 4096**2 * 128 / 100e12)


@pytest.mark.parametrize("dtype", list(DTYPES))
def test_every_dtype_of_the_tables_is_known(tmp_path: Path, dtype: str) -> None:
    assert read_one(tmp_path, GEMM | {"dtype": dtype.upper()}).kernel.dtype == DTYPES[dtype]


def test_several_rows_keep_their_lines(tmp_path: Path) -> None:
    rows = read_kernels(table(tmp_path / "rows.csv", GEMM, GEMM | {"m": "16"}, GEMM | {"m": "32"}))
    assert [(row.line, row.kernel.shape[0]) for row in rows] == [(2, 8), (3, 16), (4, 32)]


def test_more_columns_are_ignored(tmp_path: Path) -> None:
    assert read_one(tmp_path, GEMM | {"comment": "warm"}).kernel.shape == (8, 1024, 2048)


@pytest.mark.parametrize("row", [GEMM, PREFILL, DECODE, LOOP])
def test_header_alone_holds_no_rows(tmp_path: Path, row: dict[str, str]) -> None:
    path = tmp_path / "rows.csv"
    path.write_text(",".join(row) + "\n", encoding="utf-8")
    assert is_kernel_table(path)
    assert read_kernels(path) == ()


@pytest.mark.parametrize("column", ["device", "dtype", "kernel_source", "m", "n", "k", "latency_us"])
def test_missing_column_is_refused(tmp_path: Path, column: str) -> None:
    error = refusal(tmp_path, {key: value for key, value in GEMM.items() if key != column})
    assert error.key == "header"
    assert "the columns hold one of" in str(error)
    assert column in error.rule


@pytest.mark.parametrize("row", [GEMM, PREFILL, DECODE])
@pytest.mark.parametrize(
    ("value", "rule"),
    [
        ("-1", "a positive, finite number"),
        ("0", "a positive, finite number"),
        ("nan", "a positive, finite number"),
        ("inf", "a positive, finite number"),
        ("1e400", "a positive, finite number"),
        ("fast", "a number"),
        ("", "a value is required"),
        ("  ", "a value is required"),
    ],
)
def test_bad_time_is_refused(tmp_path: Path, row: dict[str, str], value: str, rule: str) -> None:
    error = refusal(tmp_path, row | {"latency_us": value})
    assert error.key == "line 2, latency_us"
    assert rule in str(error)


@pytest.mark.parametrize(
    ("row", "column"),
    [
        *((GEMM, name) for name in ("m", "n", "k")),
        *((PREFILL, name) for name in ("batch", "seq", "n_heads", "head_dim")),
        (DECODE, "kv_len"),
    ],
)
@pytest.mark.parametrize(
    ("value", "rule"), [("0", "a positive"), ("-8", "a positive"), ("1.5", "a whole number"), ("eight", "a number")]
)
def test_bad_size_is_refused(tmp_path: Path, row: dict[str, str], column: str, value: str, rule: str) -> None:
    error = refusal(tmp_path, row | {column: value})
    assert error.key == f"line 2, {column}"
    assert rule in str(error)


def test_unknown_dtype_is_refused_with_the_known_ones(tmp_path: Path) -> None:
    error = refusal(tmp_path, GEMM | {"dtype": "posit8"})
    assert error.key == "line 2, dtype"
    assert "bfloat16" in error.rule
    assert "fp8" in error.rule


@pytest.mark.parametrize(
    ("changes", "column", "rule"),
    [
        ({"shape": "b=1, m=16"}, "shape", "n=<whole number above 0>"),
        ({"shape": LOOP["shape"].replace("m=16", "m=0")}, "shape", "m=<whole number above 0>"),
        ({"shape": LOOP["shape"].replace("m=16", "m=-16")}, "shape", "m=<whole number above 0>"),
        ({"shape": LOOP["shape"].replace("m=16", "m=\u00b2")}, "shape", "m=<whole number above 0>"),
        ({"shape": LOOP["shape"].replace("out_dtype=bf16", "out_dtype=posit8")}, "shape", "out_dtype is one of"),
        ({"shape": "16 x 32"}, "shape", "name=value pairs"),
        ({"op": "sdp_sideways", "shape": ATTENTION_SHAPE}, "op", "one of matmul, group_matmul, sdp_fwd, sdp_bwd"),
        ({"op": ""}, "op", "a value is required"),
        ({"achieved_tflops": "-3"}, "achieved_tflops", "a positive, finite number"),
    ],
)  # fmt: skip
def test_bad_rate_is_refused(tmp_path: Path, changes: dict[str, str], column: str, rule: str) -> None:
    error = refusal(tmp_path, LOOP | changes)
    assert error.key == f"line 2, {column}"
    assert rule in str(error)


def test_short_row_is_refused_with_its_line(tmp_path: Path) -> None:
    path = table(tmp_path / "rows.csv", GEMM, GEMM)
    path.write_text(path.read_text(encoding="utf-8") + "NVIDIA A100-SXM4-80GB,bfloat16\n", encoding="utf-8")
    with pytest.raises(InputError, match=r"line 4, m = '': a value is required"):
        read_kernels(path)


def test_empty_file_is_refused(tmp_path: Path) -> None:
    path = tmp_path / "empty.csv"
    path.write_text("", encoding="utf-8")
    assert not is_kernel_table(path)
    with pytest.raises(InputError, match="the columns hold one of"):
        read_kernels(path)


@pytest.mark.parametrize("content", [b"\x89PNG\r\n\x1a\n\x00\xff\xfe", b"\xff\xfem\x00,\x00"])
def test_binary_file_is_refused(tmp_path: Path, content: bytes) -> None:
    path = tmp_path / "picture.csv"
    path.write_bytes(content)
    with pytest.raises(InputError, match="text in UTF-8 is asked for; name a table in CSV") as caught:
        read_kernels(path)
    assert str(path) in str(caught.value)


def test_open_quote_is_refused(tmp_path: Path) -> None:
    path = table(tmp_path / "rows.csv", GEMM)
    path.write_text(path.read_text(encoding="utf-8") + '"' + "x," * 70_000, encoding="utf-8")
    with pytest.raises(InputError, match="a CSV file: field larger than field limit"):
        read_kernels(path)


def test_missing_file_and_folder_are_refused(tmp_path: Path) -> None:
    with pytest.raises(InputError, match="no such file"):
        read_kernels(tmp_path / "absent.csv")
    with pytest.raises(InputError, match="cannot be read: Is a directory; name a table in CSV"):
        read_kernels(tmp_path)


def test_work_and_traffic_of_a_product_by_hand() -> None:
    kernel = gemm_kernel(3, 5, 7, "float16")
    assert (kernel.flops, kernel.read_bytes, kernel.written_bytes) == (210, 2 * 7 * 8, 2 * 15)


def test_eight_bit_products_return_bfloat16() -> None:
    kernel = gemm_kernel(3, 5, 7, "float8_e4m3fn")
    assert (kernel.read_bytes, kernel.written_bytes) == (7 * 8, 2 * 15)
    assert gemm_kernel(3, 5, 7, "float8_e4m3fn", result_dtype="float32").written_bytes == 4 * 15


def test_work_and_traffic_of_attention_by_hand() -> None:
    forward = attention_kernel(2, 4, 1, 8, 16, 32, "float16", causal=False)
    assert forward.flops == 4 * 2 * 4 * 8 * 16 * 32
    assert forward.read_bytes == 2 * (2 * 4 * 8 * 32 + 2 * 2 * 16 * 32)
    assert forward.written_bytes == 2 * 2 * 4 * 8 * 32
    backward = attention_kernel(2, 4, 1, 8, 16, 32, "float16", causal=False, backward=True)
    assert backward.op == "attention_backward"
    assert (backward.read_bytes, backward.written_bytes) == (2 * forward.read_bytes, 2 * forward.written_bytes)
