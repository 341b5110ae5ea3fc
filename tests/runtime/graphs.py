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
from runtime import Explicit, Network, Plan
from tests.unets import make_manifest

INPUTS = ("sample", "timestep", "text_encoder")
PRIME = 1_000_003


@dataclass(frozen=True)
class Case:
    """A graph, cut somehow, and a plan for it."""

    manifest: Manifest
    plan: Plan
    steps: int


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
    inherit = draw(st.lists(st.sampled_from([unit.name for unit in units]), unique=True))
    steps = draw(st.integers(1, 6))
    keys = draw(st.sets(st.integers(0, steps - 1))) | {0}
    plan = Plan(name="random", key_steps=Explicit(steps=tuple(sorted(keys))), inherit=tuple(inherit))
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
    """The definition of inheritance by output: every unit at every step, cached values put in place of computed ones."""
    cache: dict[str, Tensor] = {}
    keys = case.plan.key_steps.keys(case.steps)
    inherited = set(case.plan.inherit)
    predictions = []
    for index in range(case.steps):
        features = inputs_of_step(index)
        for unit in case.manifest.units:
            features[unit.name] = value_of(unit, features)
            if index not in keys and unit.name in inherited:
                features[unit.name] = cache[unit.name]
            cache[unit.name] = features[unit.name] if index in keys else cache.get(unit.name, features[unit.name])
        predictions.append(int(features["head"]))
    return predictions
