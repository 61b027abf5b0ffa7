"""What the commands of the front door share: results as JSON or tables, errors as exit statuses, progress, common options."""

from __future__ import annotations

import functools
import json
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, TypeVar

import click
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn
from rich.text import Text

from hardware_models.calibration import calibrate as run_calibration
from hardware_models.catalogue import THIS, load_hardware, this_profile_path
from hardware_models.errors import InfeasibleError, InputError, RunFailedError
from hardware_models.profile import DeviceProfile
from simulator.plan_sections import PLAN

EXIT_FAILED, EXIT_INPUT, EXIT_INFEASIBLE = 1, 2, 3
PIPE_COLUMNS = 150
"""Width of tables that go to a file or a pipe."""


class _Times(click.ParamType):  # type: ignore[type-arg]  # generic since click 8.3 only
    """Milliseconds, one or several with commas between."""

    name = "ms[,ms...]"

    def convert(self, value: Any, param: click.Parameter | None, ctx: click.Context | None) -> tuple[float, ...]:
        """The numbers of a text; click prints what is wrong and exits with 2."""
        try:
            return value if isinstance(value, tuple) else tuple(float(part) for part in value.split(","))
        except ValueError:
            self.fail(f"{value!r}: numbers with commas between are asked for", param, ctx)


TIMES = _Times()
Command = Callable[..., dict[str, Any]]
Result = TypeVar("Result")
stderr = Console(stderr=True, markup=False, emoji=False)


def reported(command: Command) -> Callable[..., None]:
    """Prints a command's result, as JSON or as its table, and turns errors into exit statuses."""

    @functools.wraps(command)
    def run(*, as_json: bool, **arguments: Any) -> None:
        try:
            result = command(**arguments)
        except InfeasibleError as error:
            stderr.print(Text(error.limit, style="bold"), error.smallest_change, sep="\n", highlight=False, soft_wrap=True)
            sys.exit(EXIT_INFEASIBLE)
        except InputError as error:
            stderr.print(f"error: {in_file(error, arguments.get('plan_path'))}", highlight=False, soft_wrap=True)
            sys.exit(EXIT_INPUT)
        except RunFailedError as error:
            stderr.print(f"run failed: {error}", highlight=False, soft_wrap=True)
            sys.exit(EXIT_FAILED)
        table = result.pop("_table", None)
        if as_json:
            click.echo(json.dumps(result))
        elif isinstance(table, str):
            click.echo(table)
        elif table is not None:
            Console(width=None if sys.stdout.isatty() else PIPE_COLUMNS, markup=False, emoji=False).print(table)

    return click.option("--json", "as_json", is_flag=True, help="Print one JSON object on stdout.")(run)


def in_file(error: InputError, plan_path: Path | None) -> InputError:
    """An error of a plan under the name of its file; rules that need the model or the devices are checked after it is read."""
    if plan_path is None or error.source != PLAN:
        return error
    return InputError(source=str(plan_path), key=error.key, value=error.value, rule=error.rule, remedy=error.remedy)


def model_options(command: Callable[..., Any]) -> Callable[..., Any]:
    """The flags that name a model and its sizes."""
    command = click.option("--seq-len", type=click.IntRange(min=1), help="Tokens per sample (default: the model's).")(command)
    return click.option(
        "--model", "model_name", required=True,
        help="A name (schedlab models), a Hugging Face config.json, or package.module:function or FILE.py:function returning (module, inputs).",
    )(command)  # fmt: skip


hardware_option = click.option(
    "--hardware",
    "hardware_name",
    default=THIS,
    show_default=True,
    help="A name (schedlab hardware), a profile's folder, or this.",
)


def with_progress(work: Callable[[Callable[[str, float], None]], Result]) -> Result:
    """Runs work that reports (what, fraction done), with a bar on stderr."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.percentage:>3.0f}%"), TimeElapsedColumn())
    with Progress(*columns, console=stderr, transient=True) as bar:
        task = bar.add_task("starting", total=1.0)
        return work(lambda what, fraction: bar.update(task, description=what, completed=fraction))


def device_profile(name: str, *, device: str = "cpu") -> DeviceProfile:
    """The profile of a name; this machine is calibrated quickly first if it never was, and that is said."""
    if name == THIS and not this_profile_path(device).exists():
        stderr.print(f"no profile of this machine's {device} yet: calibrating quickly (schedlab calibrate does it thoroughly)")
        with_progress(lambda report: run_calibration(this_profile_path(device), quick=True, device=device, progress=report))
    return load_hardware(name, device=device)
