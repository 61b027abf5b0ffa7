"""What is measured when: limits of the device, prefixes, fair shares of the time."""

from __future__ import annotations

from collections import Counter, defaultdict

import pytest
from hypothesis import given
from hypothesis import strategies as st

from hardware_models.microbench_cases import Case
from hardware_models.microbench_gpu_heavy import FLOAT8, GridSize
from hardware_models.microbench_gpu_light import gpu_cases
from hardware_models.microbench_plan import CLASS_SHARES, Limits, halton, in_turns, mirrored, plan, plan_sizes, radical_inverse
from hardware_models.microbench_sustained import loads

H200 = Limits(
    memory_bytes=5e10, bytes_per_s=4e12, flops_per_s={"bfloat16": 7e14, "float16": 7e14, "tf32": 4e14, "float32": 5e13, FLOAT8: 1.2e15, "complex64": 5e13}
)  # fmt: skip
T4 = Limits(memory_bytes=5e9, bytes_per_s=2.5e11, flops_per_s={"float16": 4e13, "float32": 5e12, "complex64": 5e12})
FULL_H200 = GridSize(full=True, main="bfloat16", others=("float32", "tf32", "float16", FLOAT8))
FULL_T4 = GridSize(full=True, main="float16", others=("float32",))
MOST_POINTS = 400


def case(name: str, number: int, **values: object) -> Case:
    return Case(
        kernel_class=name, op="op", shape=(number,), dtype="float32", flops=0, build=lambda _pool: pytest.fail("not run"), **values,
    )  # type: ignore[arg-type]  # fmt: skip


@pytest.mark.parametrize(("size", "limits"), [(FULL_H200, H200), (FULL_T4, T4)])
def test_planned_kernels_fit_the_device(size: GridSize, limits: Limits) -> None:
    cases = plan(gpu_cases(size), limits)
    assert all(one.work_bytes <= limits.memory_bytes for one in cases)
    assert all(one.work_bytes <= 0.05 * limits.bytes_per_s for one in cases)
    assert all(one.flops <= 0.05 * limits.flops_per_s[one.dtype] for one in cases if one.flops)
    assert len({one.key for one in cases}) == len(cases)
    points = Counter((one.kernel_class, one.op, one.dtype) for one in cases if not one.variant)
    assert max(points.values()) < MOST_POINTS
    assert {one.kernel_class for one in cases} == set(CLASS_SHARES)


def test_small_devices_get_smaller_shapes_and_large_ones_all() -> None:
    large, small = ({one.key for one in plan(gpu_cases(FULL_T4), limits)} for limits in (H200, T4))
    assert small < large
    assert max(one.work_bytes for one in plan(gpu_cases(FULL_T4), T4)) > T4.memory_bytes / 4


def test_a_dtype_that_the_device_lacks_is_left_out() -> None:
    without = Limits(memory_bytes=5e10, bytes_per_s=4e12, flops_per_s={"bfloat16": 7e14, "float32": 5e13, "complex64": 5e13})
    assert not any(one.dtype == FLOAT8 for one in plan(gpu_cases(FULL_H200), without))


def test_main_shapes_come_before_other_dtypes_and_layouts() -> None:
    gemms = [one for one in plan(gpu_cases(FULL_H200), H200) if one.kernel_class == "gemm"]
    assert [one.tier for one in gemms] == sorted(one.tier for one in gemms)
    assert {one.dtype for one in gemms if one.tier == 0} == {"bfloat16"}
    assert {one.variant for one in gemms if one.tier == 2} == {"nn", "nt", "tn"}


@given(st.integers(min_value=16, max_value=200), st.integers(min_value=1, max_value=4))
def test_every_prefix_of_the_sequence_fills_the_box(num: int, dims: int) -> None:
    points = list(halton(num, [0.0] * dims, [1.0] * dims))
    for dim in range(dims):
        quarters = {int(4 * point[dim]) for point in points}
        assert quarters == {0, 1, 2, 3}


def test_radical_inverse_by_hand() -> None:
    assert [radical_inverse(n, 2) for n in range(5)] == [0.0, 0.5, 0.25, 0.75, 0.125]
    assert [round(radical_inverse(n, 3), 6) for n in (1, 2, 3)] == [0.333333, 0.666667, 0.111111]


def test_sizes_begin_with_both_ends() -> None:
    assert list(plan_sizes(10.0, 26.0, 5)) == [26.0, 10.0, 18.0, 14.0, 22.0]


