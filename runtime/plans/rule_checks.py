"""Whether a plan's rules fit its UNets: what an adaptive rule compares, and what is carried from one UNet to another."""

from collections.abc import Sequence

from engines.bundle.manifest import Feature
from engines.bundle.names import TEXT, attention_parts
from runtime.errors import PartitionError, PlanError
from runtime.plans.demand import demand
from runtime.plans.key_steps import Threshold
from runtime.plans.layout import Layout
from runtime.plans.plan import Rule

__all__ = ["check_adaptive", "check_carry"]


def check_adaptive(layout: Layout) -> None:
    """Check that the feature of an adaptive rule is there to be compared before the rule is decided.

    Raises:
        PlanError: another rule inherits the feature, the rule forecasts it, or it is made from what the rule inherits.
        PartitionError: no segment gives it out.
    """
    for number, rule in enumerate(layout.plan.rules):
        if isinstance(rule.when, Threshold):
            where = f"plan {layout.plan.name}: rules.{number}.when.feature is {rule.when.feature!r}"
            _check_not_inherited(layout, number, rule, rule.when.feature, where)
            for unet, features in layout.features.items():
                _check_not_forecast(layout, number, rule, rule.when.feature, features[number])
                _check_given_out(layout, unet, rule.when.feature, where)
                _check_made_before(layout, unet, rule.when.feature, features[number], where)


def _check_not_inherited(layout: Layout, number: int, rule: Rule, feature: str, where: str) -> None:
    """The feature that an adaptive rule compares is cached for that rule alone."""
    for other, another in enumerate(layout.plan.rules):
        shared = set(rule.span(layout.steps)) & set(another.span(layout.steps))
        if other != number and shared and any(feature in features[other] for features in layout.features.values()):
            raise PlanError(
                f"{where}, which rules.{other} inherits at steps {min(shared)} to {max(shared)}, where it would not change; "
                "choose a feature that no other rule inherits, or other parts of the schedule with start and stop"
            )


def _check_not_forecast(layout: Layout, number: int, rule: Rule, feature: str, inherited: frozenset[str]) -> None:
    """Features are known by their names in the UNet here: a rule's units may be counted from the end."""
    if rule.predict is not None and feature in inherited:
        raise PlanError(
            f"plan {layout.plan.name}: rules.{number}.predict: the rule compares {feature!r} to decide its key steps, which is "
            "computed at every step; forecast other units, or compare another feature"
        )


def _check_given_out(layout: Layout, unet: str, feature: str, where: str) -> None:
    manifest = layout.unets[unet]
    outputs = [name for segment in manifest.unet_segments for name in segment.outputs]
    if feature in outputs:
        return
    message = f"{where}, which no segment of UNet {unet} gives out; choose from: {', '.join(outputs)}"
    units = manifest.unet_units
    raise PartitionError(message, unet) if feature in {*units, *attention_parts(units)} else PlanError(message)


def _check_made_before(layout: Layout, unet: str, feature: str, inherited: frozenset[str], where: str) -> None:
    makers = demand(layout.unets[unet].units, [feature], {TEXT})
    behind = [name for unit in makers for name in unit.inputs if name in inherited]
    if behind:
        raise PlanError(
            f"{where}, which is made from {behind[-1]}, and the rule inherits that; "
            "choose a feature that is made before, such as 'stem'"
        )


def check_carry(layout: Layout, keep: Sequence[frozenset[str]]) -> None:
    """Check that features read after a switch are made, in the same shape, by the UNet before it.

    Args:
        layout: of a plan whose rules inherit across switches.
        keep: for each step, the features that it keeps for later ones.

    Raises:
        PlanError: a feature is missing in one of the UNets, or has another shape.
    """
    for later in range(layout.steps):
        for number, rule in enumerate(layout.plan.rules):
            if layout.is_key(number, rule, later, False):
                continue
            inherited = layout.features[layout.unet_at[later]][number]
            compared = {rule.when.feature} if isinstance(rule.when, Threshold) else set[str]()
            for index in layout.sources(number, rule, later):
                for name in sorted((keep[index] & inherited) | compared):
                    _check_alike(layout, index, later, name)


def _check_alike(layout: Layout, index: int, later: int, name: str) -> None:
    here, there = _shape(layout, index, name), _shape(layout, later, name)
    if here != there:
        raise PlanError(
            f"plan {layout.plan.name}: carry cannot take {name} from UNet {layout.unet_at[index]} to {layout.unet_at[later]}: "
            f"it is {here or 'not there'} in one and {there or 'not there'} in the other; set carry to false"
        )


def _shape(layout: Layout, index: int, name: str) -> tuple[object, ...] | None:
    feature: Feature | None = layout.unets[layout.unet_at[index]].features.get(name)
    return None if feature is None else feature.shape
