"""optuna-dashboard opens a study of ours: its API lists the study, its trials and what is kept with them."""

from __future__ import annotations

import io
import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from search.joint.batch_study import BATCH, BATCH_POINTS, BatchOutcome, run_batches
from search.storage import storage_of

NUM_BATCHES = 3


def outcome(rows: range, _incumbent: float, _end: float) -> BatchOutcome:
    return BatchOutcome(
        value=10.0 - rows.start / BATCH_POINTS, point=rows.start, open_bound=float("inf"), num_simulated=len(rows), least_bytes=0, attributes={"plan": {"batch": {"micro_batch": 2}}}, refused={}
    )  # fmt: skip


def asked(app: Any, path: str) -> Any:
    """The JSON that a WSGI application answers to a GET of a path."""
    status: list[str] = []
    environ = {
        "REQUEST_METHOD": "GET", "PATH_INFO": path, "QUERY_STRING": "", "SERVER_NAME": "localhost", "SERVER_PORT": "80", "wsgi.url_scheme": "http",
        "wsgi.input": io.BytesIO(), "wsgi.errors": io.StringIO(), "HTTP_ACCEPT_ENCODING": "",
    }  # fmt: skip
    body = b"".join(app(environ, lambda line, _headers, *_more: status.append(line)))
    assert status == ["200 OK"]
    return json.loads(body)


@pytest.mark.slow
@pytest.mark.parametrize("kind", ["journal:{}/study.log", "sqlite:///{}/study.db"])
def test_the_dashboard_lists_a_studys_trials(kind: str, tmp_path: Path) -> None:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        dashboard = pytest.importorskip(
            "optuna_dashboard", reason="optuna-dashboard is not installed: pip install 'schedlab[dashboard]'"
        )
    storage = kind.format(tmp_path)
    run_batches(np.arange(NUM_BATCHES * BATCH_POINTS) * 1e-6, outcome, request="gpt2 on 8 GPUs", storage=storage)
    app = dashboard.wsgi(storage_of(storage))
    (study,) = asked(app, "/api/studies")["study_summaries"]
    assert study["study_name"].startswith("schedlab-")
    detail = asked(app, f"/api/studies/{study['study_id']}")
    trials = detail["trials"]
    assert [trial["state"] for trial in trials] == ["Complete"] * NUM_BATCHES
    assert [trial["values"] for trial in trials] == [[10.0], [9.0], [8.0]]
    assert [parameter["param_external_value"] for trial in trials for parameter in trial["params"]] == ["0", "1", "2"]
    assert {parameter["name"] for trial in trials for parameter in trial["params"]} == {BATCH}
    assert "micro_batch" in str(trials[-1]["user_attrs"])
