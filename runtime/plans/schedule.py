"""A plan for a number of steps of given UNets: which step inherits what, and what a key step must keep for later ones."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from engines.bundle.manifest import Feature, Manifest, Segment
from engines.bundle.names import NOISE, TEXT
from runtime.errors import PlanError
from runtime.plans.demand import demand
from runtime.plans.key_steps import Threshold
from runtime.plans.plan import Plan, Rule, inherited_features
from runtime.plans.subgraph import Subgraph, common_prefix, subgraph_for

__all__ = ["Schedule", "Step", "check_runs"]


@dataclass(frozen=True)
class Step:
    """One model evaluation: its number, the UNet, the features inherited, and those to keep for later steps."""

    index: int
    unet: str
    key: bool
    """Whether every rule that holds at this step computes afresh."""
    inherited: frozenset[str] = frozenset()
    keep: frozenset[str] = frozenset()

    @cached_property
    def wanted(self) -> frozenset[str]:
        """What has to be there at the end of the step."""
        return self.keep | {NOISE}


class Schedule:
    """A plan laid out over model evaluations.

    Args:
        plan: what to lay out.
        unets: manifest of each UNet by name; a plan without ``unets`` takes the first.
        timesteps: of each model evaluation, falling.
        train_steps: timesteps of the whole noise schedule.

    Raises:
        PlanError: a UNet is not there, a rule names a unit that its UNet does not have or inherits in its first step, or features
            to carry do not match.
    """

    def __init__(self, plan: Plan, unets: Mapping[str, Manifest], timesteps: Sequence[float], train_steps: int = 1000) -> None:
        self.plan, self.unets = plan, unets
        self.timesteps = tuple(map(float, timesteps))
        self.steps = len(self.timesteps)
        self._unet = self._unets_by_step(train_steps)
        self._switches = {i for i in range(1, self.steps) if self._unet[i] != self._unet[i - 1]}
        used = dict.fromkeys(self._unet)
        self._features = {name: inherited_features(plan, unets[name].unet_units, name) for name in used}
        self._keys = [self._key_steps(number, rule) for number, rule in enumerate(plan.rules)]
        self._check_adaptive()
        self._works: dict[tuple[str, frozenset[str], frozenset[str], frozenset[str]], Subgraph] = {}
        assumptions = (False, True) if self.adaptive else (True,)
        self._keep, self._read_later = self._kept(assumptions)
        steps = {a: tuple(self._step(i, self._keep[i], a) for i in range(self.steps)) for a in assumptions}
        self._steps = {False: steps[assumptions[0]], True: steps[True]}
        if plan.carry:
            self._check_carry()

    def unet(self, index: int) -> str:
        """Name of the UNet that runs at a step."""
        return self._unet[index]

    def read_later(self, index: int) -> frozenset[str]:
        """The features that steps after this one may read from the cache before they are computed afresh."""
        return self._read_later[index]

    @property
    def adaptive(self) -> Rule | None:
        """The rule whose key steps are decided while running, if there is one."""
        return next((rule for rule in self.plan.rules if isinstance(rule.when, Threshold)), None)

    def pending_threshold(self, index: int) -> Threshold | None:
        """What a step has to find out before it can be decided: whether the feature of an adaptive rule has changed."""
        for number, rule in enumerate(self.plan.rules):
            if isinstance(rule.when, Threshold) and not self._is_key(number, rule, index, False):
                return rule.when
        return None

    def decide(self, index: int, changed: bool = True) -> Step:
        """The step of that number.

        Args:
            index: of the model evaluation, counted by the caller.
            changed: read where an adaptive rule may inherit: whether its feature has changed enough to compute afresh.
        """
        return self._steps[changed][index]

    def all_steps(self, assume_changed: bool = True) -> tuple[Step, ...]:
        """Every step, taking adaptive rules to compute afresh always (or, where they may, never)."""
        return self._steps[assume_changed]

    def work(self, step: Step, made: frozenset[str] = frozenset()) -> Subgraph:
        """What a step has to do beside what it has ``made`` already; laid out once for all steps of its kind."""
        return self._work(step.unet, step.wanted, step.inherited, made)

    def probe(self, index: int, threshold: Threshold) -> Subgraph:
        """What has to be done to have the feature that an adaptive rule asks for; what other rules inherit is inherited."""
        return self._work(*self._probe(index, threshold))

    def probes(self) -> set[tuple[str, frozenset[str], frozenset[str]]]:
        """UNet, wanted and inherited features of all that is done to decide steps."""
        return {self._probe(index, threshold) for index in range(self.steps) if (threshold := self.pending_threshold(index))}

    def _probe(self, index: int, threshold: Threshold) -> tuple[str, frozenset[str], frozenset[str]]:
        return self._unet[index], frozenset({threshold.feature}), self._step(index, frozenset(), True).inherited

    def common_prefix(self, index: int, made: frozenset[str]) -> tuple[Segment, ...]:
        """The segments that run at a step whatever is decided there, when it has ``made`` the feature that decides."""
        less, more = self.decide(index, changed=False), self.decide(index, changed=True)
        return common_prefix(self.work(less, made), self.work(more, made), less.inherited - more.inherited)

    def _work(
        self, unet: str, wanted: frozenset[str], inherited: frozenset[str] = frozenset(), made: frozenset[str] = frozenset()
    ) -> Subgraph:
        kind = unet, wanted, inherited, made
        if kind not in self._works:
            self._works[kind] = subgraph_for(self.unets[unet], wanted, inherited=inherited, made=made)
        return self._works[kind]

    def _unets_by_step(self, train_steps: int) -> list[str]:
        """The name of the UNet that runs at each step."""
        ranges = self.plan.unets
        if not ranges:
            return [next(iter(self.unets))] * self.steps
        if self.plan.switch_by == "steps":
            self._check_step_ranges()
            places = list(map(float, range(self.steps)))
        else:
            places = [1 - timestep / train_steps for timestep in self.timesteps]
        names = [next((part.unet for part in ranges if place < part.end), ranges[-1].unet) for place in places]
        for name in dict.fromkeys(names):
            if name not in self.unets:
                raise PlanError(f"plan {self.plan.name} runs the UNet {name!r}; there is: {', '.join(self.unets)}")
        return names

    def _check_step_ranges(self) -> None:
        """Ranges counted in steps cover those that run, and no others."""
        for number, part in enumerate(self.plan.unets):
            if part.start >= self.steps or (part.stop or 0) > self.steps:
                raise PlanError(
                    f"plan {self.plan.name}: unets.{number} covers steps {part}, but only {self.steps} steps run; "
                    f"choose a start below {self.steps} and a stop up to that, or leave the last stop out"
                )
        end = self.plan.unets[-1].end
        if end < self.steps:
            raise PlanError(
                f"plan {self.plan.name}: unets end at step {end:g}, but {self.steps} steps run; "
                "leave the last stop out, and the range goes on to the end"
            )

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
        return keys | outside | (set() if self.plan.carry else self._switches)

    def _is_key(self, number: int, rule: Rule, index: int, changed: bool) -> bool:
        keys = self._keys[number]
        if keys is not None:
            return index in keys
        span = rule.span(self.steps)
        first = index == span.start or (index in self._switches and not self.plan.carry)
        return index not in span or first or changed

    def _kept(self, assumptions: Sequence[bool]) -> tuple[list[frozenset[str]], list[frozenset[str]]]:
        """For each step, the features that later steps read from it; and those that they read before they are computed afresh.

        From the last step backwards. A step must serve the steps after it however they are decided, and so may read more than it
        would if all were decided alike.
        """
        kept: list[set[str]] = [set() for _ in range(self.steps)]
        read_later: list[set[str]] = [set() for _ in range(self.steps)]
        for index in reversed(range(self.steps)):
            for changed in assumptions:
                step = self._step(index, frozenset(kept[index]), changed)
                taken = self.work(step).taken | self._probed(index)
                if index:
                    read_later[index - 1] |= (read_later[index] - step.keep) | taken
                for number, rule in enumerate(self.plan.rules):
                    for key in self._sources(number, rule, index):
                        kept[key] |= taken & self._features[step.unet][number]
        return list(map(frozenset, kept)), list(map(frozenset, read_later))

    def _step(self, index: int, keep: frozenset[str], changed: bool) -> Step:
        fresh = [self._is_key(number, rule, index, changed) for number, rule in enumerate(self.plan.rules)]
        unet = self._unet[index]
        inherited = frozenset[str]().union(*(f for f, is_key in zip(self._features[unet], fresh, strict=True) if not is_key))
        return Step(index, unet, all(fresh), inherited, (keep | self._compared(index, fresh)) - inherited)

    def _compared(self, index: int, fresh: Sequence[bool]) -> set[str]:
        """The feature that an adaptive rule compares with, where it computes afresh and may inherit later."""
        return {
            rule.when.feature
            for rule, is_key in zip(self.plan.rules, fresh, strict=True)
            if is_key and isinstance(rule.when, Threshold) and index in rule.span(self.steps)
        }

    def _probed(self, index: int) -> frozenset[str]:
        """What is read from the cache to find out whether an adaptive rule's feature has changed."""
        threshold = self.pending_threshold(index)
        return frozenset() if threshold is None else self.probe(index, threshold).taken | {threshold.feature}

    def _sources(self, number: int, rule: Rule, index: int) -> list[int]:
        """The steps that may have computed what a rule inherits at a step: its last key step, or any where it is adaptive."""
        keys = self._keys[number]
        if keys is not None:
            return [max((key for key in keys if key < index), default=0)]
        start = max([rule.span(self.steps).start, *(s for s in self._switches if s <= index and not self.plan.carry)])
        return list(range(start, index))

    def _check_adaptive(self) -> None:
        for number, rule in enumerate(self.plan.rules):
            if isinstance(rule.when, Threshold):
                where = f"plan {self.plan.name}: rules.{number}.when.feature is {rule.when.feature!r}"
                self._check_not_inherited(number, rule, rule.when.feature, where)
                for unet, features in self._features.items():
                    self._check_made_before(unet, rule.when.feature, features[number], where)

    def _check_not_inherited(self, number: int, rule: Rule, feature: str, where: str) -> None:
        """What an adaptive rule compares with is kept for it alone."""
        for other, another in enumerate(self.plan.rules):
            shared = set(rule.span(self.steps)) & set(another.span(self.steps))
            if other != number and shared and any(feature in features[other] for features in self._features.values()):
                raise PlanError(
                    f"{where}, which rules.{other} inherits at steps {min(shared)} to {max(shared)}, where it would not change; "
                    "choose a feature that no other rule inherits, or other parts of the schedule with start and stop"
                )

    def _check_made_before(self, unet: str, feature: str, inherited: frozenset[str], where: str) -> None:
        manifest = self.unets[unet]
        outputs = [name for segment in manifest.unet_segments for name in segment.outputs]
        if feature not in outputs:
            cut = f"; {feature} would, in a bundle built with --plan {self.plan.option}" if feature in manifest.unet_units else ""
            raise PlanError(f"{where}, which no segment of UNet {unet} gives out; choose from: {', '.join(outputs)}{cut}")
        makers = demand(manifest.units, [feature], {TEXT})
        behind = [name for unit in makers for name in unit.inputs if name in inherited]
        if behind:
            raise PlanError(
                f"{where}, which is made from {behind[-1]}, and the rule inherits that; "
                "choose a feature that is made before, such as 'stem'"
            )

    def _check_carry(self) -> None:
        """What is read after a switch must be made, in the same shape, by the UNet before it."""
        for later in range(self.steps):
            for number, rule in enumerate(self.plan.rules):
                if self._is_key(number, rule, later, False):
                    continue
                inherited = self._features[self._unet[later]][number]
                compared = {rule.when.feature} if isinstance(rule.when, Threshold) else set[str]()
                for index in self._sources(number, rule, later):
                    for name in sorted((self._keep[index] & inherited) | compared):
                        self._check_alike(index, later, name)

    def _check_alike(self, index: int, later: int, name: str) -> None:
        here, there = self._shape(index, name), self._shape(later, name)
        if here != there:
            raise PlanError(
                f"plan {self.plan.name}: carry cannot take {name} from UNet {self._unet[index]} to {self._unet[later]}: "
                f"it is {here or 'not there'} in one and {there or 'not there'} in the other; set carry to false"
            )

    def _shape(self, index: int, name: str) -> tuple[object, ...] | None:
        feature: Feature | None = self.unets[self._unet[index]].features.get(name)
        return None if feature is None else feature.shape


