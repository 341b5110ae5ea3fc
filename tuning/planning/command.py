"""The work of ``python -m tuning plan``, from its options to the plan file or the front."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from engines import Bundle, make_engine
from engines.support.extras import need
from engines.support.files import real_path, write_text
from runtime.errors import PlanError
from runtime.pipeline import Pipeline
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from runtime.plans.words import Found
from runtime.prepared import Prepared
from runtime.report.cost import full_macs
from runtime.request import Request
from tuning.errors import TuningError
from tuning.planning.costs import Costs, MacCosts, TimeCosts
from tuning.planning.evaluation import Pictures, choose_prompts, pictures_at_a_time
from tuning.planning.options import PlanOptions
from tuning.planning.progress import SearchProgress, duration
from tuning.planning.report import Row, controls, fewer_steps, judge, judge_found, plot_front, table
from tuning.planning.search import Search
from tuning.planning.space import LEVELS, Point, Space, uniform
from tuning.planning.state import State

__all__ = ["plan_command"]

_MOST_POINTS = 10
"""Of a front."""
_LEAST_STEPS = 3
"""Evaluations of the UNet."""
_NEAR = 0.06
"""Costs of controls that stand beside a plan, at most so far from its own."""


@dataclass(frozen=True)
class _Job:
    """A search that is ready to start: what it searches, and by which pictures its plans are judged."""

    options: PlanOptions
    search: Search
    costs: Costs
    pictures: list[Pictures]
    state: State
    progress: SearchProgress
    console: Console


def plan_command(options: PlanOptions, console: Console) -> None:
    """Find a plan, or a front of plans, and write it with what it was found by; nothing if anything fails.

    Raises:
        UserError: an option, a bundle or the prompts are refused, or no plan is as asked for.
        OSError: the result cannot be written.
    """
    options.check()
    if options.front:
        need("matplotlib", "the plot")  # before anything is measured
    job = _prepared(options, console)
    if options.front:
        _write_front(job)
    else:
        _write_plan(job)
    job.state.remove()


def _prepared(options: PlanOptions, console: Console) -> _Job:
    bundles = _open(options.bundle)
    source = bundles[0].manifest.source
    prompts, others = choose_prompts(source, options.prompts, options.count)
    pipeline = Pipeline(bundles[0], make_engine(options.engine))
    shared = _shared_options(options, pipeline)
    first = pipeline.prepare(Request(prompts[0], plan="full", num_images=_least_images(pipeline), **shared))
    at_a_time = pictures_at_a_time(pipeline, first.height, first.width)
    sets = [Pictures(pipeline, prompts, at_a_time, shared)]
    sets += [Pictures(pipeline, others, at_a_time, shared, held_back=True)] if others else []
    space = _space(pipeline, bundles, first)
    if space.steps < _LEAST_STEPS:
        raise TuningError(
            f"--steps {options.steps}: {options.scheduler} evaluates the UNet {space.steps} times, and plans compute the first "
            f"and the last of them: there is nothing to save; give {_LEAST_STEPS} or more"
        )
    state = State(options.state, _settings(options, bundles, prompts, first))
    costs = _costs(options, pipeline, first, prompts, state)
    progress = SearchProgress(console)
    search = Search(space, sets[0], costs, state, progress)
    if options.budget is not None:
        search.check_budget(options.budget)  # before pictures are made, which takes long at full size
    with progress.timed(space.steps):
        _ = sets[0].reference
    resumed = f"; resumed with {len(state)} figures from {state.path}" if len(state) else ""
    time = duration(_work(options, search) * progress.seconds_a_step)
    progress.say(f"{len(prompts)} prompts, {space.steps} evaluations of {options.scheduler}, about {time} at most{resumed}")
    return _Job(options, search, costs, sets, state, progress, console)


def _work(options: PlanOptions, search: Search) -> float:
    """Steps of the whole UNet that a search is worth at most, about."""
    if options.front:
        tried = sum(search.work(budget, _tries_of_a_point(options)) for budget in _budgets(search))
    else:
        tried = search.work(1 if options.budget is None else options.budget, options.tries)
    return search.gap_work() + tried


def _open(folders: Sequence[Path]) -> list[Bundle]:
    """The bundles, that of the larger UNet first; raises TuningError where they cannot take turns."""
    bundles = sorted(map(Bundle.open, folders), key=lambda bundle: -full_macs(bundle.manifest))
    if len(bundles) > 2:
        raise TuningError(f"--bundle is given {len(bundles)} times; a plan can begin with one smaller UNet: give two at most")
    for other in bundles[1:]:
        one = bundles[0]
        if other.manifest.source != one.manifest.source:
            raise TuningError(
                f"{one.folder} was built from {one.manifest.source} and {other.folder} from {other.manifest.source}; "
                "a plan switches between UNets of one source only"
            )
        if other.manifest.variant == one.manifest.variant:
            raise TuningError(f"{one.folder} and {other.folder} both have the UNet {one.manifest.variant!r}; give one of them")
    return bundles


def _shared_options(options: PlanOptions, pipeline: Pipeline) -> dict[str, Any]:
    height, width = options.height_and_width or (None, None)
    guidance = pipeline.manifest.guidance_scale if options.guidance_scale is None else options.guidance_scale
    return {
        "steps": options.steps, "scheduler": options.scheduler, "guidance_scale": guidance, "height": height, "width": width,
    }  # fmt: skip


def _least_images(pipeline: Pipeline) -> int:
    """How many pictures the smallest call makes."""
    return pipeline.manifest.max_images if pipeline.is_static else 1


def _space(pipeline: Pipeline, bundles: Sequence[Bundle], first: Prepared) -> Space:
    """The choices that the bundles allow; raises TuningError where one is not where plans find it."""
    unets = tuple(bundle.manifest.variant for bundle in bundles)
    halves = first.guided and not pipeline.is_static
    space = Space(first.schedule.timesteps, (), unets, first.scheduler.config.num_train_timesteps, halves)
    if len(unets) > 1:
        every = Point(tuple(range(space.steps)), switch=1)
        pipeline.schedule(space.plan(every), space.timesteps, first.guided)
        taken = pipeline.swapper.bundle_of(unets[1]).folder
        if real_path(taken) != real_path(bundles[1].folder):
            raise TuningError(
                f"plans find their UNets beside {bundles[0].folder}, and there {unets[1]!r} is in {taken}, "
                f"not {bundles[1].folder}: put the bundles into one folder"
            )
    return replace(space, levels=tuple(level for level in LEVELS if _runs(pipeline, space, level)))


def _runs(pipeline: Pipeline, space: Space, level: str) -> bool:
    """Whether the bundles can inherit a level's units."""
    keys = uniform(space.steps, (space.steps + 1) // 2)
    plan = space.plan(Point(keys, level=level, switch=len(space.unets) - 1))
    try:
        pipeline.schedule(plan, space.timesteps)
    except PlanError:
        return False
    return True


def _settings(options: PlanOptions, bundles: Sequence[Bundle], prompts: Sequence[str], first: Prepared) -> dict[str, object]:
    """All that what a search measures depends on."""
    return {
        "bundles": {bundle.manifest.variant: bundle.manifest.key for bundle in bundles},
        "engine": options.engine,
        "scheduler": options.scheduler,
        "steps": options.steps,
        "guidance": first.guidance_scale,
        "size": [first.height, first.width],
        "prompts": hashlib.sha256("\n".join(prompts).encode()).hexdigest(),
        "cost": options.cost,
    }


def _costs(options: PlanOptions, pipeline: Pipeline, first: Prepared, prompts: Sequence[str], state: State) -> Costs:
    if options.cost == "macs":
        return MacCosts(pipeline, first.schedule.timesteps, first.guided, first.sizes)
    return TimeCosts(pipeline, first.schedule.timesteps, first.guided, first.request, state)


def _write_plan(job: _Job) -> None:
    options, search = job.options, job.search
    if options.budget is not None:
        point = search.best(options.budget, options.tries)
    else:
        assert options.psnr is not None
        point = search.cheapest(options.psnr, options.tries)
    found = _judged(job, point)
    rows = [found, *_same_cost(job, point)]
    job.console.print(table(rows, [len(each.prompts) for each in job.pictures]))
    _write(job, options.path, point, found)
    given = f"--bundle {quote(str(job.pictures[0].pipeline.bundle.folder))} --plan {quote(str(options.path))}"
    given += f" --scheduler {quote(options.scheduler)} --steps {options.steps}"
    job.progress.say(f"written: {options.path}; python -m runtime PROMPT {given} runs it")


def _write_front(job: _Job) -> None:
    options, search = job.options, job.search
    chosen = _budgets(search)
    points = [search.best(budget, _tries_of_a_point(options)) for budget in chosen]
    series = {"found": [_judged(job, point) for point in points]} | _control_series(job, chosen)
    job.console.print(table([row for rows in series.values() for row in rows], [len(each.prompts) for each in job.pictures]))
    for point, row in zip(points, series["found"], strict=True):
        _write(job, options.path / f"{row.name}.json", point, row)
    figures = {name: [asdict(row) for row in rows] for name, rows in series.items()}
    write_text(options.path / "front.json", json.dumps(figures, indent=1) + "\n")
    title = f"{options.steps} steps of {options.scheduler}, {job.pictures[0].pipeline.manifest.source}"
    measure = f"mean of {len(job.pictures[-1].prompts)} prompts" + (" not used to find them" if len(job.pictures) > 1 else "")
    plot_front(series, options.path / "front.png", title, measure)
    job.progress.say(f"written: {len(points)} plans, front.json and front.png in {options.path}")


def _budgets(search: Search) -> list[float]:
    """The costs of a front's points, evenly spread over those that can be had."""
    budgets = search.budgets()
    return budgets[:: -(-len(budgets) // _MOST_POINTS)]


def _tries_of_a_point(options: PlanOptions) -> int:
    return max(1, options.tries // 4)


def _judged(job: _Job, point: Point) -> Row:
    cost = job.search.cost(point)
    return judge_found(f"found-{cost:.3f}", job.search.space.plan(point), cost, job.pictures)


def _same_cost(job: _Job, point: Point) -> list[Row]:
    """Controls that cost about as much: fewer steps of the scheduler, and the nearest of each preset."""
    steps, cost = job.options.steps, job.search.cost(point)
    fewer = fewer_steps(steps, cost)
    rows = [judge(f"{fewer} steps", find_plan("full"), fewer / steps, job.pictures, fewer)]
    nearest: dict[str, tuple[str, Plan, float]] = {}
    for preset in sorted(controls(job.costs, job.search.space.levels), key=lambda preset: abs(preset[2] - cost)):
        if abs(preset[2] - cost) < _NEAR:
            nearest.setdefault(preset[0].partition(":")[0], preset)
    return rows + [judge(*preset, job.pictures) for preset in nearest.values()]


def _control_series(job: _Job, budgets: Sequence[float]) -> dict[str, list[Row]]:
    steps = job.options.steps
    counts = sorted({fewer_steps(steps, budget) for budget in budgets})
    found = {"fewer steps": [judge(f"{n} steps", find_plan("full"), n / steps, job.pictures, n) for n in counts]}
    for name, plan, cost in controls(job.costs, job.search.space.levels):
        found.setdefault(name.partition(":")[0], []).append(judge(name, plan, cost, job.pictures))
    return found


def _write(job: _Job, path: Path, point: Point, row: Row) -> None:
    """Write a plan file with what it was found for; its PSNR is that of prompts that it was not found with, if there are any."""
    shared = job.pictures[-1]
    found = Found(
        scheduler=job.options.scheduler,
        steps=job.options.steps,
        guidance_scale=shared.options["guidance_scale"],
        prompts=len(shared.prompts),
        cost=round(row.cost, 4),
        psnr=round(row.psnr, 2),
        source=shared.pipeline.manifest.source,
    )
    plan = job.search.space.plan(point, row.name).model_copy(update={"found": found})
    write_text(path, plan.model_dump_json(indent=1) + "\n")
