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
from runtime import Network, Plan, Rule, Schedule
from runtime.modes import Explicit
from tests.unets import make_manifest

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
    """Up to ten units, each reading up to three features made before it; the last is the head."""
    count = draw(st.integers(1, 10))
    names = [f"u{i}" for i in range(count - 1)] + ["head"]
    units = []
    for i, name in enumerate(names):
        inputs = draw(st.lists(st.sampled_from([*INPUTS, *names[:i]]), min_size=1, max_size=3, unique=True))
        units.append(Unit(name=name, kind="unit", inputs=tuple(inputs)))
    return tuple(units)


@st.composite
def cases(draw: st.DrawFn) -> Case:
    units = draw(units_of_a_graph())
    ends = draw(st.sets(st.integers(1, len(units)))) | {len(units)}
    starts = [0, *sorted(ends)]
    groups = [units[start:end] for start, end in zip(starts, sorted(ends), strict=False)]
    steps = draw(st.integers(1, 6))
    names, rules = [unit.name for unit in units], []
    for _ in range(draw(st.integers(0, 3))):
        if names:
            inherit = draw(st.lists(st.sampled_from(names), min_size=1, unique=True))
            names = [name for name in names if name not in inherit]
            keys = draw(st.sets(st.integers(0, steps - 1))) | {0}
            rules.append(Rule(units=tuple(inherit), when=Explicit(steps=tuple(sorted(keys)))))
    plan = Plan(name="random", rules=tuple(rules))
    return Case(make_manifest(units=units, segments=cut(units, groups)), plan, steps)


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


def arithmetic_network(manifest: Manifest, log: list[str]) -> Network:
    runners: Any = {segment.name: ArithmeticRunner(manifest, segment, log) for segment in manifest.segments}
    return Network(manifest, runners)


def predictions_unit_by_unit(case: Case) -> list[int]:
    """The definition of inheritance by output, straight: every unit at every step, cached values in place of computed ones."""
    cache: dict[str, Tensor] = {}
    predictions = []
    for index in range(case.steps):
        features = inputs_of_step(index)
        inherited = inherited_at(case, index)
        for unit in case.manifest.units:
            fresh = value_of(unit, features)
            features[unit.name] = cache[unit.name] if unit.name in inherited else fresh
            cache[unit.name] = features[unit.name]
        predictions.append(int(features["head"]))
    return predictions


def inherited_at(case: Case, index: int) -> set[str]:
    """The units inherited at a step, from the plan's own words."""
    inheriting = [rule for rule in case.plan.rules if isinstance(rule.when, Explicit) and index not in rule.when.steps]
    return {name for rule in inheriting for name in rule.units}
