"""The replay suite in two commands around a run.

``python -m validation.replay_suite bundle --hardware PROFILE --out BUNDLE`` where schedlab is installed; ``python -m validation.replay BUNDLE --out
ARCHIVE`` on the device; ``python -m validation.replay_suite report BUNDLE ARCHIVE --hardware PROFILE --out validation/results/DEVICE``.
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hardware_models.catalogue import load_hardware
from validation.bundle import read_bundle, write_bundle
from validation.command_line import hardware_option, reported, stderr
from validation.suite_cases import suite_cases
from validation.suite_figures import write_figures
from validation.suite_order import order_table
from validation.suite_report import orders, suite_rows, suite_table, write_results


@click.group(help=__doc__)
def main() -> None:
    """Groups the two commands."""


@main.command()
@hardware_option
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Which of this machine's, for --hardware this.",
)
@click.option("--model", "models", multiple=True, help="Only this model of the suite; may be repeated.")
@click.option("--out", type=click.Path(path_type=Path), required=True, help="The bundle (.json or .json.gz).")
@reported
def bundle(hardware_name: str, device: str, models: tuple[str, ...], out: Path) -> dict[str, Any]:
    """Makes the suite's cases for a device, with what the search chooses there."""
    profile = load_hardware(hardware_name, device=device)
    cases = suite_cases(profile, models=models, tell=lambda text: stderr.print(text, highlight=False))
    write_bundle(cases, out)
    return {"bundle": str(out), "num_cases": len(cases), "_table": f"{len(cases)} cases: {out}"}


@main.command()
@click.argument("bundle_path", type=click.Path(path_type=Path))
@click.argument("archive", type=click.Path(path_type=Path))
@hardware_option
@click.option(
    "--device",
    type=click.Choice(["cpu", "cuda"]),
    default="cpu",
    show_default=True,
    help="Which of this machine's, for --hardware this.",
)
@click.option("--out", type=click.Path(path_type=Path), required=True, help="Folder of the results.")
@reported
def report(bundle_path: Path, archive: Path, hardware_name: str, device: str, out: Path) -> dict[str, Any]:
    """Sets what was measured beside what the profile predicts, and writes tables and figures."""
    profile = load_hardware(hardware_name, device=device)
    rows, environment = suite_rows(read_bundle(bundle_path), archive, profile)
    summary = write_results(rows, environment, profile, out)
    write_figures(rows, out)
    return summary | {"_table": f"{suite_table(rows)}\n{order_table(orders(rows))}"}


if __name__ == "__main__":
    main()
