"""A plan says, for each denoising step, which features are inherited from an earlier step. Plans are data.

A key step computes everything; an inherit step takes the features of the inherited units from the last key step, and what
only fed them is not run (inheritance by output, A-SDM, arXiv 2406.00210). ``block:N`` inherits at block level,
``deepcache:N`` is DeepCache (arXiv 2312.00858) with its uniform schedule and outermost branch.
"""

import json
from collections.abc import Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from typing import Annotated, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationError

from engines.manifest import Manifest, Unit
from runtime.demand import demand
from runtime.errors import PlanError

__all__ = ["NOISE", "Explicit", "Plan", "Step", "Uniform", "check_runs", "matching"]

NOISE = "head"
"""The feature that a step is asked for: the noise prediction (or velocity), made by the UNet's head."""


class _Record(BaseModel):
    model_config = ConfigDict(frozen=True, extra="forbid")


class Uniform(_Record):
    """Key steps at 0, N, 2N, ..."""

    mode: Literal["uniform"] = "uniform"
    every: int = Field(ge=1)

    def keys(self, steps: int) -> set[int]:
        """Indices of the key steps."""
        return set(range(0, steps, self.every))


class Explicit(_Record):
    """Key steps as listed; those beyond the last step are not reached."""

    mode: Literal["explicit"] = "explicit"
    steps: tuple[int, ...]

    def keys(self, steps: int) -> set[int]:
        """Indices of the key steps."""
        return {index for index in self.steps if 0 <= index < steps}


class Step(_Record):
    """One model evaluation: its number, whether it refreshes the cache, and the units whose features are inherited."""

    index: int
    key: bool
    inherited: frozenset[str] = frozenset()


class Plan(_Record):
    """Which units are inherited, and at which steps everything is computed.

    ``inherit`` names units: one unit (``down.0.layer.1.attention``), a layer (``up.3.layer.1``), a block (``up.2``) or a
    glob of them (``up.*.sampler``).
    """

    version: Literal[1] = 1
    name: str
    key_steps: Annotated[Uniform | Explicit, Field(discriminator="mode")] = Uniform(every=1)
    inherit: tuple[str, ...] = ()

    def inherited(self, units: Sequence[str]) -> frozenset[str]:
        """The units whose features inherit steps take from the cache.

        Raises:
            PlanError: a pattern names no unit.
        """
        return frozenset(unit for pattern in self.inherit for unit in matching(pattern, units, self.name))

    def schedule(self, steps: int, units: Sequence[str]) -> tuple[Step, ...]:
        """The plan for a number of model evaluations of a UNet with these units.

        Raises:
            PlanError: the first step would inherit, or a pattern names no unit.
        """
        inherited = self.inherited(units)
        if not inherited:
            return tuple(Step(index=index, key=True) for index in range(steps))
        keys = self.key_steps.keys(steps)
        if 0 not in keys:
            raise PlanError(
                f"plan {self.name}: key_steps leaves out step 0, so the first step would inherit features that nobody "
                "computed; the first step is always a key step: add 0"
            )
        return tuple(Step(index=i, key=i in keys, inherited=frozenset() if i in keys else inherited) for i in range(steps))

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan from a JSON file.

        Raises:
            PlanError: the file is missing, is no JSON, or a field is wrong; the message names the field.
        """
        try:
            return cls.model_validate(json.loads(path.read_text("utf-8")))
        except OSError as error:
            raise PlanError(f"plan file {path} cannot be read: {error.strerror}") from error
        except (json.JSONDecodeError, UnicodeDecodeError) as error:
            raise PlanError(f"plan file {path} is no JSON: {error}") from error
        except ValidationError as error:
            first = error.errors()[0]
            field = ".".join(str(part) for part in first["loc"]) or "the file"
            raise PlanError(f"plan file {path}, {field}: {first['msg']}") from error


def matching(pattern: str, units: Sequence[str], plan: str = "") -> list[str]:
    """The units that a pattern names: those it matches, and those inside a block or layer it matches.

    Raises:
        PlanError: there is none.
    """
    found = [unit for unit in units if any(fnmatchcase(part, pattern) for part in _ancestors(unit))]
    if not found:
        raise PlanError(f"plan {plan}: inherit names {pattern!r}, which this UNet does not have; its units: {', '.join(units)}")
    return found


def _ancestors(unit: str) -> list[str]:
    parts = unit.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def check_runs(plan: Plan, schedule: Sequence[Step], manifest: Manifest) -> None:
    """Check that a bundle's segments can run a schedule exactly.

    An inherited feature must cross from one segment to another: inside a segment it would be computed afresh.

    Raises:
        PlanError: names the feature, and the command that builds a bundle which can run the plan.
    """
    home = {unit: segment.name for segment in manifest.segments for unit in segment.units}
    for inherited in {step.inherited for step in schedule}:
        for unit in demand(manifest.units, [NOISE], inherited):
            for feature in inherited.intersection(unit.inputs):
                if home[feature] == home[unit.name]:
                    raise PlanError(_cannot_run(plan, feature, unit, home[feature], manifest))


def _cannot_run(plan: Plan, feature: str, unit: Unit, segment: str, manifest: Manifest) -> str:
    spec = plan.name if ":" in plan.name else "FILE.json"  # a preset, or a plan of one's own
    return (
        f"plan {plan.name} inherits {feature}, but this bundle computes it and its reader {unit.name} in one segment "
        f"({segment}); build a bundle that is cut there: python -m exporter build --variant {manifest.variant} "
        f"--source {manifest.source} --plan {spec}"
    )
