"""What search and what-if print: progress as it changes, reasons, proof, next step; values that do nothing in one line."""

from __future__ import annotations

import io
from dataclasses import replace
from pathlib import Path

import pytest
from rich.console import Console, RenderableType

from search.joint.batch_study import Progress
from search.joint.explain import Contribution
from search.joint.joint_search import JointResult, joint_search
from simulator.what_if import Effect, Prediction
from tests.search.joint.joint_cases import device_of, small_request, source_of
from validation.search_report import QUIET_S, joint_report, progress_lines, progress_text
from validation.what_if_report import what_if_report


def printed(what: RenderableType) -> str:
    written = io.StringIO()
    Console(width=400, file=written).print(what)
    return written.getvalue()


def progress(elapsed_s: float, incumbent: float) -> Progress:
    return Progress(incumbent=incumbent, lower_bound=1.5, num_simulated=1200, elapsed_s=elapsed_s)


def test_progress_names_best_bound_and_gap() -> None:
    assert progress_text(progress(7.0, 2.0)) == "   7.0 s: best 2 s, proven bound 1.5 s, gap 25.0%, 1,200 plans simulated"
    assert (
        progress_text(progress(7.0, float("inf")))
        == "   7.0 s: no plan that fits yet, proven bound 1.5 s, 1,200 plans simulated"
    )


def test_progress_is_told_when_a_plan_is_better_and_now_and_then() -> None:
    told: list[str] = []
    tell = progress_lines(told.append)
    for elapsed_s, incumbent in ((0.0, 2.0), (0.1, 2.0), (0.2, 1.9), (0.3, 1.9), (0.3 + QUIET_S, 1.9)):
        tell(progress(elapsed_s, incumbent))
    assert [line.split(",")[0].strip() for line in told] == [
        "0.0 s: best 2 s",
        "0.2 s: best 1.9 s",
        f"{0.3 + QUIET_S:.1f} s: best 1.9 s",
    ]


@pytest.fixture(scope="module")
def found() -> JointResult:
    request = small_request(layers=2, gpus=2, batch=4, trainer="megatron")
    return joint_search(request, source_of(request), device_of(request))


def test_the_report_of_a_search_says_what_why_how_sure_and_what_next(found: JointResult) -> None:
    one = Contribution(
        decision="placement",
        ours="order tp-dp",
        theirs="order dp-tp",
        step_time_s=1.25 * found.simulation.step_time_s,
        reason="",
    )
    other = Contribution(
        decision="recompute", ours="recompute full", theirs="recompute none", step_time_s=None, reason="does not fit"
    )
    text = printed(joint_report(replace(found, differences=(other, one)), "tiny", None))
    assert text.startswith(
        f"tiny on 2 a100-sxm-80gb of dgx-a100-80gb, 4 samples of 128 tokens a step: {found.simulation.step_time_s:.4g} s a step"
    )
    assert all(one.name in text for one in found.baselines)
    assert found.expert is not None
    assert f"Why it is faster than {found.expert.name}" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "+25.0%" in lines["placement"]
    assert "does not fit" in lines["recompute"]
    assert f"The step: {found.simulation.bottleneck}" in text
    assert "Certified: no plan of the space is faster" in text
    assert "--out DIR" in text


def test_with_a_folder_the_next_commands_are_written_out(found: JointResult) -> None:
    text = printed(joint_report(found, "tiny", Path("best")))
    assert "schedlab what-if --model tiny --hardware dgx-a100-80gb --plan best/plan.toml" in text
    assert "Why it is faster" not in text
    assert found.expert is not None
    assert (f"The best plan is that of {found.expert.name}." in text) == (found.differences == ())


def effect(key: str, value: str, speedup: float, *, bottleneck: str = "compute", fits: bool = True) -> Effect:
    return Effect(key=key, value=value, step_time_s=2.0 / speedup, speedup=speedup, bottleneck=bottleneck, fits=fits)


def test_what_if_tells_shifts_and_names_what_does_nothing_in_one_line() -> None:
    base = Prediction(step_time_s=2.0, bottleneck="compute", fits=True)
    pairs = [
        (effect("device.flops", "x2", 1.6, bottleneck="tp"), effect("device.flops", "/2", 0.5)),
        (effect("device.memory", "x2", 1.0), effect("device.memory", "/2", 1.0, fits=False)),
        (effect("nvme.bandwidth", "x2", 1.0), effect("nvme.bandwidth", "/2", 1.0)),
    ]
    text = printed(what_if_report("tiny", base, [effect("parallel.tp", "4", 1.25)], pairs, 2.0))
    assert "tiny: 2 s a step, bottleneck compute, fits" in text
    lines = {line.split("│")[1].strip(): line for line in text.splitlines() if line.startswith("│")}
    assert "-20.0%" in lines["parallel.tp"]
    assert "-37.5%" in lines["device.flops"]
    assert "+100.0%" in lines["device.flops"]
    assert "x2: bottleneck tp" in lines["device.flops"]
    assert "/2: does not fit" in lines["device.memory"]
    assert "nvme.bandwidth" not in lines
    assert "Less than 0.1% to either side: nvme.bandwidth." in text
