"""A partition groups units into segments; each segment is one ONNX file and one compiled engine.

Units of one group (a block, a layer, or one unit) stay together unless a plan runs one without the other: a plan that inherits
the last layer but one cuts the last block before its last layer. Without a limit on the group, units that always run together in
the given plans become one segment, so that a compiler sees the largest graphs possible.
"""

from collections.abc import Callable, Collection, Sequence
from graphlib import TopologicalSorter
from itertools import chain, combinations, takewhile
from typing import Literal, get_args

from engines.bundle.manifest import Segment, Unit
from engines.bundle.names import BRANCH, NOISE, TIME
from exporter.graph.topology import block_of
from runtime.errors import PlanError
from runtime.plans.demand import demand
from runtime.plans.key_steps import Threshold
from runtime.plans.plan import Plan, inherited_features

__all__ = ["GRANULARITIES", "Granularity", "partition"]

Granularity = Literal["block", "layer", "unit"]
GRANULARITIES: tuple[Granularity, ...] = get_args(Granularity)

_LAYER_PARTS = 4
_MOST_AT_ONCE = 12
"""Rules with key steps of their own at one time: their subsets are gone through, each with a walk over the UNet."""
_GROUP: dict[Granularity | None, Callable[[str], str]] = {
    None: lambda unit: "",
    "block": block_of,
    "layer": lambda unit: block_of(unit) if unit == TIME else ".".join(unit.split(".")[:_LAYER_PARTS]),
    "unit": lambda unit: unit.removesuffix(BRANCH),
}


def partition(
    units: Sequence[Unit], granularity: Granularity | None = "block", plans: Sequence[Plan] = ()
) -> tuple[Segment, ...]:
    """Group a UNet's units into segments that the given plans can run exactly.

    Args:
        units: the UNet's topology.
        granularity: the largest group: a block, a layer, a unit, or None for no limit.
        plans: plans whose inherit steps must not recompute what they inherit.

    Returns:
        Segments in an order in which they can run, without files.

    Raises:
        PlanError: a plan names a unit that the UNet does not have.
    """
    sides, probed = _sides(units, plans)
    groups = _Groups()
    for unit in units:
        groups.add(unit, (_GROUP[granularity](unit.name), *(unit.name in running for running in sides)))
    return _segments(units, groups.in_order(), probed)


class _Groups:
    """Units by key, in as few groups as there can be without two groups needing each other."""

    def __init__(self) -> None:
        self.units: list[list[Unit]] = []
        self._keys: list[tuple[object, ...]] = []
        self._home: dict[str, int] = {}
        self._needs: list[set[int]] = []

    def add(self, unit: Unit, key: tuple[object, ...]) -> None:
        direct = {self._home[name] for name in unit.inputs if name in self._home}
        for group in reversed(range(len(self.units))):
            # The group must not be needed by another one that the unit reads from: each would need the other's output.
            if self._keys[group] == key and not any(group in self._all_needs(other) for other in direct - {group}):
                break
        else:
            group = len(self.units)
            self.units.append([])
            self._keys.append(key)
            self._needs.append(set())
        self.units[group].append(unit)
        self._home[unit.name] = group
        self._needs[group] |= direct - {group}

    def _all_needs(self, group: int) -> set[int]:
        found: set[int] = set()
        front = [group]
        while front:
            new = self._needs[front.pop()] - found
            found |= new
            front.extend(new)
        return found

    def in_order(self) -> list[list[Unit]]:
        order = TopologicalSorter({group: sorted(needs) for group, needs in enumerate(self._needs)}).static_order()
        return [self.units[group] for group in order]


