"""Random small graphs for property tests: units, a way to cut them into segments, plans, and runners that do exact arithmetic."""

from __future__ import annotations

import weakref
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from engines import Manifest, Segment, Unit
from engines.bundle.manifest import Feature
from runtime import LoadedBundle, Plan, Rule, Schedule, UNetRange
from runtime.plans.key_steps import Explicit
from tests.support.unets import make_manifest

INPUTS = ("sample", "timestep", "text_encoder")
PRIME = 1_000_003


@dataclass(frozen=True)
class Case:
    """A graph, cut somehow, and a plan for it."""

    manifest: Manifest
    plan: Plan
    steps: int

    def schedule(self, manifest: Manifest | None = None) -> Schedule:
        """The plan laid out over the case's graph, or the same graph cut otherwise."""
        return Schedule(self.plan, {"original": manifest or self.manifest}, [900.0 - index for index in range(self.steps)])


def cut(units: Sequence[Unit], groups: Sequence[Sequence[Unit]]) -> tuple[Segment, ...]:
    """Segments of consecutive units."""
    segments = []
    for number, group in enumerate(groups):
        inside = {unit.name for unit in group}
        outside = {name for unit in units if unit.name not in inside for name in unit.inputs} | {"head"}
        inputs = dict.fromkeys(name for unit in group for name in unit.inputs if name not in inside)
        outputs = tuple(unit.name for unit in group if unit.name in outside)
        segments.append(
            Segment(name=f"s{number}", units=tuple(unit.name for unit in group), inputs=tuple(inputs), outputs=outputs)
        )
    return tuple(segments)


@st.composite
def units_of_a_graph(draw: st.DrawFn) -> tuple[Unit, ...]:
    """Up to ten units, each reading up to three features made before it; the last is the head.

    Some have a residual branch: a unit of its own, which the unit adds to one of the branch's inputs.
    """
    count = draw(st.integers(1, 10))
    names = [f"u{i}" for i in range(count - 1)] + ["head"]
    units: list[Unit] = []
    for i, name in enumerate(names):
        inputs = draw(st.lists(st.sampled_from([*INPUTS, *names[:i]]), min_size=1, max_size=3, unique=True))
        if name != "head" and draw(st.integers(0, 3)) == 0:
            units.append(Unit(name=f"{name}.branch", kind="unit", inputs=tuple(inputs)))
            inputs = [inputs[0], f"{name}.branch"]
        units.append(Unit(name=name, kind="unit", inputs=tuple(inputs)))
    return tuple(units)


@st.composite
def rules_for(draw: st.DrawFn, units: Sequence[str], steps: int) -> tuple[Rule, ...]:
    """Up to three rules, for parts of the schedule or all of it, which may name what others name too."""
    rules: list[Rule] = []
    for _ in range(draw(st.integers(0, 3))):
        residual = draw(st.booleans()) and [name for name in units if f"{name}.branch" in units]
        names = residual or [name for name in units if not name.endswith(".branch")]
        inherit = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
        start, stop = draw(st.sampled_from([(0.0, 1.0), (0.0, 1.0), (0.0, 0.5), (0.5, 1.0), (0.3, 0.8)]))
        rule = Rule(
            units=tuple(inherit), kind="residual" if residual else "output", when=Explicit(steps=(0,)), start=start, stop=stop
        )
        last = max(0, len(rule.span(steps)) - 1)
        keys = draw(st.sets(st.integers(0, last))) | {0}
        if "head" in inherit and rule.span(steps).stop == steps:  # the last step is never skipped
            keys |= {last}
        rule = rule.model_copy(update={"when": Explicit(steps=tuple(sorted(keys)))})
        if all(features_by_rule([*rules, rule], units)):  # a rule that has nothing left is an error
            rules.append(rule)
    return tuple(rules)


@st.composite
def manifests(draw: st.DrawFn) -> Manifest:
    """A graph, cut somehow; every feature has one shape."""
    units = draw(units_of_a_graph())
    ends = draw(st.sets(st.integers(1, len(units)))) | {len(units)}
    starts = [0, *sorted(ends)]
    groups = [units[start:end] for start, end in zip(starts, sorted(ends), strict=False)]
    features = {unit.name: Feature(dtype="int64", shape=(1,)) for unit in units}
    return make_manifest(units=units, segments=cut(units, groups), features=features)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    """One UNet and a plan for it."""
    manifest, steps = draw(manifests()), draw(st.integers(1, 6))
    return Case(manifest, Plan(name="random", rules=draw(rules_for(manifest.unet_units, steps))), steps)


