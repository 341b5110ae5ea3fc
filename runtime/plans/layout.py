"""A plan laid over the steps of a call: the UNet that runs at each step, and the steps at which each rule computes afresh."""

from collections.abc import Mapping, Sequence

from engines.bundle.manifest import Manifest
from runtime.errors import PlanError
from runtime.plans.key_steps import Threshold
from runtime.plans.plan import Plan, Rule, UNetRange, inherited_features

__all__ = ["Layout"]


class Layout:
    """Which UNet and which rules hold at which step.

    Its arguments are those of ``Schedule``.

    Raises:
        PlanError: a UNet is not there, or a rule names a unit that its UNet does not have or inherits in its first step.
    """

    def __init__(self, plan: Plan, unets: Mapping[str, Manifest], timesteps: Sequence[float], train_steps: int) -> None:
        self.plan, self.unets = plan, unets
        self.timesteps = tuple(map(float, timesteps))
        self.steps = len(self.timesteps)
        self.unet_at = self._unet_at_each_step(train_steps)
        """Name of the UNet that runs at each step."""
        self.switches = {i for i in range(1, self.steps) if self.unet_at[i] != self.unet_at[i - 1]}
        """The steps that run another UNet than the step before."""
        self.features = {name: inherited_features(plan, unets[name].unet_units, name) for name in dict.fromkeys(self.unet_at)}
        """By UNet, the features that each rule inherits."""
        self._keys = [self._key_steps(number, rule) for number, rule in enumerate(plan.rules)]

    def is_key(self, number: int, rule: Rule, index: int, changed: bool) -> bool:
        """Whether a rule computes afresh at a step; ``changed`` answers where an adaptive rule has to find out."""
        keys = self._keys[number]
        if keys is not None:
            return index in keys
        span = rule.span(self.steps)
        first = index == span.start or (index in self.switches and not self.plan.carry)
        return index not in span or first or changed

    def sources(self, number: int, rule: Rule, index: int) -> list[int]:
        """The steps that may have computed what a rule inherits at a step: its last key step, or any where it is adaptive."""
        keys = self._keys[number]
        if keys is not None:
            return [max((key for key in keys if key < index), default=0)]
        start = max([rule.span(self.steps).start, *(s for s in self.switches if s <= index and not self.plan.carry)])
        return list(range(start, index))

    def _unet_at_each_step(self, train_steps: int) -> list[str]:
        ranges = self.plan.unets
        if not ranges:
            return [next(iter(self.unets))] * self.steps
        if self.plan.switch_by == "steps":
            _check_step_ranges(self.plan, self.steps)
            positions = list(map(float, range(self.steps)))
        else:
            positions = [1 - timestep / train_steps for timestep in self.timesteps]
        names = [_range_at(ranges, position).unet for position in positions]
        for name in dict.fromkeys(names):
            if name not in self.unets:
                raise PlanError(f"plan {self.plan.name} runs the UNet {name!r}; there is: {', '.join(self.unets)}")
        return names

    def _key_steps(self, number: int, rule: Rule) -> set[int] | None:
        """Steps at which a rule computes afresh, None where that is decided while running."""
        span = rule.span(self.steps)
        outside = set(range(self.steps)).difference(span)
        if not len(span):  # too few steps for the rule's part of the schedule to have one
            return outside
        if isinstance(rule.when, Threshold):
            return None
        try:
            keys = {span.start + key for key in rule.when.keys(len(span))}
        except ValueError as error:
            raise PlanError(f"plan {self.plan.name}: rules.{number}.when.{error}") from error
        if span.start not in keys:
            raise PlanError(
                f"plan {self.plan.name}: rules.{number}.when leaves out step 0, so the first step would inherit features "
                "that nobody computed; the first step of a rule is always a key step: add 0"
            )
        return keys | outside | (set() if self.plan.carry else self.switches)


def _range_at(ranges: Sequence[UNetRange], position: float) -> UNetRange:
    return next((part for part in ranges if position < part.end), ranges[-1])


def _check_step_ranges(plan: Plan, steps: int) -> None:
    """Ranges counted in steps cover those that run, and no others."""
    for number, part in enumerate(plan.unets):
        if part.start >= steps or (part.stop or 0) > steps:
            raise PlanError(
                f"plan {plan.name}: unets.{number} covers steps {part}, but only {steps} steps run; "
                f"choose a start below {steps} and a stop up to that, or leave the last stop out"
            )
    end = plan.unets[-1].end
    if end < steps:
        raise PlanError(
            f"plan {plan.name}: unets end at step {end:g}, but {steps} steps run; "
            "leave the last stop out, and the range runs to the end"
        )
