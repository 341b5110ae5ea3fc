"""A plan for a number of steps of given UNets: which step inherits what, and what a key step must keep for later ones."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property

from engines.bundle.manifest import Manifest, Segment
from engines.bundle.names import NOISE
from runtime.plans.key_steps import Threshold
from runtime.plans.layout import Layout
from runtime.plans.plan import Plan, Rule
from runtime.plans.rule_checks import check_adaptive, check_carry
from runtime.plans.subgraph import Subgraph, common_prefix, subgraph_for
from runtime.plans.words import Predict

__all__ = ["Schedule", "Step"]


@dataclass(frozen=True)
class Step:
    """One model evaluation: its number, the UNet, the features inherited, and those to keep for later steps."""

    index: int
    unet: str
    key: bool
    """Whether every rule that holds at this step computes afresh."""
    inherited: frozenset[str] = frozenset()
    keep: frozenset[str] = frozenset()
    half: bool = False
    """Whether guidance evaluates only the half that is the prompt's."""

    @property
    def kind(self) -> str:
        """``key``, ``inherit`` or ``skip`` (nothing of the UNet is wanted), and whether it has half of the rows."""
        if NOISE in self.inherited:
            return "skip"
        return ("key" if self.key else "inherit") + (", half" if self.half else "")

    @cached_property
    def wanted(self) -> frozenset[str]:
        """The features that have to be there at the end of the step."""
        return self.keep | {NOISE}


