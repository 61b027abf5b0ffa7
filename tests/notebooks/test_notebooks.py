"""Notebooks are thin, stripped, and run."""

from __future__ import annotations

import json
from datetime import datetime
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

FOLDER = Path(__file__).parents[2] / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
MOST_CODE_CELLS = 10
LONGEST_QUICK_S = 60.0
MOST_RAW_BYTES = 20 * 10**6


def code_cells(path: Path) -> list[nbformat.NotebookNode]:
    return [cell for cell in nbformat.read(path, as_version=4).cells if cell.cell_type == "code"]


def test_there_are_notebooks() -> None:
    assert NOTEBOOKS


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_is_thin_and_stripped(path: Path) -> None:
    cells = code_cells(path)
    assert len(cells) <= MOST_CODE_CELLS
    assert not any(line.lstrip().startswith(("def ", "class ", "for ")) for cell in cells for line in cell.source.splitlines())
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)


@pytest.mark.slow
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_notebook_runs(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SCHEDLAB_CACHE", str(tmp_path))
    monkeypatch.setenv("SCHEDLAB_FIGURES", str(tmp_path / "figures"))
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(FOLDER.parent)}}).execute()
    figures = [output for cell in notebook.cells for output in cell.get("outputs", ()) if "image/png" in output.get("data", {})]
    assert figures
    drawn = sorted((tmp_path / "figures").glob("*.pdf"))
    assert bool(drawn) == ("save_figure" in path.read_text(encoding="utf-8"))
    assert all(b"/Subtype /Image" not in one.read_bytes() for one in drawn), "vectors, not pixels"
    if "calibrate" in path.read_text(encoding="utf-8"):
        check_quick_calibration(notebook, tmp_path)


def check_quick_calibration(notebook: nbformat.NotebookNode, cache: Path) -> None:
    """The notebook measured the whole quick grid of this CPU, within a minute, and left a profile."""
    (cell,) = (cell for cell in notebook.cells if cell.cell_type == "code" and "calibrate(" in cell.source)
    begin, end = (datetime.fromisoformat(cell.metadata["execution"][f"iopub.status.{state}"]) for state in ("busy", "idle"))
    assert (end - begin).total_seconds() < LONGEST_QUICK_S
    (path,) = (cache / "hardware").glob("*/raw.json")
    raw = json.loads(path.read_text(encoding="utf-8"))
    assert raw["complete"]
    classes = {row["kernel_class"] for row in raw["results"]}
    assert classes >= {"gemm", "attention", "convolution", "fft", "pointwise", "optimizer"}
    assert path.stat().st_size < MOST_RAW_BYTES
    assert path.with_name("device.toml").exists()
