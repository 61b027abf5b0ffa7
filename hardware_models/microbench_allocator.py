"""What torch takes on a GPU beside tensors, and traces of its caching allocator (bare machine).

``python -m hardware_models.microbench_allocator --out FILE.json --free-bytes N`` runs in a process of its own, because the first tensor
creates the context and because the allocator reads its settings once.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

SETTINGS: Mapping[str, str] = {"default": "", "expandable_segments": "expandable_segments:True"}
_VARIABLES = ("PYTORCH_CUDA_ALLOC_CONF", "PYTORCH_ALLOC_CONF")
"""The setting's name in torch up to 2.8, and since 2.9, which still reads the old one."""
_CHILD_TIMEOUT_S = 60.0
_MOST_EVENTS = 200_000
EVENT_KEYS = ("action", "addr", "size", "stream")
KIB, MIB = 2**10, 2**20

Step = tuple[str, str, int]
"""(``allocate`` or ``free``, name of the tensor, bytes)."""


def _all(names: Iterable[tuple[str, int]]) -> list[Step]:
    return [("allocate", name, size) for name, size in names]


def sequences() -> dict[str, list[Step]]:
    """Allocation sequences that touch each rule of the allocator: rounding, pools, splitting, merging, best fit, large segments."""
    small = _all((f"s{i}", size) for i, size in enumerate((1, 511, 512, 513, 4097, 100_000, 524_288, 1_048_575, 1_048_576)))
    pools = _all(
        (f"p{i}", size) for i, size in enumerate((MIB + 1, 5 * MIB, 10 * MIB - 1, 10 * MIB, 10 * MIB + 1, 20 * MIB, 33 * MIB))
    )
    split = [*_all([("a", 100 * MIB)]), ("free", "a", 0), *_all([("b", 30 * MIB), ("c", 69 * MIB), ("d", 2 * MIB)])]
    merged = [*_all((f"m{i}", 4 * MIB) for i in range(5)), *[("free", f"m{i}", 0) for i in (1, 3, 2)], *_all([("n", 12 * MIB)])]
    fit = [*_all((f"f{i}", size * MIB) for i, size in enumerate((64, 48, 80, 56))), ("free", "f0", 0), ("free", "f2", 0), ("free", "f1", 0),
           *_all([("g", 47 * MIB), ("h", 60 * MIB), ("i", 79 * MIB)])]  # fmt: skip
    growing: list[Step] = []
    for number in range(8):  # a longer sequence each time: what fragments
        growing += [*_all([(f"x{number}", (12 + 6 * number) * MIB), (f"y{number}", 3 * MIB)]), ("free", f"x{number}", 0)]
    return {"small": small, "pools": pools, "split": split, "merged": merged, "best_fit": fit, "growing": growing}


def play(steps: Sequence[Step], allocate: Callable[[int], object]) -> None:
    """Allocates and frees as the steps say; all that is left is freed at the end, in the order of allocation."""
    held: dict[str, object] = {}
    for what, name, size in steps:
        if what == "allocate":
            held[name] = allocate(size)
        else:
            del held[name]
    for name in list(held):
        del held[name]


def compact(entries: Iterable[Mapping[str, Any]]) -> dict[str, list[Any]]:
    """A trace without tracebacks: ``events`` are [position in ``actions``, address, bytes, stream]."""
    actions: dict[str, int] = {}
    events = [
        [actions.setdefault(str(entry["action"]), len(actions)), *(int(entry.get(key, 0)) for key in EVENT_KEYS[1:])]
        for entry in entries
    ]
    return {"actions": list(actions), "events": events}


def entries_of(trace: Mapping[str, Any]) -> list[dict[str, Any]]:
    """The entries that `compact` was given, as torch writes them, without what it leaves out."""
    names = trace["actions"]
    return [{**dict(zip(EVENT_KEYS, event, strict=True)), "action": names[event[0]]} for event in trace["events"]]


class Recorder:
    """One trace from before the first allocation, and which part of it belongs to what; each part begins with an empty cache."""

    def __init__(self) -> None:
        torch.cuda.memory._record_memory_history(enabled="all", context=None, stacks="python", max_entries=_MOST_EVENTS)  # noqa: SLF001 - torch's only access
        self.sections: list[dict[str, Any]] = []

    def entries(self) -> Sequence[Mapping[str, Any]]:
        """The trace so far."""
        traces = torch.cuda.memory._snapshot()["device_traces"]  # noqa: SLF001
        return traces[torch.cuda.current_device()]  # type: ignore[no-any-return]

    def run(self, name: str, work: Callable[[], object]) -> None:
        """Records one part, with the peaks that torch counts itself."""
        torch.cuda.synchronize()
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
        first = len(self.entries())
        work()
        torch.cuda.synchronize()
        self.sections.append({
            "name": name, "first_event": first, "end_event": len(self.entries()),
            "peak_allocated_bytes": torch.cuda.max_memory_allocated(), "peak_reserved_bytes": torch.cuda.max_memory_reserved(),
        })  # fmt: skip


