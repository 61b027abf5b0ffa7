"""What if: a plan on hardware with other values, and which values the step's time hangs on."""

from __future__ import annotations

import re
import tomllib
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Any

from hardware_models.errors import InputError, UnknownNameError
from hardware_models.network.cluster import Cluster
from hardware_models.network.links import Link
from hardware_models.profile import DeviceProfile
from simulator.plan import Plan
from simulator.plan_file import plan_from_dict, plan_to_dict

SOURCE = "--set"
_FACTOR = re.compile(r"^(?P<sign>[x/*])(?P<value>\d+(\.\d+)?([eE][-+]?\d+)?)$")
FARTHEST = 1e6
"""How many times larger or smaller a value of the hardware may be made: what is farther off is in another unit."""
SECTIONS = ("parallel", "batch", "pipeline", "memory", "precision", "runtime")
"""Sections of a plan whose keys may be set."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Setting:
    """What a prediction depends on, besides the model."""

    plan: Plan
    cluster: Cluster
    device: DeviceProfile


@dataclass(frozen=True, slots=True, kw_only=True)
class Knob:
    """One value of the hardware."""

    text: str
    """What it is, with its unit."""
    read: Callable[[Setting], float]
    """0 where the hardware has no such part."""
    write: Callable[[Setting, float], Setting]


@dataclass(frozen=True, slots=True, kw_only=True)
class Change:
    """One value that is set: ``link.nvlink.bandwidth=x2``, ``device.memory=96e9``, ``parallel.tp=4``."""

    key: str
    value: str

    def apply(self, setting: Setting) -> Setting:
        """The setting with the change.

        Raises:
            InputError: no such key, a value that breaks its rule, or a part that the hardware does not have.
        """
        if self.key.split(".")[0] in SECTIONS:
            return replace(setting, plan=_changed_plan(setting.plan, self))
        knob = _knob(self.key)
        present = knob.read(setting)
        if present <= 0.0:
            rule = f"{setting.cluster.name} has no {self.key}"
            raise InputError(source=SOURCE, key=self.key, value=self.value, rule=rule, remedy="set another value")
        return knob.write(setting, _number(self, present))


def parse_change(text: str) -> Change:
    """The change of a text ``KEY=VALUE``.

    Raises:
        InputError: there is no ``=``.
    """
    key, separator, value = text.partition("=")
    if not separator or not key.strip() or not value.strip():
        raise InputError(
            source=SOURCE,
            key="",
            value=text,
            rule="KEY=VALUE is asked for",
            remedy="write link.nvlink.bandwidth=x2 or parallel.tp=4",
        )
    return Change(key=key.strip(), value=value.strip())


def _number(change: Change, present: float) -> float:
    match = _FACTOR.match(change.value)
    try:
        value = float(match["value"]) if match else float(change.value)
    except ValueError as error:
        rule = "a factor (x2, /2) or a positive number in SI units is asked for"
        raise InputError(source=SOURCE, key=change.key, value=change.value, rule=rule) from error
    if not value > 0.0:
        raise InputError(source=SOURCE, key=change.key, value=change.value, rule=f"value > 0 must hold, but got {value:g}")
    wanted = value if match is None else present / value if match["sign"] == "/" else present * value
    if not present / FARTHEST <= wanted <= present * FARTHEST:
        rule = f"no value changes more than {FARTHEST:,.0f} times either way, but {present:.4g} would become {wanted:.4g}"
        raise InputError(
            source=SOURCE, key=change.key, value=change.value, rule=rule, remedy="write SI units (bytes, bytes/s, FLOP/s, s)"
        )
    return wanted


def _changed_plan(plan: Plan, change: Change) -> Plan:
    section, _, key = change.key.partition(".")
    table: dict[str, Any] = plan_to_dict(plan)
    try:
        value = tomllib.loads(f"value = {change.value}")["value"]
    except tomllib.TOMLDecodeError:
        value = change.value
    table[section] = {**table.get(section, {}), key: value}
    return plan_from_dict(table, source=SOURCE)


def _knob(key: str) -> Knob:
    if key not in KNOBS:
        known = (*KNOBS, *(f"{section}.KEY of a plan" for section in SECTIONS))
        raise UnknownNameError(source=SOURCE, key="key", value=key, known=known)
    return KNOBS[key]


def _device(name: str) -> Callable[[Setting, float], Setting]:
    return lambda setting, value: replace(setting, device=setting.device.changed(**{name: value}))


def _scaled_peaks(setting: Setting, value: float) -> Setting:
    factor = value / _peak(setting)
    peaks = {dtype: peak * factor for dtype, peak in setting.device.peak_flops_per_s.items()}
    return replace(setting, device=setting.device.changed(peak_flops_per_s=MappingProxyType(peaks)))


def _peak(setting: Setting) -> float:
    peaks = setting.device.peak_flops_per_s
    return peaks.get("bfloat16", peaks.get("float16", peaks["float32"]))


def _dispatch(setting: Setting) -> float:
    return setting.device.host_dispatch.eager_s if setting.device.host_dispatch else setting.device.dispatch_s


def _scaled_dispatch(setting: Setting, value: float) -> Setting:
    factor, own = value / _dispatch(setting), setting.device.host_dispatch
    names = ("eager_s", "autograd_backward_s", "compiled_s", "compiled_call_s", "cuda_graph_s")
    faster = None if own is None else replace(own, **{name: getattr(own, name) * factor for name in names})
    device = setting.device.changed(dispatch_s=setting.device.dispatch_s * factor, host_dispatch=faster)
    return replace(setting, device=device)


def _with_rate(link: Link, value: float) -> Link:
    """The link with another rate; all its rates change in proportion."""
    factor = value / link.achieved_bytes_per_s.value
    names = ("theoretical_bytes_per_s", "achieved_bytes_per_s", "achieved_back_bytes_per_s")
    rates = {name: replace(getattr(link, name), value=getattr(link, name).value * factor) for name in names}
    return replace(link, **rates)


def _fabric(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, cluster=replace(setting.cluster, fabric=replace(setting.cluster.fabric, **changes)))


def _network(setting: Setting, **changes: Any) -> Setting:
    network = setting.cluster.network
    assert network is not None
    return replace(setting, cluster=replace(setting.cluster, network=replace(network, **changes)))


def _host(setting: Setting, **changes: Any) -> Setting:
    return replace(setting, cluster=replace(setting.cluster, host=replace(setting.cluster.host, **changes)))


def _network_link(setting: Setting) -> Link | None:
    return setting.cluster.network.link if setting.cluster.network else None


def _rate(link: Link | None) -> float:
    return link.achieved_bytes_per_s.value if link else 0.0


KNOBS: Mapping[str, Knob] = MappingProxyType(
    {
        "device.flops": Knob(text="peak of bf16 products, FLOP/s (all peaks in proportion)", read=_peak, write=_scaled_peaks),
        "device.memory_bandwidth": Knob(
            text="device memory, bytes/s", read=lambda own: own.device.memory_bandwidth_bytes_per_s, write=_device("memory_bandwidth_bytes_per_s")
        ),
        "device.memory": Knob(
            text="device memory, bytes", read=lambda own: own.device.memory_bytes,
            write=lambda own, value: replace(own, device=own.device.changed(memory_bytes=int(value))),
        ),
        "device.dispatch": Knob(text="host time of a kernel's launch, s", read=_dispatch, write=_scaled_dispatch),
        "link.nvlink.bandwidth": Knob(
            text="links between the devices of a node, bytes/s", read=lambda own: _rate(own.cluster.fabric.link), write=lambda own, value: _fabric(own, link=_with_rate(own.cluster.fabric.link, value))
        ),
        "link.pcie.bandwidth": Knob(
            text="link between device and host, bytes/s", read=lambda own: _rate(own.cluster.fabric.host_link), write=lambda own, value: _fabric(own, host_link=_with_rate(own.cluster.fabric.host_link, value))
        ),
        "network.bandwidth": Knob(
            text="one network adapter, bytes/s", read=lambda own: _rate(_network_link(own)),
            write=lambda own, value: _network(own, link=_with_rate(own.cluster.network.link, value)),  # type: ignore[union-attr]
        ),
        "host.dram_bandwidth": Knob(
            text="memory of one host socket, bytes/s", read=lambda own: _rate(own.cluster.host.dram_link),
            write=lambda own, value: _host(own, dram_link=_with_rate(own.cluster.host.dram_link, value)),
        ),
        "host.dram": Knob(
            text="host memory of a node, bytes", read=lambda own: own.cluster.host.dram_bytes, write=lambda own, value: _host(own, dram_bytes=int(value))
        ),
        "nvme.bandwidth": Knob(
            text="one drive, bytes/s", read=lambda own: _rate(own.cluster.host.nvme_link),
            write=lambda own, value: _host(own, nvme_link=_with_rate(own.cluster.host.nvme_link, value)) if own.cluster.host.nvme_link else own,
        ),
    }
)  # fmt: skip
"""Hardware values by the names that ``--set`` takes."""
FEWER_IS_BETTER = ("device.dispatch",)


@dataclass(frozen=True, slots=True, kw_only=True)
class Effect:
    """What one change does to the step."""

    key: str
    value: str
    step_time_s: float
    speedup: float
    """Step time before over after."""
    bottleneck: str
    fits: bool

    def to_json(self) -> dict[str, object]:
        """Its fields."""
        return {
            "key": self.key, "value": self.value, "step_time_s": self.step_time_s, "speedup": self.speedup, "bottleneck": self.bottleneck, "fits": self.fits
        }  # fmt: skip


@dataclass(frozen=True, slots=True, kw_only=True)
class Prediction:
    """The keys of ``schedlab simulate --json`` that a change is judged by."""

    step_time_s: float
    bottleneck: str
    fits: bool


Predict = Callable[[Setting], Prediction]


def effect_of(changes: tuple[Change, ...], setting: Setting, base: Prediction, predict: Predict) -> Effect:
    """What several changes do together.

    Raises:
        InputError: a change breaks a rule.
    """
    for change in changes:
        setting = change.apply(setting)
    found = predict(setting)
    return Effect(
        key=", ".join(change.key for change in changes), value=", ".join(change.value for change in changes), step_time_s=found.step_time_s,
        speedup=base.step_time_s / found.step_time_s, bottleneck=found.bottleneck, fits=found.fits,
    )  # fmt: skip


def sensitivities(
    setting: Setting, base: Prediction, predict: Predict, *, factor: float = 2.0
) -> tuple[tuple[Effect, Effect], ...]:
    """For each value of the hardware that is there: the step with it ``factor`` times better and worse; most telling first.

    The host's dispatch gets better as it falls. **Not modelled**: latencies of links, which the curves of collectives hold.
    """
    pairs = []
    for key, knob in KNOBS.items():
        if knob.read(setting) <= 0.0:
            continue
        up, down = f"x{factor:g}", f"/{factor:g}"
        better, worse = (down, up) if key in FEWER_IS_BETTER else (up, down)
        pairs.append(
            (
                effect_of((Change(key=key, value=better),), setting, base, predict),
                effect_of((Change(key=key, value=worse),), setting, base, predict),
            )
        )
    return tuple(sorted(pairs, key=lambda pair: pair[0].step_time_s - pair[1].step_time_s))