@st.composite
def switching_cases(draw: st.DrawFn) -> tuple[Case, Manifest]:
    """A case whose plan goes on with another UNet, whose manifest it is, after some steps; its rules name what both have."""
    first, second, steps = draw(manifests()), draw(manifests()), draw(st.integers(2, 6))
    both = [name for name in first.unet_units if name in second.unet_units]
    at = draw(st.integers(1, steps - 1))
    ranges = (UNetRange(unet="original", start=0, stop=at), UNetRange(unet="other", start=at))
    rules = draw(rules_for(both, steps))
    return Case(
        first, Plan(name="switch", unets=ranges, switch_by="steps", rules=rules, carry=draw(st.booleans())), steps
    ), second


def value_of(unit: Unit, inputs: Mapping[str, Tensor]) -> Tensor:
    """What a unit makes: exact, and another for any other input or order of inputs."""
    result = torch.tensor([sum(map(ord, unit.name))])
    for position, name in enumerate(unit.inputs):
        result = (result * 31 + (position + 2) * inputs[name]) % PRIME
    return result


def inputs_of_step(index: int) -> dict[str, Tensor]:
    """Graph inputs that differ from step to step; the text stays."""
    return {
        "sample": torch.tensor([7919 * index + 17]),
        "timestep": torch.tensor([1000 - index]),
        "text_encoder": torch.tensor([42]),
    }


class ArithmeticRunner:
    """Runs a segment's units in order. Like an engine it makes every output, wanted or not."""

    def __init__(self, manifest: Manifest, segment: Segment, log: list[str]) -> None:
        self._segment, self._log = segment, log
        self._units = [unit for unit in manifest.units if unit.name in segment.units]
        self.made = weakref.WeakSet[Tensor]()

    def run(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        assert set(inputs) >= set(self._segment.inputs)
        self._log.append(self._segment.name)
        features = {name: inputs[name] for name in self._segment.inputs}
        for unit in self._units:
            features[unit.name] = value_of(unit, features)
        outputs = {name: features[name] for name in self._segment.outputs}
        for tensor in outputs.values():
            self.made.add(tensor)
        return outputs

    def synchronize(self) -> None: ...


def arithmetic_network(manifest: Manifest, log: list[str]) -> LoadedBundle:
    runners: Any = {segment.name: ArithmeticRunner(manifest, segment, log) for segment in manifest.segments}
    return LoadedBundle(manifest, runners)


def predictions_unit_by_unit(case: Case, other: Manifest | None = None) -> list[int]:
    """The definition of inheritance, straight: every unit at every step, cached values in place of computed ones.

    With the ``other`` UNet of a plan that switches.
    """
    cache: dict[str, Tensor] = {}
    predictions = []
    for index in range(case.steps):
        features = inputs_of_step(index)
        inherited = inherited_at(case, index, other)
        for unit in manifest_at(case, index, other).units:
            fresh = value_of(unit, features)
            # What only the UNet after a switch has can only be inherited there if nobody reads it: it is as good as computed.
            features[unit.name] = cache.get(unit.name, fresh) if unit.name in inherited else fresh
            cache[unit.name] = features[unit.name]
        predictions.append(int(features["head"]))
    return predictions


def manifest_at(case: Case, index: int, other: Manifest | None) -> Manifest:
    return other if other is not None and index >= case.plan.unets[1].start else case.manifest


def inherited_at(case: Case, index: int, other: Manifest | None = None) -> set[str]:
    """The features inherited at a step, from the plan's own words."""
    switches = other is not None and index == case.plan.unets[1].start and not case.plan.carry
    owned = features_by_rule(case.plan.rules, manifest_at(case, index, other).unet_units)
    found: set[str] = set()
    for rule, features in zip(case.plan.rules, owned, strict=True):
        span = rule.span(case.steps)
        if index in span and isinstance(rule.when, Explicit) and index - span.start not in rule.when.steps and not switches:
            found |= features
    return found


def features_by_rule(rules: Sequence[Rule], units: Sequence[str]) -> list[set[str]]:
    """What each rule inherits and none before it: by output a unit and its branch, by residual the branch alone."""
    taken: set[str] = set()
    owned = []
    for rule in rules:
        own = set() if rule.kind == "residual" else set(rule.units)
        own |= {f"{name}.branch" for name in rule.units}
        owned.append(own.intersection(units) - taken)
        taken |= own
    return owned
