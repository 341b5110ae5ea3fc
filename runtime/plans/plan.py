"""A plan says, for each denoising step, which UNet runs and which features are inherited. Plans are data.

A rule names units and the steps at which they are computed afresh; at the others they are inherited. Several rules hold at once.

Inheritance *by output*: whoever reads a unit's feature gets it as the last key step left it. Inheritance *by residual*: the
unit's input flows on, directly or through its shortcut, and what the unit added at the last key step is added again. See A-SDM
(arXiv 2406.00210); where the paper is silent, what stands here is this project's choice.
"""

import json
import math
from collections.abc import Collection, Iterable, Sequence
from fnmatch import fnmatchcase
from pathlib import Path
from shlex import quote
from typing import Annotated, Any, Literal

from pydantic import Field, PrivateAttr, ValidationError
from pydantic_core import ErrorDetails

from engines.bundle.manifest import Variant
from engines.bundle.names import BRANCH, NOISE, attention_parts
from engines.support.files import check_regular
from engines.support.records import Name, Record
from runtime.errors import PartitionError, PlanError
from runtime.plans.key_steps import MODES, Explicit, Mode, Threshold
from runtime.plans.words import Found, Guidance, Predict

__all__ = ["MOST_BYTES", "Plan", "Rule", "UNetRange", "inherited_features", "matching", "names_only_parts", "shown"]

_MOST_SHOWN = 100
"""Characters of a wrong value that a message shows."""
MOST_BYTES = 2**20
"""Of a plan file."""


class Rule(Record):
    """Units that are inherited, and when they are computed afresh instead.

    ``units`` names one unit (``down.0.layer.1.attention``), a layer (``up.3.layer.1``), a block (``up.2``) or a glob of them
    (``*.attention``). A block or layer number below zero counts from the end, so that ``up.-1`` is the outermost up block of any
    UNet. ``start`` and ``stop`` bound the rule to a part of the schedule, as shares of its steps.
    """

    units: tuple[Name, ...] = Field(min_length=1, max_length=1000)
    kind: Literal["output", "residual"] = "output"
    when: Mode
    start: float = Field(default=0.0, ge=0, lt=1)
    stop: float = Field(default=1.0, gt=0, le=1)
    predict: Predict | None = Field(default=None, exclude_if=lambda value: value is None)
    """How inherited features are forecast; without it they are taken as the last key step left them."""

    @property
    def depth(self) -> int:
        """How many key steps an inherit step takes a feature from."""
        return 1 + (self.predict.order if self.predict else 0)

    def span(self, steps: int) -> range:
        """The steps that the rule is bound to."""
        return range(round(self.start * steps), round(self.stop * steps))


class UNetRange(Record):
    """The UNet that runs from ``start`` up to ``stop``, or to the end without it.

    They are shares of the noise schedule (0: all noise, 1: none), or where the plan says so numbers of steps.
    """

    unet: Annotated[Variant, Field(max_length=200)]
    start: float = Field(ge=0, allow_inf_nan=False)
    stop: float | None = Field(default=None, gt=0, allow_inf_nan=False)

    @property
    def end(self) -> float:
        """``stop``, or infinity where there is none."""
        return math.inf if self.stop is None else self.stop

    def __str__(self) -> str:
        """As messages have it: ``0.4 to 1``."""
        return f"{self.start:g} to {'the end' if self.stop is None else format(self.stop, 'g')}"


