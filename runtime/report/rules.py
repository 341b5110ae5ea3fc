"""A plan's rules in words: the key steps, and what becomes of what is inherited between them."""

from collections.abc import Iterator, Sequence

from engines.bundle.names import NOISE
from engines.support.records import one_line
from runtime.plans.key_steps import Threshold
from runtime.plans.plan import Rule
from runtime.plans.schedule import Schedule

__all__ = ["described_rules"]

_SPACES = {"raw": "prediction", "eps": "noise", "x0": "picture"}
"""What a rule that skips the UNet carries, by the plan's ``space``."""


def described_rules(schedule: Schedule) -> list[str]:
    """A line for each rule of a plan that is laid out, and one for guidance: key steps, order, damping and space of forecasts."""
    lines = [_described(schedule, number, rule) for number, rule in enumerate(schedule.plan.rules)]
    return [*lines, *_described_guidance(schedule)]


def _described(schedule: Schedule, number: int, rule: Rule) -> str:
    units = one_line(" ".join(rule.units), 100)
    skips = rule.units == (NOISE,)
    what = "the UNet is skipped" if skips else f"{units} inherited by {rule.kind}"
    span = rule.span(schedule.steps)
    part = "" if len(span) == schedule.steps else f" at steps {_listed(span)}" if span else " at no step: too few run"
    return f"rules.{number}: {what}{part}; {_keys(schedule, number, rule)}; {_between(rule, skips)}"


def _keys(schedule: Schedule, number: int, rule: Rule) -> str:
    if isinstance(rule.when, Threshold):
        return f"a key step whenever {rule.when.feature} has changed by more than {rule.when.above:g} since the last"
    return f"key steps {_listed(schedule.key_steps(number)) or 'none'}"


def _between(rule: Rule, skips: bool) -> str:
    """What stands for a feature between key steps."""
    predict, carried = rule.predict, "the features"
    if skips:
        carried = f"the {_SPACES[predict.space if predict else 'raw']}"
        if predict and predict.space != "raw":
            carried += f" ({predict.space})"
    if predict is None or predict.order == 0:
        return f"between them {carried} of the last one (order 0)"
    return f"between them {carried} forecast along the last two (order {predict.order}, damping {predict.damping:g})"


def _described_guidance(schedule: Schedule) -> Iterator[str]:
    guidance = schedule.plan.guidance
    if guidance is not None and schedule.guided:
        both = [step.index for step in schedule.all_steps() if not step.half]
        yield (
            f"guidance: both halves at steps {_listed(both)}; between them only the prompt's, and the noise by which the halves "
            f"differ is that of the last one (order 0), times {guidance.scale:g}"
        )


def _listed(steps: Sequence[int]) -> str:
    """Step numbers in words, runs of three and more as their ends: ``0, 2, 4 to 9``."""
    runs: list[list[int]] = []
    for step in steps:
        if runs and step == runs[-1][-1] + 1:
            runs[-1].append(step)
        else:
            runs.append([step])
    return ", ".join(f"{run[0]} to {run[-1]}" if len(run) > 2 else ", ".join(map(str, run)) for run in runs)