class Schedule:
    """A plan laid out over model evaluations.

    Args:
        plan: what to lay out.
        unets: manifest of each UNet by name; a plan without ``unets`` takes the first.
        timesteps: of each model evaluation, falling.
        train_steps: timesteps of the whole noise schedule.
        guided: whether there is classifier-free guidance, without which a plan's ``guidance`` says nothing.

    Raises:
        PlanError: a UNet is not there, a rule names a unit that its UNet does not have or inherits in its first step, the UNet is
            skipped in its last, or features to carry do not match.
    """

    def __init__(
        self,
        plan: Plan,
        unets: Mapping[str, Manifest],
        timesteps: Sequence[float],
        train_steps: int = 1000,
        guided: bool = False,
    ) -> None:
        self._layout = Layout(plan, unets, timesteps, train_steps, guided)
        self.with_guidance = guided
        self.plan, self.unets, self.timesteps, self.steps = plan, unets, self._layout.timesteps, self._layout.steps
        check_adaptive(self._layout)
        self._subgraphs: dict[tuple[str, frozenset[str], frozenset[str], frozenset[str]], Subgraph] = {}
        assumptions = (False, True) if self.adaptive else (True,)
        self._keep, self._last_read = self._liveness(assumptions)
        steps = {a: tuple(self._step(i, self._keep[i], a) for i in range(self.steps)) for a in assumptions}
        self._steps = {False: steps[assumptions[0]], True: steps[True]}
        if plan.carry:
            check_carry(self._layout, self._keep)

    def unet(self, index: int) -> str:
        """Name of the UNet that runs at a step."""
        return self._layout.unet_at[index]

    @property
    def guided(self) -> bool:
        """Whether some steps evaluate only the half of guidance that is the prompt's."""
        return self._layout.guided

    @property
    def carries_predictions(self) -> bool:
        """Whether predictions are turned into noise or pictures on the way from step to step."""
        return self.guided or any(rule.predict is not None and rule.predict.space != "raw" for rule in self.plan.rules)

    @cached_property
    def _depths(self) -> Mapping[str, int]:
        found = Counter[str]()
        for features in self._layout.features.values():
            for rule, names in zip(self.plan.rules, features, strict=True):
                found |= Counter(dict.fromkeys(names, rule.depth))
        return found

    def depth(self, name: str) -> int:
        """From how many key steps a step takes a feature that it inherits or compares."""
        return self._depths.get(name, 1)

    def predict(self, unet: str, name: str) -> Predict | None:
        """How a feature is forecast where it is inherited."""
        number = self._rule_of(unet, name)
        return None if number is None else self.plan.rules[number].predict

    def is_forecast(self, step: Step, name: str) -> bool:
        """Whether a feature that a step inherits is forecast: not where only one key step has been."""
        number = self._rule_of(step.unet, name)
        if number is None or self.plan.rules[number].depth == 1:
            return False
        return len(self._layout.sources(number, self.plan.rules[number], step.index)) > 1

    def key_steps(self, number: int) -> list[int]:
        """The key steps of a rule within its part of the schedule; every step where they are decided while running."""
        rule = self.plan.rules[number]
        return [index for index in rule.span(self.steps) if self._layout.is_key(number, rule, index, True)]

    def never_forecast(self) -> list[int]:
        """The numbers of rules that are to forecast, and have one key step only of those that their modes say."""
        rules = [(number, rule) for number, rule in enumerate(self.plan.rules) if rule.depth > 1]
        return [number for number, rule in rules if len(self._layout.own_keys(number, rule)) == 1]

    def _rule_of(self, unet: str, name: str) -> int | None:
        """The number of the rule that inherits a feature of a UNet, if one does."""
        return next((number for number, names in enumerate(self._layout.features[unet]) if name in names), None)

    def is_half(self, step: Step, name: str) -> bool:
        """Whether a step has only the prompt's rows of a feature, one half of guidance. Of predictions no more is kept."""
        if name == NOISE:
            return self.guided
        return step.half and self.unets[step.unet].features[name].shape[0] == "batch"

    def is_read_later(self, name: str, made: int, index: int) -> bool:
        """Whether a step after ``index`` may read a feature as step ``made`` left it."""
        return self._last_read.get((name, made), 0) > index

    @property
    def adaptive(self) -> Rule | None:
        """The rule whose key steps are decided while running, if there is one."""
        return self.plan.adaptive

    def pending_threshold(self, index: int) -> Threshold | None:
        """The adaptive rule's threshold, where a step has to compare its feature before it can be resolved."""
        for number, rule in enumerate(self.plan.rules):
            if isinstance(rule.when, Threshold) and not self._layout.is_key(number, rule, index, False):
                return rule.when
        return None

    def resolve(self, index: int, changed: bool = True) -> Step:
        """The step of that number.

        Args:
            index: of the model evaluation, counted by the caller.
            changed: read where an adaptive rule may inherit: whether its feature has changed enough to compute afresh.
        """
        return self._steps[changed][index]

    def all_steps(self, assume_changed: bool = True) -> tuple[Step, ...]:
        """Every step, taking adaptive rules to compute afresh always (or, where they may, never)."""
        return self._steps[assume_changed]

    def subgraph(self, step: Step, made: frozenset[str] = frozenset()) -> Subgraph:
        """The segments that a step has to run beside those that ``made`` features already; laid out once per kind of step."""
        return self._subgraph(step.unet, step.wanted, step.inherited, made)

    def probe(self, index: int, threshold: Threshold) -> Subgraph:
        """The segments that make the feature of an adaptive rule; features that other rules inherit are inherited."""
        return self._subgraph(*self._probe(index, threshold))

    def probes(self) -> set[tuple[str, frozenset[str], frozenset[str]]]:
        """UNet, wanted and inherited features of all that is done to resolve steps."""
        return {self._probe(index, threshold) for index in range(self.steps) if (threshold := self.pending_threshold(index))}

    def common_prefix(self, index: int, made: frozenset[str]) -> tuple[Segment, ...]:
        """The segments that run at a step however it is resolved, when it has ``made`` the feature that decides."""
        less, more = self.resolve(index, changed=False), self.resolve(index, changed=True)
        return common_prefix(self.subgraph(less, made), self.subgraph(more, made), less.inherited - more.inherited)

    def _probe(self, index: int, threshold: Threshold) -> tuple[str, frozenset[str], frozenset[str]]:
        return self.unet(index), frozenset({threshold.feature}), self._step(index, frozenset(), True).inherited

    def _subgraph(
        self, unet: str, wanted: frozenset[str], inherited: frozenset[str] = frozenset(), made: frozenset[str] = frozenset()
    ) -> Subgraph:
        kind = unet, wanted, inherited, made
        if kind not in self._subgraphs:
            self._subgraphs[kind] = subgraph_for(self.unets[unet], wanted, inherited=inherited, made=made)
        return self._subgraphs[kind]

    def _liveness(self, assumptions: Sequence[bool]) -> tuple[list[frozenset[str]], dict[tuple[str, int], int]]:
        """For each step, the features that later steps read from it; and for each of these, the last step that may.

        From the last step backwards. A step must serve the steps after it however they are resolved, and so may read more than it
        would if all were resolved alike.
        """
        keep: list[set[str]] = [set() for _ in range(self.steps)]
        last_read: dict[tuple[str, int], int] = {}
        for index in reversed(range(self.steps)):
            for changed in assumptions:
                step = self._step(index, frozenset(keep[index]), changed)
                cached = self.subgraph(step).cached_inputs | self._probe_reads(index)
                for number, rule in enumerate(self.plan.rules):
                    inherited = cached & self._layout.features[step.unet][number]
                    compared = cached & {rule.when.feature} if isinstance(rule.when, Threshold) else frozenset[str]()
                    for source in self._layout.sources(number, rule, index) if inherited or compared else ():
                        keep[source] |= inherited
                        for name in inherited | compared:
                            last_read.setdefault((name, source), index)
        return list(map(frozenset, keep)), last_read

    def _step(self, index: int, keep: frozenset[str], changed: bool) -> Step:
        fresh = [self._layout.is_key(number, rule, index, changed) for number, rule in enumerate(self.plan.rules)]
        unet = self.unet(index)
        features = zip(self._layout.features[unet], fresh, strict=True)
        inherited = frozenset[str]().union(*(names for names, is_key in features if not is_key))
        kept = (keep | self._compared(index, fresh)) - inherited
        return Step(index, unet, all(fresh), inherited, kept, self._layout.half(index))

    def _compared(self, index: int, fresh: Sequence[bool]) -> set[str]:
        """The feature that an adaptive rule compares with, where it computes afresh and may inherit later."""
        return {
            rule.when.feature
            for rule, is_key in zip(self.plan.rules, fresh, strict=True)
            if is_key and isinstance(rule.when, Threshold) and index in rule.span(self.steps)
        }

    def _probe_reads(self, index: int) -> frozenset[str]:
        """The features read from the cache to find out whether an adaptive rule's feature has changed."""
        threshold = self.pending_threshold(index)
        return frozenset() if threshold is None else self.probe(index, threshold).cached_inputs | {threshold.feature}
