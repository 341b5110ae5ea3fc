"""Sentences on a plan and the call that it is used for: what it was found for, and what of it does nothing there."""

from collections.abc import Iterator
from dataclasses import dataclass

from engines.support.records import one_line
from runtime.images.schedulers import usual_name
from runtime.plans.plan import Plan
from runtime.plans.schedule import Schedule

__all__ = ["Call", "described_find", "plan_notes"]


@dataclass(frozen=True)
class Call:
    """The settings of a call, as far as they are known: a ``scheduler`` of no name, no ``steps`` and no scale are not compared.

    ``guided`` says whether guidance evaluates two halves.
    """

    scheduler: str = ""
    steps: int = 0
    guidance_scale: float | None = None
    guided: bool = True


def described_find(plan: Plan) -> str:
    """The settings that a plan was found for and its worth there, as one line; empty for plans that no search found."""
    found = plan.found
    if found is None:
        return ""
    model = f" on {one_line(found.source, 100)}" if found.source else ""
    return (
        f"found{model} for {found.steps} steps of {found.scheduler} with guidance {found.guidance_scale:g}: MACs "
        f"{found.cost:.2f} of full, {found.psnr:.1f} dB to its pictures on {found.prompts} prompts"
    )


def plan_notes(plan: Plan, schedule: Schedule, call: Call) -> list[str]:
    """All that a user should be told of a plan in this call, where it is laid out over the bundle's UNets; mostly nothing.

    It may have been found for another scheduler, number of steps, guidance or model; have a forecast that two key steps are
    never there for; or say when guidance evaluates its halves where there is no guidance.
    """
    source = next(iter(schedule.unets.values())).source
    return [*_found_for_others(plan, call, source), *_never_forecast(schedule), *_guidance_unread(plan, call)]


def _found_for_others(plan: Plan, call: Call, source: str) -> Iterator[str]:
    differing = list(_differences(plan, call, source))
    if differing:
        was, now = (", ".join(words) for words in zip(*differing, strict=True))
        yield (
            f"plan {plan.name} was found {was}, and this is {now}: its pictures may be further from those of full; "
            "find one for these with python -m tuning plan"
        )


def _differences(plan: Plan, call: Call, source: str) -> Iterator[tuple[str, str]]:
    """What a plan was found for, and what a call has instead, in words."""
    found = plan.found
    if found is None:
        return
    steps, scheduler, scale = call.steps or found.steps, call.scheduler or found.scheduler, call.guidance_scale
    if (usual_name(scheduler), steps) != (usual_name(found.scheduler), found.steps):
        now = f"{steps} of {usual_name(scheduler)}" if call.scheduler else f"{steps} of a scheduler that is not known"
        yield f"for {found.steps} steps of {found.scheduler}", now
    if scale is not None and abs(scale - found.guidance_scale) > 1e-6:
        yield f"with guidance {found.guidance_scale:g}", f"with {scale:g}"
    if source and found.source and found.source != source:
        yield f"on {one_line(found.source, 100)}", one_line(source, 100)


def _never_forecast(schedule: Schedule) -> Iterator[str]:
    for number in schedule.never_forecast():
        yield (
            f"plan {schedule.plan.name}: rules.{number} forecasts from two key steps, and over these {schedule.steps} steps it "
            "has one: features are reused as they are; a forecast needs more key steps"
        )


def _guidance_unread(plan: Plan, call: Call) -> Iterator[str]:
    if plan.guidance is not None and not call.guided:
        yield (
            f"plan {plan.name} says at which steps guidance evaluates both of its halves, and without guidance (a scale of 1 or "
            "less) there is only one: that part of the plan does nothing"
        )
