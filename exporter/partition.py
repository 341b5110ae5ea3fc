"""A partition groups units into segments; each segment is one ONNX file and one compiled engine.

Units of one group (a block, a layer, or one unit) stay together unless a plan runs one without the other: a plan that inherits
the last layer but one cuts the last block before its last layer.
"""

from collections.abc import Callable, Sequence
from typing import Literal, get_args

from engines.manifest import Segment, Unit
from exporter.topology import block_of
from runtime.demand import demand
from runtime.plan import NOISE, Plan

__all__ = ["GRANULARITIES", "Granularity", "partition"]

Granularity = Literal["block", "layer", "unit"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

_LAYER_PARTS = 4
_GROUP: dict[Granularity, Callable[[str], str]] = {
    "block": block_of,
    "layer": lambda unit: block_of(unit) if unit == "time" else ".".join(unit.split(".")[:_LAYER_PARTS]),
    "unit": lambda unit: unit,
}


def partition(units: Sequence[Unit], granularity: Granularity = "block", plans: Sequence[Plan] = ()) -> tuple[Segment, ...]:
    """Group a UNet's units into segments that the given plans can run exactly.

    Args:
        units: the UNet's topology.
        granularity: the largest group: a block, a layer or a unit.
        plans: plans whose inherit steps must not recompute what they inherit.

    Returns:
        Segments in an order in which they can run, without files.
    """
    sides = _sides(units, plans)
    groups: list[list[Unit]] = []
    keys: list[tuple[object, ...]] = []
    for unit in units:
        key = (_GROUP[granularity](unit.name), *(unit.name in running for running in sides))
        # A group is left for good once another one has begun: segments that took units from both sides of a third
        # would need each other's output. Blocks are contiguous but for the time embedding, which comes first anyway.
        if keys and keys[-1] == key:
            groups[-1].append(unit)
        else:
            groups.append([unit])
            keys.append(key)
    return _segments(units, groups, _GROUP[granularity])


def _sides(units: Sequence[Unit], plans: Sequence[Plan]) -> list[set[str]]:
    """For each plan, the units that run in its inherit steps."""
    names = [unit.name for unit in units]
    sides = []
    for plan in plans:
        inherited = plan.inherited(names)
        if inherited:
            sides.append({unit.name for unit in demand(units, [NOISE], inherited)})
    return sides


def _segments(units: Sequence[Unit], groups: list[list[Unit]], group_of: Callable[[str], str]) -> tuple[Segment, ...]:
    segments = []
    taken: dict[str, int] = {}
    for group in groups:
        inside = {unit.name for unit in group}
        read_outside = {feature for unit in units if unit.name not in inside for feature in unit.inputs}
        inputs = dict.fromkeys(feature for unit in group for feature in unit.inputs if feature not in inside)
        base = group_of(group[0].name)
        taken[base] = taken.get(base, 0) + 1
        segments.append(
            Segment(
                name=base if taken[base] == 1 else f"{base}.part.{taken[base]}",
                units=tuple(unit.name for unit in group),
                inputs=tuple(inputs),
                outputs=tuple(unit.name for unit in group if unit.name in read_outside or unit.name == NOISE),
            )
        )
    return tuple(segments)