class Plan(Record):  # noqa: PLW1641 - pydantic gives __hash__ to what is frozen
    """UNets by range (none: the bundle's own all through), rules, and whether features are carried across a switch."""

    version: Literal[1] = 1
    name: Name
    unets: tuple[UNetRange, ...] = Field(default=(), max_length=100)
    switch_by: Literal["noise", "steps"] = Field(default="noise", exclude_if=lambda value: value == "noise")
    """Whether the ranges of ``unets`` count shares of the noise schedule or steps, of those that run; written if steps."""
    rules: tuple[Rule, ...] = Field(default=(), max_length=100)
    carry: bool = False
    """Whether rules go on inheriting across a switch; otherwise its first step is a key step of every rule."""
    guidance: Guidance | None = Field(default=None, exclude_if=lambda value: value is None)
    """When guidance evaluates both of its halves; without it, at every step."""
    found: Found | None = Field(default=None, exclude_if=lambda value: value is None)
    """The settings that the plan was found for, where a search found it."""
    _path: Path | None = PrivateAttr(default=None)

    @classmethod
    def read(cls, path: Path) -> "Plan":
        """Read a plan from a JSON file.

        Raises:
            PlanError: the file is missing, is no JSON, or a field is wrong; the message names the field.
        """
        where = f"plan file {shown(path)}"
        try:
            check_regular(path)
            with path.open("rb") as file:
                content = file.read(MOST_BYTES + 1)
        except OSError as error:
            raise PlanError(f"{where} cannot be read: {error.strerror}") from error
        except ValueError as error:  # a name that no file can have
            raise PlanError(f"{where} cannot be read: {shown(error)}") from error
        plan = cls.from_json(content, where)
        plan._path = path
        return plan

    @classmethod
    def from_json(cls, content: bytes, where: str = "the plan") -> "Plan":
        """A plan out of JSON in UTF-8, called ``where`` in messages.

        Raises:
            PlanError: it is too long, no JSON, or a field is wrong; the message names the field.
        """
        if len(content) > MOST_BYTES:
            raise PlanError(f"{where} cannot be read: it has more than {MOST_BYTES} bytes")
        try:
            data = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise PlanError(f"{where} is no JSON that can be read: {shown(error)}") from error
        return cls.from_data(data, where)

    @classmethod
    def from_data(cls, data: Any, where: str = "the plan") -> "Plan":
        """A plan out of what JSON holds, called ``where`` in messages; no file is read.

        Raises:
            PlanError: a field is wrong; the message names it.
        """
        try:
            return cls.model_validate(data).checked()
        except ValidationError as error:
            raise PlanError(f"{where}, {_explained(error.errors()[0])}") from error

    def __eq__(self, other: object) -> bool:
        """Whether all fields are equal; where plans were read from does not matter."""
        return isinstance(other, Plan) and self.model_dump() == other.model_dump()

    @property
    def option(self) -> str:
        """The argument of ``--plan`` that names it: its file, its presets joined, or a placeholder where it has neither."""
        if self._path is not None:
            return quote(str(self._path))
        return self.name if ":" in self.name else "FILE.json"

    def checked(self) -> "Plan":
        """The plan itself, if its parts fit together.

        Raises:
            PlanError: UNet ranges overlap or leave a gap, a rule ends before it starts, or there are two adaptive rules.
        """
        for number, rule in enumerate(self.rules):
            if rule.stop <= rule.start:
                raise PlanError(
                    f"plan {self.name}: rules.{number} starts at {rule.start:g} and stops at {rule.stop:g}; "
                    "stop is a share of the steps above start"
                )
            self._check_predict(number, rule)
        self._check_unets()
        if sum(isinstance(rule.when, Threshold) for rule in self.rules) > 1:
            raise PlanError(f"plan {self.name}: two rules have mode threshold; a plan can have only one")
        return self

    @property
    def adaptive(self) -> Rule | None:
        """The rule whose key steps are decided while running, if there is one."""
        return next((rule for rule in self.rules if isinstance(rule.when, Threshold)), None)

    def _check_predict(self, number: int, rule: Rule) -> None:
        if rule.predict is None:
            return
        where = f"plan {self.name}: rules.{number}.predict"
        if rule.predict.space != "raw" and rule.units != (NOISE,):
            raise PlanError(
                f"{where}.space is {rule.predict.space!r}, which is for rules whose only unit is {NOISE!r}, whose inherit steps "
                "skip the UNet; leave space out"
            )
        if rule.predict.order and isinstance(rule.when, Explicit) and len({*rule.when.steps}) == 1:
            raise PlanError(
                f"{where}.order is {rule.predict.order}, which forecasts from two key steps, and when lists one; "
                "list another, or leave predict out"
            )

    def _check_unets(self) -> None:
        if self.switch_by == "steps" and not self.unets:
            raise PlanError(f"plan {self.name}: switch_by 'steps' but no unets; list the UNets by range, or leave it out")
        at = 0.0
        for number, part in enumerate(self.unets):
            where = f"plan {self.name}: unets.{number} covers {part}"
            if self.switch_by == "steps" and not (part.start.is_integer() and (part.stop or 0.0).is_integer()):
                raise PlanError(f"{where}; with switch_by 'steps' start and stop are whole numbers of steps")
            if self.switch_by == "noise" and (part.start >= 1 or (part.stop or 0.0) > 1):
                raise PlanError(
                    f"{where}; start and stop are shares of the noise schedule, from 0 to 1; for steps set switch_by to 'steps'"
                )
            if part.start != at or part.end <= part.start:
                raise PlanError(
                    f"{where}, expected a range that starts at {at:g}: ranges follow each other without overlap or gap"
                )
            if part.stop is None and part is not self.unets[-1]:
                raise PlanError(f"{where}, but is not the last; only the last range may leave stop out")
            at = part.end
        if self.switch_by == "noise" and self.unets and at < 1:
            raise PlanError(f"plan {self.name}: unets end at {at:g}; the last range must end at 1")


def matching(pattern: str, units: Sequence[str], parts: Collection[str] = ()) -> list[str]:
    """The units that a pattern names: those it matches, and those inside a block or layer it matches.

    Of the units that are ``parts`` of others it names some only if it names no other, so that it says the same of a UNet whose
    transformers are in one piece.
    """
    if parts and (whole := matching(pattern, [unit for unit in units if unit not in parts])):
        return whole
    return _matching(_counted(pattern, units), units)


