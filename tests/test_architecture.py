"""The house keeps its order: imports point one way, heavy libraries stay in their rooms, files stay short."""

from __future__ import annotations

import ast
import os
import re
import subprocess
import sys
from collections.abc import Iterator
from fnmatch import fnmatch
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
LAYERS = ("hardware_models", "simulator", "search", "validation", "schedlab")
"""Each may import itself and those before it."""
ROOMS = {
    "simpy": ("simulator/engine_simpy.py",),
    "optuna": ("search/*",),
    "matplotlib": ("*figures.py",),
    "scipy": ("search/solvers/*", "hardware_models/gridded_fit.py"),
    "numba": ("*_kernels.py",),
    "torch": ("simulator/tracing/*", "simulator/models/*", "hardware_models/microbench*.py", "validation/*"),
}
"""Files that may import a library."""
BARE_MACHINE = ("hardware_models/microbench*.py", "validation/replay.py", "simulator/tracing/compiled_block.py")
"""Files that run where only the standard library, numpy and torch are."""
MOST_LINES = 400
WITHOUT_TORCH = ("hardware_models", "simulator", "search")
TRACES = tuple(
    f"search/traced/{name}.py" for name in ("chain_bounds", "cuts", "evaluate", "plans", "step_bounds", "traced_search")
)
"""Files that work on traced modules: they load the tracer, and are loaded where a module is traced."""
MACHINE_PATH = re.compile(
    "|".join(rf"(?<![\w.$~}}/-])/{folder}/\w" for folder in ("work", "home", "root", "Users", "tmp", "opt", "mnt"))
)
SKIPPED_FOLDERS = frozenset({".venv", ".git", "build", "dist", "demo_out", "__pycache__"})


@cache
def all_files() -> tuple[Path, ...]:
    """Files of the project, relative to its root."""
    found: list[Path] = []
    for folder, inner, names in os.walk(ROOT):
        inner[:] = [name for name in inner if name not in SKIPPED_FOLDERS and not name.endswith(("_cache", ".egg-info"))]
        found += [(Path(folder) / name).relative_to(ROOT) for name in names]
    return tuple(sorted(found))


def files_of(*suffixes: str) -> list[Path]:
    return [path for path in all_files() if path.suffix in suffixes]


def source_files() -> list[Path]:
    return [path for path in files_of(".py") if path.parts[0].removesuffix(".py") in LAYERS]


@cache
def import_nodes(path: Path) -> tuple[ast.Import | ast.ImportFrom, ...]:
    """Every import, also inside functions."""
    tree = ast.parse((ROOT / path).read_text(encoding="utf-8"))
    return tuple(node for node in ast.walk(tree) if isinstance(node, ast.Import | ast.ImportFrom))


def imported_by(path: Path) -> Iterator[tuple[int, str]]:
    """Line and dotted name of every import, also inside functions."""
    for node in import_nodes(path):
        if isinstance(node, ast.Import):
            yield from ((node.lineno, alias.name) for alias in node.names)
        else:
            yield node.lineno, "." * node.level + (node.module or "")


def matches(path: Path, patterns: tuple[str, ...]) -> bool:
    return any(fnmatch(path.as_posix(), pattern) for pattern in patterns)


def test_there_is_something_to_walk() -> None:
    names = {path.as_posix() for path in source_files()}
    assert {"hardware_models/errors.py", "simulator/engine_simpy.py", "simulator/figures.py"} <= names


def test_imports_point_one_way() -> None:
    wrong = []
    for path in source_files():
        own = LAYERS.index(path.parts[0].removesuffix(".py"))
        for line, name in imported_by(path):
            top = name.partition(".")[0]
            if top in (*LAYERS[own + 1 :], "tests", "") or (top == "schedlab" and own < len(LAYERS) - 1):
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(
        ["imports go hardware_models <- simulator <- search <- validation <- schedlab, absolutely:", *wrong]
    )


@pytest.mark.parametrize("library", ROOMS)
def test_libraries_stay_in_their_rooms(library: str) -> None:
    wrong = [
        f"{path}:{line} imports {name}"
        for path in source_files()
        if not matches(path, ROOMS[library])
        for line, name in imported_by(path)
        if name.partition(".")[0] == library
    ]
    assert not wrong, "\n".join([f"{library} is imported only in {', '.join(ROOMS[library])}:", *wrong])


def test_no_star_imports() -> None:
    wrong = [
        f"{path}:{node.lineno}"
        for path in source_files()
        for node in import_nodes(path)
        if isinstance(node, ast.ImportFrom) and any(alias.name == "*" for alias in node.names)
    ]
    assert not wrong


def test_what_measures_runs_on_a_bare_machine() -> None:
    """Measuring imports the standard library, numpy, torch and our own modules that import no more than that."""
    allowed = {*sys.stdlib_module_names, "numpy", "torch"}
    pending = [path for path in source_files() if matches(path, BARE_MACHINE)]
    known = {path.with_suffix("").as_posix().replace("/", "."): path for path in source_files()}
    seen, wrong = set(pending), []
    while pending:
        path = pending.pop()
        for line, name in imported_by(path):
            own = known.get(name)
            if own is not None and own not in seen:
                seen.add(own)
                pending.append(own)
            if name.partition(".")[0] not in {*allowed, "hardware_models", "simulator", "validation"}:
                wrong.append(f"{path}:{line} imports {name}")
    assert not wrong, "\n".join(wrong)


def test_files_are_short() -> None:
    lengths = {path: len((ROOT / path).read_text(encoding="utf-8").splitlines()) for path in files_of(".py")}
    wrong = [f"{path}: {length} lines" for path, length in lengths.items() if length > MOST_LINES]
    assert not wrong, "\n".join([f"split by concept what has more than {MOST_LINES} lines:", *wrong])


def test_no_machine_paths() -> None:
    texts = [*files_of(".py", ".toml", ".md", ".ipynb", ".txt", ".csv", ".json"), Path("Makefile"), Path(".ci/run")]
    wrong = [
        f"{path}:{number} {line.strip()[:100]}"
        for path in texts
        for number, line in enumerate((ROOT / path).read_text(encoding="utf-8").splitlines(), start=1)
        if MACHINE_PATH.search(line)
    ]
    assert not wrong, "\n".join(["paths of one machine:", *wrong])


def test_simulating_and_searching_load_no_torch() -> None:
    modules = [
        ".".join(path.with_suffix("").parts).removesuffix(".__init__")
        for path in source_files()
        if path.parts[0] in WITHOUT_TORCH and not matches(path, (*ROOMS["torch"], *TRACES))
    ]
    code = (
        "import importlib, sys\n"
        f"for name in {modules!r}:\n"
        "    importlib.import_module(name)\n"
        "    if 'torch' in sys.modules: sys.exit(f'{name} loads torch')\n"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
