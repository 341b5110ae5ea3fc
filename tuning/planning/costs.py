"""The cost of a plan as a share of ``full``: known before it runs, from MACs or from the time of each kind of step here."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import replace

from runtime.pipeline import Pipeline
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from runtime.plans.schedule import Schedule, Step
from runtime.report.cost import relative_macs
from runtime.request import Request
from tuning.planning.state import State

__all__ = ["Costs", "MacCosts", "TimeCosts"]

_ROUNDS = 3

_Kind = tuple[str, tuple[str, ...], bool]
"""Of a step: its UNet, the segments that it runs, and whether with half of guidance's rows."""


class Costs:
    """Costs of plans over the steps of a call.

    Args:
        pipeline: whose bundle.
        timesteps: of each model evaluation.
        guided: whether there is guidance.
    """

    def __init__(self, pipeline: Pipeline, timesteps: Sequence[float], guided: bool) -> None:
        self._pipeline, self._timesteps, self._guided = pipeline, timesteps, guided

    def of(self, plan: Plan) -> float:
        """The cost of a plan, as a share of that of ``full``; raises PlanError where the bundle cannot run it."""
        return self._of(self._pipeline.schedule(plan, self._timesteps, self._guided))

    def _of(self, schedule: Schedule) -> float:
        raise NotImplementedError


class MacCosts(Costs):
    """By multiply-accumulates, at a size of latents (``height`` and ``width``)."""

    def __init__(self, pipeline: Pipeline, timesteps: Sequence[float], guided: bool, sizes: Mapping[str, int]) -> None:
        super().__init__(pipeline, timesteps, guided)
        self._sizes = sizes

    def _of(self, schedule: Schedule) -> float:
        return relative_macs(schedule, self._pipeline.manifest.variant, sizes=self._sizes)


class TimeCosts(Costs):
    """By seconds of each kind of step, as the engine takes for a call; measured once for each kind, in turns with ``full``."""

    def __init__(self, pipeline: Pipeline, timesteps: Sequence[float], guided: bool, request: Request, state: State) -> None:
        super().__init__(pipeline, timesteps, guided)
        self._request, self._state = request, state

    def _of(self, schedule: Schedule) -> float:
        steps = schedule.all_steps()
        return sum(self._time(schedule, step) for step in steps) / len(steps)

    def _time(self, schedule: Schedule, step: Step) -> float:
        kind = step.unet, schedule.subgraph(step).segment_names, step.half
        name = " ".join(("half time" if step.half else "time", step.unet, *kind[1]))
        return self._state.get(name, lambda: self._measure(schedule.plan, kind))

    def _measure(self, plan: Plan, kind: _Kind) -> float:
        """The time of a kind of step over that of a step of ``full``: the median ratio of a few rounds, after one to warm up."""
        ratios = []
        for _ in range(_ROUNDS + 1):
            part, whole = (self._seconds(each) for each in (plan, find_plan("full")))
            ratios.append(statistics.median(part[kind]) / statistics.median(next(iter(whole.values()))))
        return statistics.median(ratios[1:])

    def _seconds(self, plan: Plan) -> dict[_Kind, list[float]]:
        found: dict[_Kind, list[float]] = {}
        for record in self._pipeline.generate(replace(self._request, plan=plan, output_type="latent")).steps:
            found.setdefault((record.unet, record.ran, record.half), []).append(record.seconds)
        return found
