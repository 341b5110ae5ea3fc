"""The list of plans, and what each would cost with a bundle's UNet."""

from rich.box import SIMPLE
from rich.table import Table

from engines import Bundle, Manifest
from runtime.errors import PartitionError, PlanError, RequestError
from runtime.execution.siblings import find_sibling, partitioned_by_unit
from runtime.plans.checks import check_runs
from runtime.plans.presets import PRESETS, find_plan
from runtime.plans.schedule import Schedule
from runtime.report.cost import from_to, relative_macs

__all__ = ["list_plans"]


def list_plans(bundle: Bundle | None, steps: int) -> Table:
    """A row for each preset: how it is written, what it does and, with a bundle, the MACs of its example relative to ``full``.

    Costs are those of the bundle's segments, or where these cannot run a plan, of a bundle that is partitioned for it. They are
    known from the manifest: nothing is loaded or run.

    Args:
        bundle: whose UNet; for plans that switch UNets, bundles of the same source beside it are looked at too.
        steps: denoising steps, each one evaluation.

    Raises:
        RequestError: there are no steps.
    """
    if steps < 1:
        raise RequestError(f"steps = {steps}; choose 1 or more")
    table = Table(box=SIMPLE)
    table.add_column("plan", no_wrap=True)
    if bundle is not None:
        table.add_column("MACs", no_wrap=True)
    table.add_column("what its inherit steps do")
    for preset in PRESETS.values():
        cost = () if bundle is None else (_cost(bundle, preset.example, steps),)
        table.add_row(preset.form, *cost, preset.summary)
    table.add_row("FILE.json", *(() if bundle is None else ("",)), "what you write: see docs/plans.md")
    return table


def _cost(bundle: Bundle, name: str, steps: int) -> str:
    """MACs relative to full, as a range where steps are decided while running; ``*`` where the segments cannot run it.

    Where the plan names parts of attentions that are in one piece in the bundle, nobody knows the parts' MACs.
    """
    plan, variant = find_plan(name), bundle.manifest.variant
    timesteps = [1000 * (1 - step / steps) for step in range(steps)]
    try:
        parts = dict.fromkeys(part.unet for part in plan.unets) or [variant]
        unets = {part: find_sibling(bundle, part, plan, timesteps).manifest for part in parts}
        apart = {part: partitioned_by_unit(manifest) for part, manifest in unets.items()}
        schedule = Schedule(plan, apart, timesteps, guided=True)
    except PartitionError:
        return "*"
    except PlanError:  # this UNet is too small for it, or has no sibling
        return "-"
    full, fitting = variant if variant in unets else None, _fitting(schedule, unets)
    least, most = (relative_macs(fitting or schedule, full, changed) for changed in (False, True))
    return from_to(least, most, digits=2) + ("" if fitting else " *")


def _fitting(schedule: Schedule, unets: dict[str, Manifest]) -> Schedule | None:
    """A schedule on the segments of these bundles; None where they cannot run it."""
    try:
        found = Schedule(schedule.plan, unets, schedule.timesteps, guided=True)
        check_runs(found)
    except PlanError:
        return None
    return found