def names_only_parts(pattern: str, units: Sequence[str]) -> bool:
    """Whether a pattern names nothing but parts of transformers that are in one piece in a UNet with these ``units``."""
    return not matching(pattern, units) and bool(_matching(_counted(pattern, units), attention_parts(units)))


def _matching(counted: str, units: Iterable[str]) -> list[str]:
    return [unit for unit in units if any(fnmatchcase(part, counted) for part in _ancestors(unit))]


def _counted(pattern: str, units: Sequence[str]) -> str:
    """A pattern whose block and layer numbers below zero are counted from the end of a UNet, of which ``units`` are all units."""
    path = pattern.split(".")
    for depth in (1, 3):
        if len(path) > depth and path[depth].startswith("-") and path[depth][1:].isdecimal():
            before = ".".join(path[:depth])
            numbers = {unit.split(".")[depth] for unit in units if unit.startswith(f"{before}.") and unit.count(".") > depth}
            path[depth] = str(len([number for number in numbers if number.isdecimal()]) + int(path[depth]))
    return ".".join(path)


def _ancestors(unit: str) -> list[str]:
    parts = unit.split(".")
    return [".".join(parts[:length]) for length in range(1, len(parts) + 1)]


def inherited_features(plan: Plan, units: Sequence[str], unet: str = "") -> list[frozenset[str]]:
    """The features of a UNet that each rule inherits: its units' own, or by residual their branches.

    A feature belongs to the first rule that names it.

    Args:
        plan: whose rules.
        units: names of the UNet's units.
        unet: what the UNet is called, for messages.

    Raises:
        PlanError: a pattern names no unit, a unit has no residual branch, or a rule has nothing left.
        PartitionError: a pattern names a part of transformers that are in one piece in the UNet's bundle.
    """
    plan_and_unet = f"plan {plan.name}, UNet {unet}" if unet else f"plan {plan.name}"
    taken: frozenset[str] = frozenset()
    found = []
    for number, rule in enumerate(plan.rules):
        features = _named(rule, units, unet, f"{plan_and_unet}: rules.{number}") - taken
        if not features:
            raise PlanError(f"{plan_and_unet}: rules.{number} inherits nothing: rules before it inherit all that it names")
        found.append(features)
        taken |= features
    return found


def _named(rule: Rule, units: Sequence[str], unet: str, where: str) -> frozenset[str]:
    found: set[str] = set()
    parts = attention_parts(units)
    for pattern in rule.units:
        named = matching(pattern, units, parts)
        if not named and names_only_parts(pattern, units):
            reason = "a part of attentions, which in this bundle are in one piece"
            raise PartitionError(f"{where}.units names {pattern!r}, {reason}", unet)
        if not named:
            shown = ", ".join(unit for unit in units if not unit.endswith(BRANCH))
            raise PlanError(f"{where}.units names {pattern!r}, which this UNet does not have; its units: {shown}")
        found.update(named if rule.kind == "output" else _branches(pattern, named, units, where))
    return frozenset(found)


def _branches(pattern: str, named: Sequence[str], units: Collection[str], where: str) -> set[str]:
    branches = set()
    for unit in named:
        branch = unit if unit.endswith(BRANCH) else f"{unit}{BRANCH}"
        if branch not in units:
            raise PlanError(
                f"{where}.units names {pattern!r} by residual, but {unit} has no residual branch: its input and output differ "
                "and there is no shortcut; choose ResNets and attentions, or kind output"
            )
        branches.add(branch)
    return branches


def shown(value: object) -> str:
    """Anything as a message has it: on one line, without lone surrogates, and short."""
    text = " ".join(str(value).split()).encode("utf-8", "backslashreplace").decode("utf-8")
    return text if len(text) <= _MOST_SHOWN else f"{text[:_MOST_SHOWN]}..."


_OWNERS: dict[object, type[Record]] = {
    "rules": Rule,
    "unets": UNetRange,
    "predict": Predict,
    "guidance": Guidance,
    "found": Found,
    **MODES,
}


def _explained(wrong: ErrorDetails) -> str:
    """One line about a field that pydantic refused: its name, why, what was got, and the fields that there are."""
    location, kind = wrong["loc"], wrong["type"]
    field = shown(".".join(str(part) for part in location)) or "the file"
    owner = next((_OWNERS[part] for part in reversed(location[:-1]) if part in _OWNERS), Plan)
    fields = f"the fields here are {', '.join(owner.model_fields)}"
    if kind == "extra_forbidden":
        return f"{field}: there is no such field; {fields}"
    if kind == "missing":
        return f"{field}: it is missing; {fields}"
    return f"{field}: {shown(wrong['msg'])}; got {_written(wrong['input'])}"


def _written(value: Any) -> str:
    """A value as JSON has it, short; of a long number, that it is one."""
    try:
        return shown(json.dumps(value, default=str))
    except (ValueError, RecursionError):  # numbers of more digits than Python writes, or what holds itself
        return f"a {type(value).__name__} that is too long to show"
