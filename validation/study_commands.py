"""Commands that take a plan further: what if the hardware or the plan were different, and how a trainer is told."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import click

from hardware_models.catalogue import load_hardware
from hardware_models.errors import InputError, UnknownNameError
from hardware_models.files import whole_file, writable_folder
from hardware_models.network.cluster_file import find_cluster, single_gpu_cluster
from search.export import EXPORTERS, export_plan
from search.export_case import Case, Exported, resolved_plan
from search.plan_simulator import PlanSimulator
from simulator.model_source import DEFAULT_SEQ_LEN, model_source
from simulator.parallel.orders import order_of
from simulator.plan import Plan, check_model
from simulator.plan_file import read_plan
from simulator.presets import PRESETS, TransformerConfig, load_config, preset
from simulator.what_if import Prediction, Setting, effect_of, parse_change, sensitivities
from validation.command_line import hardware_option, model_options, reported, stderr
from validation.what_if_report import telling, what_if_report

FACTOR = 2.0
"""How much better and worse each value of the hardware is made."""


@click.command("what-if")
@model_options
@hardware_option
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), help="Plan TOML (default: the plain module).")
@click.option("--gpus", type=click.IntRange(min=1), help="Devices that the plan must use (default: what its degrees give).")
@click.option(
    "--set",
    "changes",
    multiple=True,
    metavar="KEY=VALUE",
    help="link.nvlink.bandwidth=x2, device.memory=96e9, parallel.tp=4, ...; repeatable.",
)
@click.option("--plot", "plot_path", type=click.Path(path_type=Path), help="Write the tornado plot of the sensitivities.")
@reported
def what_if(
    model_name: str, seq_len: int | None, hardware_name: str, plan_path: Path | None, gpus: int | None, changes: tuple[str, ...], plot_path: Path | None
) -> dict[str, Any]:  # fmt: skip
    """Predicts a plan on other hardware, or with other values, and which values its time hangs on."""
    plan = read_plan(plan_path) if plan_path else Plan()
    wanted = tuple(parse_change(text) for text in changes)
    setting = _setting(plan, hardware_name)
    plans = PlanSimulator(model_source(model_name, device=setting.device, seq_len=seq_len))

    def predict(one: Setting) -> Prediction:
        folder, asked = plan_path.parent if plan_path else None, gpus if one.plan is plan else None
        found = plans.simulate(one.plan, one.cluster, one.device, gpus=asked, folder=folder)
        return Prediction(step_time_s=found.step_time_s, bottleneck=found.bottleneck, fits=found.fits)

    base = predict(setting)
    together = effect_of(wanted, setting, base, predict) if wanted else None
    alone = [effect_of((change,), setting, base, predict) for change in wanted] if len(wanted) > 1 else []
    pairs = sensitivities(setting, base, predict, factor=FACTOR)
    if plot_path:
        from simulator.figures import save_figure, tornado_figure  # noqa: PLC0415 - matplotlib only where a figure is drawn

        bars = [(better.key, 1.0 / better.speedup - 1.0, 1.0 / worse.speedup - 1.0) for better, worse in telling(pairs)[0]]
        save_figure(tornado_figure(bars, title=f"{model_name}: values x{FACTOR:g} and /{FACTOR:g}"), plot_path)
    return {
        "step_time_s": base.step_time_s, "bottleneck": base.bottleneck, "fits": base.fits, "changed": together.to_json() if together else None,
        "changes": [effect.to_json() for effect in alone], "sensitivities": [effect.to_json() for pair in pairs for effect in pair],
        "_table": what_if_report(model_name, base, [*([together] if together else []), *alone], pairs, FACTOR),
    }  # fmt: skip


def _setting(plan: Plan, hardware_name: str) -> Setting:
    """The plan on the hardware of a name: a cluster, or one GPU and its host.

    Raises:
        InputError: a CPU, of which no links are known.
    """
    cluster = find_cluster(hardware_name)
    if cluster is not None:
        return Setting(plan=plan, cluster=cluster, device=load_hardware(cluster.device))
    device = load_hardware(hardware_name)
    if device.kind == "cpu":
        rule = "what-if changes GPUs, their links and their hosts, but this is a CPU"
        raise InputError(
            source="--hardware", key="", value=hardware_name, rule=rule, remedy="name a GPU or a cluster (schedlab hardware)"
        )
    return Setting(plan=plan, cluster=single_gpu_cluster(device), device=device)


@click.command()
@click.option("--plan", "plan_path", type=click.Path(path_type=Path), required=True, help="Plan TOML.")
@click.option("--to", type=click.Choice(sorted(EXPORTERS)), required=True, help="Trainer.")
@click.option("--model", "model_name", help="As for simulate: gives layers and tokens per sample where the trainer needs them.")
@click.option("--out", type=click.Path(path_type=Path), help="Folder of the files (default: stdout).")
@reported
def export(plan_path: Path, to: str, model_name: str | None, out: Path | None) -> dict[str, Any]:
    """Writes a plan as the flags or files of a trainer."""
    made = export_plan(export_case(read_plan(plan_path), model_name, folder=plan_path.parent), to)
    shown = _files_text(made) if out is None else ", ".join(map(str, _write(made, out)))
    for note in made.notes:
        stderr.print(note, highlight=False, soft_wrap=True)
    return {
        "to": to,
        "files": dict(made.files),
        "notes": list(made.notes),
        "folder": str(out) if out else None,
        "_table": shown,
    }


def export_case(plan: Plan, model_name: str | None, *, folder: Path) -> Case:
    """What a plan and the name of a model give an export; relative files of the plan begin at ``folder``."""
    config = _configuration(model_name) if model_name else None
    resolved = resolved_plan(plan, seq_len=None if config is None else min(config.max_positions, DEFAULT_SEQ_LEN))
    if config is not None:
        experts = config.experts.num_experts if config.experts else None
        check_model(
            resolved, heads=config.heads, kv_heads=config.num_kv_heads, layers=config.layers, experts=experts,
            seq_len=resolved.batch.seq_len,
        )  # fmt: skip
    order = order_of(resolved, folder=folder) if resolved.parallel.pp > 1 else None
    return Case(plan=resolved, layers=None if config is None else config.layers, model=model_name, order=order)


def _configuration(name: str) -> TransformerConfig:
    """The configuration of a preset or a file; a traced module has none, and a trainer builds its own."""
    if name.endswith(".json"):
        return load_config(Path(name))
    if name not in PRESETS:
        raise UnknownNameError(source="--model", key="name", value=name, known=tuple(PRESETS), remedy="or give a config.json")
    return preset(name)


def _write(made: Exported, folder: Path) -> list[Path]:
    """The files' paths, once they are written."""
    writable_folder(folder)
    for name, text in made.files:
        with whole_file(folder / name) as temporary:
            temporary.write_text(text, encoding="utf-8")
    return [folder / name for name, _ in made.files]


def _files_text(made: Exported) -> str:
    """The texts; each one after its name where there are several."""
    texts = [text if len(made.files) == 1 else f"==> {name} <==\n{text}" for name, text in made.files]
    return "\n".join(texts).rstrip("\n")