class _Block(torch.nn.Module):
    """A small transformer layer without dropout."""

    def __init__(self, width: int, heads: int) -> None:
        super().__init__()
        self.heads = heads
        self.norms = torch.nn.ModuleList(torch.nn.LayerNorm(width) for _ in range(2))
        self.project = torch.nn.Linear(width, 3 * width)
        self.out = torch.nn.Linear(width, width)
        self.expand, self.contract = torch.nn.Linear(width, 4 * width), torch.nn.Linear(4 * width, width)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """Attention and a perceptron, each added."""
        batch, length, width = x.shape
        parts = self.project(self.norms[0](x)).view(batch, length, 3, self.heads, width // self.heads).permute(2, 0, 3, 1, 4)
        mixed = torch.nn.functional.scaled_dot_product_attention(parts[0], parts[1], parts[2], is_causal=True)
        x = x + self.out(mixed.transpose(1, 2).reshape(batch, length, width))
        hidden: torch.Tensor = self.contract(torch.nn.functional.gelu(self.expand(self.norms[1](x))))
        return x + hidden


def training_step(
    device: str, *, num_blocks: int = 4, width: int = 512, batch: int = 4, length: int = 512
) -> Callable[[], None]:
    """A step of a small transformer in float32 with AdamW: what it allocates is what is recorded."""
    torch.manual_seed(0)
    model = torch.nn.Sequential(*(_Block(width, 8) for _ in range(num_blocks))).to(device)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4, foreach=True)
    x = torch.randn(batch, length, width, device=device)

    def step() -> None:
        model(x).square().mean().backward()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)

    return step


def context_steps(free_before_bytes: int) -> list[dict[str, Any]]:
    """Bytes that this process's context takes after the first tensor, a product, a convolution, and their gradients.

    **Model**: what another process saw free before this one began, less what is free now, less what the allocator holds.
    """
    rows = []

    def look(what: str) -> None:
        torch.cuda.synchronize()
        free, _ = torch.cuda.mem_get_info()
        reserved = torch.cuda.memory_reserved()
        rows.append({"after": what, "context_bytes": free_before_bytes - free - reserved, "reserved_bytes": reserved})

    torch.cuda.synchronize()
    x = torch.ones(256, 256, device="cuda", requires_grad=True)
    look("first tensor")
    allocated = torch.cuda.memory_allocated()
    y = x @ x
    look("product")
    rows[-1]["workspace_bytes"] = torch.cuda.memory_allocated() - allocated - y.untyped_storage().nbytes()
    torch.nn.functional.conv2d(x.view(1, 1, 256, 256), torch.ones(1, 1, 3, 3, device="cuda"))
    look("convolution")
    y.sum().backward()
    look("gradient")
    return rows


def child(free_before_bytes: int) -> dict[str, Any]:
    """All that one process measures under its allocator settings."""
    torch.cuda.init()
    recorder = Recorder()
    context = context_steps(free_before_bytes)
    for name, steps in sequences().items():
        recorder.run(name, lambda steps=steps: play(steps, lambda size: torch.empty(size, dtype=torch.uint8, device="cuda")))  # type: ignore[misc]
    step = training_step("cuda")
    for name in ("first training step", "second training step"):
        recorder.run(name, step)
    context.append(
        {"after": "training", "context_bytes": _own_bytes(free_before_bytes), "reserved_bytes": torch.cuda.memory_reserved()}
    )
    return {
        "context": context, "context_bytes": max(row["context_bytes"] for row in context), "sections": recorder.sections,
        "trace": compact(recorder.entries()), "total_bytes": torch.cuda.mem_get_info()[1],
    }  # fmt: skip


def _own_bytes(free_before_bytes: int) -> int:
    torch.cuda.synchronize()
    return int(free_before_bytes - torch.cuda.mem_get_info()[0] - torch.cuda.memory_reserved())


def allocator_timings(
    free_before_bytes: int, *, settings: Mapping[str, str] = SETTINGS, run: Callable[..., Any] = subprocess.run, tell: Callable[[float], None] = lambda _f: None
) -> dict[str, Any]:  # fmt: skip
    """What a fresh process measures under each setting of the allocator; ``failed`` with its last line where it does not end well.

    Args:
        free_before_bytes: free on the device now, this process's context being there.
        settings: name -> value of the allocator's environment variable.
        run: as `subprocess.run`.
        tell: told the fraction done.
    """
    found: dict[str, Any] = {}
    for position, (name, value) in enumerate(settings.items()):
        with tempfile.TemporaryDirectory() as folder:
            path = Path(folder) / "allocator.json"
            command = [
                sys.executable,
                "-m",
                "hardware_models.microbench_allocator",
                "--out",
                str(path),
                "--free-bytes",
                str(free_before_bytes),
            ]
            try:
                done = run(
                    command,
                    env=child_environment(os.environ, value),
                    capture_output=True,
                    text=True,
                    timeout=_CHILD_TIMEOUT_S,
                    check=False,
                )
                problem = (done.stderr.strip().splitlines() or ["no output"])[-1] if done.returncode else ""
            except subprocess.TimeoutExpired:
                problem = f"took more than {_CHILD_TIMEOUT_S:.0f} s"
            found[name] = {"failed": problem} if problem else json.loads(path.read_text())
        tell((position + 1) / len(settings))
    return found


def child_environment(base: Mapping[str, str], setting: str) -> dict[str, str]:
    """The environment of a process with one allocator setting, in which this package is found."""
    kept = {name: value for name, value in base.items() if name not in _VARIABLES}
    root = str(Path(__file__).resolve().parents[1])
    kept["PYTHONPATH"] = os.pathsep.join([root, *filter(None, [base.get("PYTHONPATH", "")])])
    return kept | ({_VARIABLES[0]: setting} if setting else {})


def main(arguments: Sequence[str] | None = None) -> int:
    """The command line of the child process."""
    parser = argparse.ArgumentParser(
        prog="python -m hardware_models.microbench_allocator", description="Context and allocator traces of a GPU."
    )
    parser.add_argument("--out", required=True, type=Path, help="JSON file to write")
    parser.add_argument("--free-bytes", required=True, type=int, help="free on the device before this process")
    options = parser.parse_args(arguments)
    options.out.write_text(json.dumps(child(options.free_bytes), separators=(",", ":")))
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
