"""Collectives that leave a node by the adapters that messages between pipeline ranks take: they share them."""

from __future__ import annotations

from collections.abc import Set as AbstractSet
from dataclasses import replace

from simulator.parallel.mesh import Mesh
from simulator.parallel.template import Issued, Link, Template
from simulator.program import Kind, Stream

_AXES = {"dp": Stream.DP, "cp": Stream.CP, "ep": Stream.EP}


def crossing_streams(mesh: Mesh) -> frozenset[Stream]:
    """Streams whose collectives leave the node, where messages between neighbouring pipeline ranks do so, too; tensor parallelism stays inside."""
    if mesh.degree("pp") == 1 or mesh.neighbours("pp").domains(mesh.cluster)[0] == 1:
        return frozenset()
    groups = {"dp": mesh.gradient_group(), "cp": mesh.group("cp"), "ep": mesh.group("ep")}
    return frozenset(
        stream for axis, stream in _AXES.items() if groups[axis].num_ranks > 1 and groups[axis].domains(mesh.cluster)[0] > 1
    )


def on_adapters(template: Template, streams: AbstractSet[Stream], bytes_per_s: float) -> Template:
    """The template with the collectives of some streams as flows out of and into the rank.

    **Model**: a collective that takes T alone moves ``T * bytes_per_s`` over the rank's part of the adapters, both ways, so that alone it takes T; beside a message they share
    (`hardware_models.network.sharing`).

    **Not modelled**: that a collective among few ranks, or one bound by its latency, leaves a part of the adapters free while it lasts.

    Args:
        template: of a pass, or of a rank's beginning or end.
        streams: whose collectives leave the node (`crossing_streams`).
        bytes_per_s: of a rank's part of the adapters, one way.
    """
    return replace(
        template,
        instructions=tuple(_flow(one, bytes_per_s) if _crosses(one, streams) else one for one in template.instructions),
    )


def _crosses(one: Issued, streams: AbstractSet[Stream]) -> bool:
    return one.kind is Kind.TRANSFER and one.stream in streams and one.transfer is None and one.duration_s > 0.0


def _flow(one: Issued, bytes_per_s: float) -> Issued:
    return replace(one, duration_s=0.0, transfer=(one.duration_s * bytes_per_s, bytes_per_s, (Link.OUT, Link.INTO_OWN)))
