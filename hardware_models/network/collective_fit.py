"""Fits published timings of collectives: ``python -m hardware_models.network.collective_fit --measurements DIR`` writes data/collectives."""

from __future__ import annotations

import argparse
import sys
from collections import defaultdict
from collections.abc import Collection, Iterable, Sequence
from pathlib import Path

import numpy as np

from hardware_models.network.collective_curves import COLLECTIVES_FOLDER, write_stack
from hardware_models.network.collective_stacks import fit_stacks, place
from hardware_models.network.network_tables import COPIES, TimedCollective, is_collective_table, read_collectives
from hardware_models.network.platforms import platform_cluster, predict_price
from hardware_models.units import MIB

_FOLDS = 5
_BIG_BYTES = MIB
"""Errors are reported below and from this size."""


def cross_validate(rows: Sequence[TimedCollective], seed: int = 0) -> list[tuple[TimedCollective, str, float]]:
    """Each collective row with its curve and the logarithm of predicted over measured, predicted without its fold.

    All rows of one table, collective, placement and size are in one fold: no other device or version gives a size away.
    """
    placed = place(rows)
    keys = [
        (one.row.stack.partition("-")[0], one.row.collective, one.wire.scope, one.wire.count, one.wire.num_ranks, one.row.bytes)
        for one in placed
    ]
    distinct = sorted(set(keys))
    shuffled = np.random.default_rng(seed).permutation(len(distinct))
    fold_of = {distinct[position]: index % _FOLDS for index, position in enumerate(shuffled)}
    results: list[tuple[TimedCollective, str, float]] = []
    for fold in range(_FOLDS):
        stacks = fit_stacks([one.row for one, key in zip(placed, keys, strict=True) if fold_of[key] != fold])
        for one, key in zip(placed, keys, strict=True):
            if fold_of[key] == fold:
                predicted = predict_price(one.row, stacks).seconds
                results.append((one.row, one.curve, float(np.log(predicted / one.row.seconds))))
    return results


def leave_devices_out(rows: Sequence[TimedCollective], devices: Collection[str]) -> list[tuple[TimedCollective, float]]:
    """Rows of nccl-tests tables of some profiles with the logarithm of predicted over measured, without any row of these profiles."""
    collectives = [(row, platform_cluster(row.platform).device) for row in rows if row.collective not in COPIES]
    stacks = fit_stacks([row for row, device in collectives if device not in devices])
    tested = [row for row, device in collectives if row.stack.startswith("nccl-") and device in devices]
    return [(row, float(np.log(predict_price(row, stacks).seconds / row.seconds))) for row in tested]


def _transfer_report(rows: Sequence[TimedCollective]) -> str:
    """Errors with one device left out, and with all devices of one generation of the link left out."""
    clusters = [platform_cluster(row.platform) for row in rows if row.stack.startswith("nccl-")]
    sets: dict[tuple[str, ...], None] = dict.fromkeys((device,) for device in sorted({cluster.device for cluster in clusters}))
    for link in sorted({cluster.fabric.link.name for cluster in clusters}):
        sets[tuple(sorted({cluster.device for cluster in clusters if cluster.fabric.link.name == link}))] = None
    return "".join(f"without {', '.join(devices)}\n{report(leave_devices_out(rows, devices))}\n" for devices in sets)


def report(results: Iterable[tuple[TimedCollective, float]]) -> str:
    """Median and 90th percentile of the relative error by source, below and from 1 MiB."""
    groups: dict[tuple[str, bool], list[float]] = defaultdict(list)
    for row, error in results:
        groups[row.source.split()[0], row.bytes >= _BIG_BYTES].append(abs(float(np.expm1(error))))
    lines = [
        f"{source:40s} {'>= 1 MiB' if big else '<  1 MiB'} rows {len(values):6d} median {np.median(values):7.2%} p90 {np.quantile(values, 0.9):7.2%}"
        for (source, big), values in sorted(groups.items())
    ]
    return "\n".join(lines)


def main(arguments: Sequence[str] | None = None) -> None:
    """Fits every table of collectives in a folder and writes one file a stack."""
    parser = argparse.ArgumentParser(description="fit published timings of collectives")
    parser.add_argument("--measurements", type=Path, required=True, help="folder with CSV tables")
    parser.add_argument("--out", type=Path, default=COLLECTIVES_FOLDER)
    parser.add_argument("--transfer", action="store_true", help="also report the error on devices left out")
    options = parser.parse_args(arguments)
    rows = [
        row
        for path in sorted(options.measurements.glob("*.csv"))
        if is_collective_table(path)
        for row in read_collectives(path)
    ]
    held_out = cross_validate(rows)
    errors: dict[str, list[float]] = defaultdict(list)
    for _, curve, error in held_out:
        errors[curve].append(error)
    sys.stdout.write(f"held out, {_FOLDS} folds over sizes\n{report((row, error) for row, _, error in held_out)}\n")
    for stack in fit_stacks(rows, {curve: np.array(values) for curve, values in errors.items()}):
        write_stack(options.out / f"{stack.name}.toml", stack)
    if options.transfer:
        sys.stdout.write(_transfer_report(rows))


if __name__ == "__main__":
    main()
