"""Sentences on the settings that a plan was found for, and on whether a call has others."""

from engines.support.records import one_line
from runtime.plans.plan import Plan

__all__ = ["described_find", "found_for_others", "guidance_unread"]


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


def found_for_others(plan: Plan, scheduler: str, steps: int, source: str = "") -> str:
    """A warning where a plan was found for another scheduler, number of steps or model (``source``); nothing where it was not."""
    found = plan.found
    if found is None:
        return ""
    advice = "its pictures may be further from those of full; find one for these with python -m tuning plan"
    if (found.scheduler, found.steps) != (scheduler, steps):
        was, now = f"for {found.steps} steps of {found.scheduler}", f"{steps} of {scheduler}"
    elif source and found.source and found.source != source:
        was, now = f"on {one_line(found.source, 100)}", one_line(source, 100)
    else:
        return ""
    return f"plan {plan.name} was found {was}, and this is {now}: {advice}"


def guidance_unread(plan: Plan, guided: bool) -> str:
    """A note where a plan says when guidance evaluates both of its halves, and there is no guidance; else nothing."""
    if plan.guidance is None or guided:
        return ""
    return (
        f"plan {plan.name} says at which steps guidance evaluates both of its halves, and without guidance (a scale of 1 or "
        "less) there is only one: that part of the plan does nothing"
    )
