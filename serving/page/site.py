"""Reactions of the page when something on it is touched: functions of plain values, which ``app`` ties to its parts."""

import math
import secrets
from collections.abc import Iterator
from html import escape
from pathlib import Path
from typing import Any

from engines import UserError
from engines.support.records import one_line
from engines.support.spelling import did_you_mean
from runtime import Pipeline, Plan, RequestError
from runtime.plans.plan import MOST_BYTES
from serving.page.asked import MOST_STEPS, Asked
from serving.page.calls import Calls, Cancelled
from serving.page.plans import chosen_plan, described, ladder, lay_out, plan_names
from serving.page.reproduce import bundle_name
from serving.page.strip import Strip
from serving.page.views import WAITING, View, fault, status, views
from serving.queueing.service import Service

__all__ = ["Site"]

_FIRST_PLAN = "deepcache:3"
_SEEDS = 2**32
"""Seeds that the dice draw are below this: browsers keep them as they are."""


class Site:
    """The bundles that the page offers, and its visitors' calls.

    Args:
        service: makes all pictures, those of the page and others'.
    """

    def __init__(self, service: Service) -> None:
        self.service, self.pipelines = service, service.pipelines
        self.rungs = {name: ladder(pipeline) for name, pipeline in self.pipelines.items()}
        self.calls = Calls()

    @property
    def first(self) -> str:
        """The bundle that is chosen when the page is opened."""
        return next(iter(self.pipelines))

    def pipeline(self, bundle: object) -> Pipeline:
        """A bundle's pipeline; raises RequestError where there is none of the name."""
        if not isinstance(bundle, str) or bundle not in self.pipelines:
            near = did_you_mean(bundle, [*self.pipelines]) if isinstance(bundle, str) else ""
            raise RequestError(f"there is no bundle {bundle!r:.60} here; {near}choose from: {', '.join(self.pipelines)}")
        return self.pipelines[bundle]

    def plan_names(self, bundle: str, uploaded: Plan | None = None) -> list[str]:
        """The plans to choose from with a bundle."""
        return [*([uploaded.name] if uploaded else []), *plan_names(self.rungs[bundle])]

    def first_rung(self, bundle: str) -> int:
        """Where the slider stands when the page is opened: at a plan that is worth its name, or at ``full``."""
        names = [rung.plan.name for rung in self.rungs[bundle]]
        return names.index(_FIRST_PLAN) if _FIRST_PLAN in names else len(names) // 2

    def plan_at(self, bundle: object, position: object) -> str:
        """The name of the plan at a place of the slider."""
        self.pipeline(bundle)
        rungs = self.rungs[str(bundle)]
        if not isinstance(position, int | float) or not 0 <= position < len(rungs):
            raise RequestError(f"the slider goes from 0 to {len(rungs) - 1}")
        return rungs[math.floor(position)].plan.name

    def place_of(self, bundle: object, plan: object) -> int | None:
        """The place of the slider at which a plan stands, if it does."""
        self.pipeline(bundle)
        names = [rung.plan.name for rung in self.rungs[str(bundle)]]
        return names.index(str(plan)) if plan in names else None

    def describe(self, bundle: object, plan: object, steps: object, uploaded: Plan | None = None) -> tuple[str, str]:
        """The cost of a plan and its strip, both as HTML. If something is wrong, the first says what, and the second is empty."""
        try:
            pipeline = self.pipeline(bundle)
            found = chosen_plan(plan, self.rungs[str(bundle)], uploaded)
            if not isinstance(steps, int | float) or not 1 <= steps <= MOST_STEPS:
                raise RequestError(f"steps = {steps!r:.40}; the page takes 1 to {MOST_STEPS}")
            schedule = lay_out(pipeline, found, int(steps))
            return f'<p class="cost">{escape(described(schedule))}</p>', Strip(schedule).svg()
        except Exception as error:
            return f'<p class="cost wrong" role="alert">{escape(self.said(error))}</p>', ""

    @staticmethod
    def read_plan(path: str | Path) -> Plan:
        """The plan in a file that was uploaded there; raises PlanError, which does not tell where."""
        with Path(path).open("rb") as file:
            return Plan.from_json(file.read(MOST_BYTES + 1), f"plan file {one_line(Path(path).name, 60)}")

    @staticmethod
    def dice() -> int:
        """A seed."""
        return secrets.randbelow(_SEEDS)

    def begin(self, visitor: str) -> str:
        """A visitor's call is to come: it can be cancelled from now on. What is shown while it waits for its turn."""
        self.calls.begin(visitor)
        return status("running", WAITING, 0)

    def generate(self, visitor: str, bundle: object, plan: object, uploaded: Plan | None, **controls: Any) -> Iterator[View]:
        """Everything that is shown of a visitor's call; whatever happens, the last view says how it ended.

        ``controls`` are the other fields of ``Asked``.
        """
        with self.calls.running(visitor) as stop:
            try:
                self.pipeline(bundle)
                asked = Asked(plan=chosen_plan(plan, self.rungs[str(bundle)], uploaded), **controls)
                yield from views(self.service, str(bundle), asked, stop)
            except Cancelled:
                yield {"status": status("idle", "cancelled")}
            except Exception as error:
                yield {"status": status("wrong", self.said(error))}

    def said(self, error: Exception) -> str:
        """The line that a visitor reads of an error; bundles have the names in it that the page gives them."""
        line = fault(error)
        if isinstance(error, UserError):
            for pipeline in self.pipelines.values():
                folder = pipeline.bundle.folder
                for path in (folder, folder.resolve()):
                    line = line.replace(str(path), bundle_name(folder)).replace(str(path.parent), bundle_name(folder.parent))
        return line