def _sides(units: Sequence[Unit], plans: Sequence[Plan]) -> tuple[list[frozenset[str]], set[str]]:
    """The units that run in each kind of step that a plan can have; and the features that adaptive rules compare."""
    names, probed = [unit.name for unit in units], set()
    read = {name for unit in units for name in unit.inputs}
    sides: dict[frozenset[str], None] = {}

    def running(wanted: Collection[str], inherited: Collection[str]) -> frozenset[str]:
        return frozenset(unit.name for unit in demand(units, wanted, inherited))

    for plan in plans:
        rules = inherited_features(plan, names)
        kinds = [
            (held, chosen, frozenset().union(*(rules[n] for n in chosen))) for held, chosen in _inheriting_at_once(plan, rules)
        ]
        compared = {rule.when.feature for rule in plan.rules if isinstance(rule.when, Threshold)}
        probed |= compared
        sides |= dict.fromkeys(running([feature], ()) for feature in compared)
        steps = {chosen: running([NOISE], inherited) for _, chosen, inherited in kinds}
        for held, chosen, inherited in kinds:
            sides[steps[chosen]] = None
            # What is inherited at some step is read there, and so kept at another, where its rule is not one that inherits.
            fresh = frozenset[str]().union(*(rules[number] for number in held if number not in chosen)) & read
            for feature in sorted(fresh - inherited - steps[chosen]):
                sides[running([NOISE, feature], inherited)] = None
            sides |= dict.fromkeys(running([feature], inherited) for feature in compared)
    return list(sides), probed


def _inheriting_at_once(plan: Plan, features: Sequence[frozenset[str]]) -> list[tuple[tuple[int, ...], tuple[int, ...]]]:
    """The sets of rules that can inherit at one step, however many steps run: each after all the rules that hold there.

    Rules with the same key steps go together, and those for other parts of the schedule never do. One that skips the UNet has a
    key step more: the last.

    Raises:
        PlanError: there are too many.
    """
    alike: dict[tuple[object, ...], list[int]] = {}
    for number, rule in enumerate(plan.rules):
        alike.setdefault((rule.when, rule.start, rule.stop, NOISE in features[number]), []).append(number)
    found: dict[tuple[tuple[int, ...], tuple[int, ...]], None] = {}
    for start in dict.fromkeys(rule.start for rule in plan.rules):
        held = [rules for rules in alike.values() if plan.rules[rules[0]].start <= start < plan.rules[rules[0]].stop]
        if len(held) > _MOST_AT_ONCE:
            raise PlanError(
                f"plan {plan.name}: {len(held)} rules with key steps of their own hold at {start:g} of the schedule, "
                f"and a bundle can be partitioned for at most {_MOST_AT_ONCE}; give some the same when, start and stop"
            )
        for count in range(1, len(held) + 1):
            found |= dict.fromkeys((tuple(chain(*held)), tuple(chain(*chosen))) for chosen in combinations(held, count))
    return list(found)


def _segments(units: Sequence[Unit], groups: list[list[Unit]], probed: set[str]) -> tuple[Segment, ...]:
    segments = []
    taken: dict[str, int] = {}
    for group in groups:
        inside = {unit.name for unit in group}
        read_outside = {name for unit in units if unit.name not in inside for name in unit.inputs} | probed | {NOISE}
        inputs = dict.fromkeys(name for unit in group for name in unit.inputs if name not in inside)
        base = _name(group, units)
        taken[base] = taken.get(base, 0) + 1
        segments.append(
            Segment(
                name=base if taken[base] == 1 else f"{base}.part.{taken[base]}",
                units=tuple(unit.name for unit in group),
                inputs=tuple(inputs),
                outputs=tuple(unit.name for unit in group if unit.name in read_outside),
            )
        )
    return tuple(segments)


def _name(group: list[Unit], units: Sequence[Unit]) -> str:
    """Name a group: after its block where that is whole, else after its unit or layer, or its first and last block."""
    names = [unit.name.removesuffix(BRANCH).split(".") for unit in group if unit.name != TIME] or [[TIME]]
    first, last = block_of(".".join(names[0])), block_of(".".join(names[-1]))
    if first != last:
        return f"{first}-{last}"
    if len(group) == sum(block_of(unit.name) == first for unit in units):
        return first
    shared = list(takewhile(lambda parts: len(set(parts)) == 1, zip(*names, strict=False)))
    return ".".join(parts[0] for parts in shared).removesuffix(".layer")