def check_runs(schedule: Schedule, rebuild: Callable[[str], str] | None = None) -> None:
    """Check that the segments can run a schedule exactly.

    An inherited or kept feature must leave its segment, and what reads an inherited feature must be in another segment than what
    makes it: inside a segment it would be computed afresh.

    Args:
        schedule: a plan laid out over the UNets of bundles.
        rebuild: gives, by a UNet's name, the command that builds its bundle again in its place; without it, what its manifest
            knows is named.

    Raises:
        PlanError: names the feature, and the command that builds a bundle which can run the plan.
    """

    def command(unet: str) -> str:
        manifest = schedule.unets[unet]
        base = rebuild(unet) if rebuild else f"{manifest.build_command} --precision {manifest.precision}"
        option = f" --plan {schedule.plan.option}"
        return base if f"{option} " in f"{base} " else base + option  # it may name the plan already

    steps = {(s.unet, s.wanted, s.inherited) for changed in (False, True) for s in schedule.all_steps(changed)}
    steps |= schedule.probes()
    for unet, wanted, inherited in steps:
        manifest = schedule.unets[unet]
        build = command(unet)
        home = {name: segment.name for segment in manifest.segments for name in segment.units}
        given_out = {name for segment in manifest.segments for name in segment.outputs}
        for name in wanted - given_out:
            raise PlanError(_cannot_run(schedule.plan, name, "a later step", home.get(name, "none"), build))
        for unit in demand(manifest.units, wanted, inherited | {TEXT}):
            for feature in inherited.intersection(unit.inputs):
                if home[feature] == home[unit.name] or feature not in given_out:
                    raise PlanError(_cannot_run(schedule.plan, feature, unit.name, home[feature], build))
    for index in range(schedule.steps):
        _check_decided_first(schedule, index, command)


def _check_decided_first(schedule: Schedule, index: int, command: Callable[[str], str]) -> None:
    """What runs to decide a step must not make, on the way, what the step then makes from inherited features."""
    threshold, less = schedule.pending_threshold(index), schedule.decide(index, changed=False)
    if threshold is None:
        return
    manifest, probe = schedule.unets[less.unet], schedule.probe(index, threshold)
    early = {name: segment.name for segment in probe.segments for name in segment.units}
    decided = less.inherited - schedule.decide(index, changed=True).inherited
    for unit in demand(manifest.units, less.wanted, less.inherited | {TEXT}):
        for feature in decided.intersection(unit.inputs):
            if unit.name in early:
                raise PlanError(
                    f"plan {schedule.plan.name} compares {threshold.feature}, but this bundle makes {unit.name}, from {feature} "
                    f"that may be inherited, in one segment with what that takes ({early[unit.name]}); "
                    f"build a bundle that is cut there: {command(less.unet)}"
                )


def _cannot_run(plan: Plan, feature: str, reader: str, segment: str, build: str) -> str:
    return (
        f"plan {plan.name} inherits {feature}, but this bundle computes it and its reader {reader} in one segment ({segment}); "
        f"build a bundle that is cut there: {build}"
    )