def test_mirrored_spreads_sorted_sizes() -> None:
    ordered = mirrored([case("copy", number) for number in range(16)])
    assert [one.shape[0] for one in ordered[:4]] == [0, 8, 4, 12]


costs = st.floats(min_value=0.01, max_value=0.5)


@given(
    st.lists(st.tuples(st.sampled_from(["gemm", "copy", "fft"]), costs), min_size=1, max_size=60),
    st.floats(min_value=0.0, max_value=10.0),
)
def test_stopping_leaves_a_prefix_of_each_class_and_overruns_by_one_kernel(
    rows: list[tuple[str, float]], limit_s: float
) -> None:
    cases = [case(name, number) for number, (name, _) in enumerate(rows)]
    cost = {one.key: seconds for one, (_, seconds) in zip(cases, rows, strict=True)}
    now = [0.0]
    visited: list[Case] = []

    def visit(one: Case) -> None:
        now[0] += cost[one.key]
        visited.append(one)

    number = in_turns(cases, visit, clock=lambda: now[0], end_s=limit_s)
    assert number == len(visited)
    for name in ("gemm", "copy", "fft"):
        done = [one.key for one in visited if one.kernel_class == name]
        assert done == [one.key for one in cases if one.kernel_class == name][: len(done)]
    if len(visited) < len(cases):
        assert limit_s <= now[0] < limit_s + 0.5
    else:
        assert sum(cost.values()) == pytest.approx(now[0])


def test_classes_share_the_time_as_they_should() -> None:
    cases = [case(name, number) for name in ("gemm", "copy", "fft") for number in range(1000)]
    now, spent = [0.0], defaultdict(float)
    seconds = {"gemm": 0.01, "copy": 0.001, "fft": 0.03}

    def visit(one: Case) -> None:
        now[0] += seconds[one.kernel_class]
        spent[one.kernel_class] += seconds[one.kernel_class]

    in_turns(cases, visit, clock=lambda: now[0], end_s=2.0, shares={"gemm": 2.0, "copy": 1.0, "fft": 1.0})
    # copies are done after 1 s of their own would be due; nothing is idle meanwhile
    assert spent["gemm"] / spent["fft"] == pytest.approx(2.0, rel=0.1)
    assert spent["copy"] / spent["fft"] == pytest.approx(1.0, rel=0.1)


def test_lasting_load_is_put_on_large_kernels_of_each_dtype() -> None:
    cases = plan(gpu_cases(FULL_H200), H200)
    chosen = loads(cases, quick=False)
    assert {one.dtype for one in chosen if one.kernel_class == "gemm"} == {"bfloat16", "float32", "tf32", "float16", FLOAT8}
    assert all(one.work_bytes >= 2**24 and not one.variant for one in chosen)
    assert len(loads(cases, quick=True)) < len(chosen) < 40


VISIT_S = 0.03
"""Of a case beside its kernels: building, flushing, the library's first choice of an algorithm."""


@pytest.mark.parametrize(
    ("size", "limits", "available_s", "visited_share"),
    [
        (FULL_H200, H200, 250.0, 1.0), (FULL_T4, T4, 250.0, 1.0),
        (GridSize(full=False, main="bfloat16", others=FULL_H200.others), H200, 26.0, 0.75), (GridSize(full=False, main="float16", others=("float32",)), T4, 26.0, 0.75),
    ],
)  # fmt: skip
def test_the_grid_ends_in_time_and_holds_all_classes(
    size: GridSize, limits: Limits, available_s: float, visited_share: float
) -> None:
    cases = plan(gpu_cases(size), limits)
    now = [0.0]
    visited: list[Case] = []

    def visit(one: Case) -> None:
        rate = limits.flops_per_s.get(one.dtype, 1e13)
        now[0] += VISIT_S + 5 * max(one.flops / rate, one.work_bytes / limits.bytes_per_s)
        visited.append(one)

    in_turns(cases, visit, clock=lambda: now[0], end_s=available_s)
    assert now[0] < available_s + VISIT_S + 5 * limits.longest_s
    assert len(visited) >= visited_share * len(cases)
    points = Counter((one.kernel_class, one.op) for one in visited if not one.variant)
    assert {(one.kernel_class, one.op) for one in cases} == set(points)
    assert min(points.values()) >= 3
