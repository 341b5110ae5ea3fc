"""The plans that the page offers: a found front or a ladder of presets from quality to speed, presets typed, files uploaded."""

import warnings
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

from engines.support.records import one_line
from runtime import PRESETS, Pipeline, Plan, PlanError, find_plan
from runtime.plans.notes import described_find
from runtime.plans.schedule import Schedule
from runtime.report.cost import from_to, relative_macs

__all__ = ["Rung", "chosen_plan", "described", "ladder", "lay_out", "plan_names", "share_of_macs"]

_LADDER = ("full", "block:2", "layer:2", "deepcache:2", "deepcache:3", "deepcache:4", "deepcache:6", "deepcache:10")
"""Presets whose pictures come nearest to those of full at their costs (docs/plans.md)."""
_STEPS = 20
"""Over which rungs are compared."""


@dataclass(frozen=True)
class Rung:
    """A plan on the way from quality to speed, and its MACs relative to ``full``."""

    plan: Plan
    cost: float


def ladder(pipeline: Pipeline) -> list[Rung]:
    """``full``, and the plans of a front that was found for the bundle, or else presets, dearest first.

    A front is a folder beside the bundle as ``python -m tuning plan --front --out FOLDER`` writes it; where there are several,
    one whose name begins with the bundle's is taken first, and of these the one that was written last. Only plans are taken
    that the bundle can run, and of those only what costs less than the last.
    """
    plans = _front(pipeline.bundle.folder) or [find_plan(name) for name in _LADDER]
    rungs = sorted((rung for plan in [find_plan("full"), *plans] if (rung := _rung(pipeline, plan))), key=lambda rung: -rung.cost)
    return [rung for rung, above in zip(rungs, [None, *rungs], strict=False) if above is None or rung.cost < above.cost]


def _front(bundle: Path) -> list[Plan]:
    """The plans of the front beside a bundle; none where there is no front."""
    fronts = sorted(
        bundle.parent.glob("*/front.json"),
        key=lambda path: (path.parent.name.startswith(bundle.name), path.stat().st_mtime),
    )
    return list(_readable(fronts[-1].parent)) if fronts else []


def _readable(folder: Path) -> Iterator[Plan]:
    for path in sorted(folder.glob("found-*.json")):
        try:
            yield Plan.read(path)
        except PlanError as error:
            warnings.warn(error.line, stacklevel=2)


def _rung(pipeline: Pipeline, plan: Plan) -> Rung | None:
    try:
        schedule = lay_out(pipeline, plan, plan.found.steps if plan.found else _STEPS)
    except PlanError:  # the bundle is not partitioned for it
        return None
    return Rung(plan, relative_macs(schedule))


def lay_out(pipeline: Pipeline, plan: Plan, steps: int, guided: bool = True) -> Schedule:
    """A plan over so many steps of a scheduler that evaluates once a step; raises PlanError where the bundle cannot run it."""
    return pipeline.schedule(plan, [1000 * (1 - step / steps) for step in range(steps)], guided)


def share_of_macs(schedule: Schedule) -> str:
    """The cost of a schedule as a share of ``full``'s, such as ``42 %``; a range where steps are decided while running."""
    least, most = (100 * relative_macs(schedule, changed=changed) for changed in (False, True))
    return f"{from_to(least, most, digits=0)} %"


def described(schedule: Schedule) -> str:
    """The cost of a plan and the settings that it was found for, in words."""
    cost = f"{share_of_macs(schedule)} of the multiply-accumulates of full"
    return "; ".join(filter(None, [cost, described_find(schedule.plan)]))


def plan_names(rungs: list[Rung]) -> list[str]:
    """The names to choose from: those of the rungs, and an example of every preset."""
    return list(dict.fromkeys([*(rung.plan.name for rung in rungs), *(preset.example for preset in PRESETS.values())]))


def chosen_plan(name: object, rungs: list[Rung], uploaded: Plan | None = None) -> Plan:
    """The plan of a name: the one that was uploaded, one of the rungs, or presets; no file is opened.

    Raises:
        PlanError: there is none.
    """
    if not isinstance(name, str):
        raise PlanError(f"plan is a {type(name).__name__}; choose one, or write a preset such as block:3")
    known = {rung.plan.name: rung.plan for rung in rungs} | ({uploaded.name: uploaded} if uploaded else {})
    if name.strip() in known:
        return known[name.strip()]
    if name.strip().endswith(".json"):
        raise PlanError(f"plan {one_line(name, 60)!r}: the page opens no file by its name; upload it")
    return find_plan(name.strip())
