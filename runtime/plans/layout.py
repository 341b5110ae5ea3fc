"""A plan laid over the steps of a call: the UNet that runs at each step, and the steps at which each rule computes afresh."""

from collections.abc import Mapping, Sequence

from engines.bundle.manifest import Manifest
from engines.bundle.names import NOISE
from runtime.errors import PlanError
from runtime.plans.key_steps import Explicit, Threshold
from runtime.plans.plan import Plan, Rule, UNetRange, inherited_features
from runtime.plans.words import FixedMode

__all__ = ["Layout"]


class Layout:
    """Which UNet and which rules hold at which step.

    Its arguments are those of ``Schedule``.

    Raises:
        PlanError: a UNet is not there, a rule names a unit that its UNet does not have or inherits in its first step, or the UNet
            is skipped in its last.
    """

    def __init__(
        self, plan: Plan, unets: Mapping[str, Manifest], timesteps: Sequence[float], train_steps: int, guided: bool
    ) -> None:
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
        self.guided = guided and plan.guidance is not None
        """Whether the plan says when guidance evaluates both halves, and there is guidance."""
        self._whole = self._whole_steps() if self.guided else set(range(self.steps))

    def is_key(self, number: int, rule: Rule, index: int, changed: bool) -> bool:
        """Whether a rule computes afresh at a step; ``changed`` answers where an adaptive rule has to find out."""
        keys = self._keys[number]
        if keys is not None:
            return index in keys
        span = rule.span(self.steps)
        first = index == span.start or (index in self.switches and not self.plan.carry)
        last = index == self.steps - 1 and self.skips(number)
        return index not in span or first or last or changed

    def own_keys(self, number: int, rule: Rule) -> set[int]:
        """The key steps that a rule's mode says where it inherits at all, without those of switches and the UNet's last.

        None of them where they are decided while running.
        """
        keys, span = self._keys[number] or set(), rule.span(self.steps)
        forced = self.switches | ({self.steps - 1} if self.skips(number) else set())
        return (keys & set(span)) - (forced - {span.start}) if set(span) - keys else set()

    def skips(self, number: int) -> bool:
        """Whether a rule inherits the UNet's prediction itself, so that nothing else need run."""
        return any(NOISE in features[number] for features in self.features.values())

    def half(self, index: int) -> bool:
        """Whether a step evaluates only the half of guidance that is the prompt's."""
        return index not in self._whole

    def start(self, rule: Rule, index: int) -> int:
        """The first step whose features a rule may read at a step."""
        return max([rule.span(self.steps).start, *(s for s in self.switches if s <= index and not self.plan.carry)])

    def sources(self, number: int, rule: Rule, index: int) -> set[int]:
        """The steps whose features a rule may read at a step: its last key steps, or any where it is adaptive.

        A step with all rows also reads the last of those that had them.
        """
        keys, start = self._keys[number], self.start(rule, index)
        if keys is None:
            return set(range(start, index))
        before = [key for key in range(index - 1, start - 1, -1) if key in keys]
        whole = [] if self.half(index) else [key for key in before if not self.half(key)]
        return {*before[: rule.depth], *whole[: rule.depth]}

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
        keys = self._listed(rule.when, span, f"rules.{number}.when")
        if self.skips(number) and span.stop == self.steps and self.steps - 1 not in keys:
            self._check_last(number, rule.when)
            keys.add(self.steps - 1)
        return keys | outside | (set() if self.plan.carry else self.switches)

    def _listed(self, when: FixedMode, span: range, where: str) -> set[int]:
        """The key steps of a mode over a span."""
        try:
            keys = {span.start + key for key in when.keys(len(span))}
        except ValueError as error:
            raise PlanError(f"plan {self.plan.name}: {where}.{error}") from error
        if span.start not in keys:
            raise PlanError(
                f"plan {self.plan.name}: {where} leaves out step 0, so the first step would inherit features "
                "that nobody computed; the first step of a rule is always a key step: add 0"
            )
        return keys

    def _check_last(self, number: int, when: FixedMode) -> None:
        """The last step decides the picture, and is always evaluated; who lists steps is told so."""
        if isinstance(when, Explicit) and when.of is None:
            raise PlanError(
                f"plan {self.plan.name}: rules.{number}.when leaves out step {self.steps - 1}, so the last step would skip the "
                f"UNet; the last step of a rule on {NOISE!r} is always a key step: add {self.steps - 1}"
            )

    def _whole_steps(self) -> set[int]:
        """The steps at which guidance has both halves: as listed, and wherever features are there for the first time."""
        assert self.plan.guidance is not None
        starts = {self.start(rule, index) for rule in self.plan.rules for index in rule.span(self.steps)}
        return self._listed(self.plan.guidance.when, range(self.steps), "guidance.when") | starts


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
