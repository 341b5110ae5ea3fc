"""Sentences on the settings that a plan was found for, and on whether a call has others."""

from runtime.plans.plan import Plan

__all__ = ["described_find", "found_for_others", "guidance_unread"]


def described_find(plan: Plan) -> str:
    """The settings that a plan was found for and its worth there, as one line; empty for plans that no search found."""
    found = plan.found
    if found is None:
        return ""
    return (
        f"found for {found.steps} steps of {found.scheduler} with guidance {found.guidance_scale:g}: MACs {found.cost:.2f} of "
        f"full, {found.psnr:.1f} dB to its pictures on {found.prompts} prompts"
    )


def found_for_others(plan: Plan, scheduler: str, steps: int) -> str:
    """A warning where a plan was found for another scheduler or number of steps; nothing where it was not."""
    found = plan.found
    if found is None or (found.scheduler, found.steps) == (scheduler, steps):
        return ""
    return (
        f"plan {plan.name} was found for {found.steps} steps of {found.scheduler}, and this is {steps} of {scheduler}: its "
        "pictures may be further from those of full; find one for these with python -m tuning plan"
    )


def guidance_unread(plan: Plan, guided: bool) -> str:
    """A note where a plan says when guidance evaluates both of its halves, and there is no guidance; else nothing."""
    if plan.guidance is None or guided:
        return ""
    return (
        f"plan {plan.name} says at which steps guidance evaluates both of its halves, and without guidance (a scale of 1 or "
        "less) there is only one: that part of the plan does nothing"
    )
