"""The work of ``python -m tuning plan``, from its options to the plan file or the front."""

import hashlib
import json
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from shlex import quote
from typing import Any

from rich.console import Console

from engines import Bundle, make_engine
from engines.support.extras import need
from engines.support.files import real_path, write_text
from runtime.api import find_bundle
from runtime.errors import PlanError
from runtime.pipeline import Pipeline
from runtime.plans.plan import Plan
from runtime.plans.words import Found
from runtime.prepared import Prepared
from runtime.report.cost import full_macs
from runtime.request import Request
from tuning.errors import TuningError
from tuning.planning.costs import Costs, MacCosts, TimeCosts
from tuning.planning.evaluation import Pictures, choose_prompts, pictures_at_a_time
from tuning.planning.options import PlanOptions
from tuning.planning.progress import SearchProgress, duration
from tuning.planning.report import (
    NEAR,
    Row,
    control_series,
    controls,
    decided,
    fewer_steps,
    judge_found,
    judging_work,
    plot_front,
    same_cost,
    table,
)
from tuning.planning.search import Search
from tuning.planning.space import LEVELS, Point, Space, uniform
from tuning.planning.state import State

__all__ = ["plan_command"]

_MOST_POINTS = 10
"""Of a front."""
_LEAST_STEPS = 3
"""Evaluations of the UNet."""


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
    with warnings.catch_warnings():
        # Of candidates and controls nobody asked for.
        warnings.filterwarnings("ignore", message=r"plan .*: rules\.\d+ forecasts")
        _found(options, console)


def _found(options: PlanOptions, console: Console) -> None:
    if options.front:
        need("matplotlib", "the plot")  # before anything is measured
    there = _there(options) if options.judge_only else []
    job = _prepared(options, console)
    if options.front:
        _write_front(job, there)
    else:
        _write_plan(job)
    job.state.remove()


def _prepared(options: PlanOptions, console: Console) -> _Job:
    progress = SearchProgress(console)
    bundles = _open(options.bundle or (find_bundle(None, options.engine),))
    source = bundles[0].manifest.source
    prompts, others = choose_prompts(source, options.prompts, options.count)
    progress.say(
        f"bundle {', '.join(str(bundle.folder) for bundle in bundles)}: {len(prompts)} prompts to find plans with, {len(others)} "
        "others to judge them by; the pictures of full are made first"
    )
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
    search = Search(space, sets[0], costs, state, progress)
    if options.budget is not None:
        search.check_budget(options.budget)  # before pictures are made, which takes long at full size
    with progress.timed(space.steps):
        _ = sets[0].reference
    resumed = f"; resumed with {len(state)} figures from {state.path}" if len(state) else ""
    job = _Job(options, search, costs, sets, state, progress, console)
    time = duration((_search_work(options, search) + _judging_work(job)) * progress.seconds_a_step)
    progress.say(f"{space.steps} evaluations of {options.scheduler} each, about {time} in all{resumed}")
    return job


def _search_work(options: PlanOptions, search: Search) -> float:
    """Steps of the whole UNet that a search is worth, about."""
    if options.judge_only:
        return 0.0
    if options.front:
        tried = sum(search.work(budget, _tries_of_a_point(options)) for budget in _budgets(search))
    elif options.budget is not None:
        tried = search.work(options.budget, options.tries)
    else:  # the nearest, some two costs below it, and the pictures of each that is asked about
        budgets = search.budgets()
        tried = search.work(1, options.tries // 4 + options.tries)
        tried += search.space.steps * (3 + len(budgets).bit_length())
    return search.gap_work() + tried


def _judging_work(job: _Job, found: Sequence[float] = ()) -> float:
    """Steps of the whole UNet that judging is worth, about: of plans that cost so much, or of those that are to be found."""
    search, steps = job.search, job.search.space.steps
    if job.options.front:
        budgets, others = _budgets(search), [cost for _, _, cost in controls(job.costs, search.space.levels)]
        fewer = [fewer_steps(steps, budget) / steps for budget in budgets]
        # Adaptive plans are taken to compute afresh at every step.
        return judging_work(job.pictures, steps, found or budgets, [*others, *fewer, *(1.0 for _ in decided(job.pictures[-1]))])
    cost = found[0] if found else job.options.budget or 1.0
    near = {name.partition(":")[0] for name, _, other in controls(job.costs, search.space.levels) if abs(other - cost) < NEAR}
    return judging_work(job.pictures, steps, [cost], [cost + NEAR] * (1 + len(near)))


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
    cost = search.cost(point)
    with _judging(job, [cost]) as tick:
        plan = search.space.plan(point, f"found-{cost:.3f}")
        found = judge_found(plan.name, plan, cost, job.pictures, tick)
        levels = search.space.levels
        rows = [found, *same_cost(job.costs, levels, options.steps, cost, job.pictures, tick)]
    job.console.print(table(rows, [len(each.prompts) for each in job.pictures]))
    _write(job, options.path, plan, found)
    given = f"--bundle {quote(str(job.pictures[0].pipeline.bundle.folder))} --plan {quote(str(options.path))}"
    given += f" --scheduler {quote(options.scheduler)} --steps {options.steps}"
    job.progress.say(f"written: {options.path}; python -m runtime PROMPT {given} runs it")


def _write_front(job: _Job, there: Sequence[Plan]) -> None:
    """Find the plans, or take those that are there; judge them, and write all."""
    options, search = job.options, job.search
    chosen = _budgets(search)
    plans = {plan: job.costs.of(plan) for plan in there}
    for budget in () if there else chosen:
        point = search.best(budget, _tries_of_a_point(options))
        plan = search.space.plan(point, f"found-{search.cost(point):.3f}")
        plans[plan] = search.cost(point)
    with _judging(job, list(plans.values())) as tick:
        found = [judge_found(plan.name, plan, cost, job.pictures, tick) for plan, cost in plans.items()]
        adaptive = job.options.cost == "macs"
        series = {"found": found} | control_series(
            job.costs, search.space.levels, job.options.steps, chosen, job.pictures, tick, adaptive
        )
    job.console.print(table([row for rows in series.values() for row in rows], [len(each.prompts) for each in job.pictures]))
    for plan, row in zip(plans, found, strict=True):
        _write(job, options.path / f"{row.name}.json", plan, row)
    figures = {name: [asdict(row) for row in rows] for name, rows in series.items()}
    write_text(options.path / "front.json", json.dumps(figures, indent=1) + "\n")
    title = f"{options.steps} steps of {options.scheduler}, {job.pictures[0].pipeline.manifest.source}"
    measure = f"mean of {len(job.pictures[-1].prompts)} prompts" + (" not used to find them" if len(job.pictures) > 1 else "")
    measure += ", with 95 % intervals"
    plot_front(series, options.path / "front.png", title, measure)
    job.progress.say(f"written: {len(plans)} plans, front.json and front.png in {options.path}")


def _budgets(search: Search) -> list[float]:
    """The costs of a front's points, evenly spread over those that can be had."""
    budgets = search.budgets()
    return budgets[:: -(-len(budgets) // _MOST_POINTS)]


def _tries_of_a_point(options: PlanOptions) -> int:
    return max(1, options.tries // 4)


def _there(options: PlanOptions) -> list[Plan]:
    """The plans of a front that is there; raises TuningError where there is none, or one for other calls."""
    plans = [Plan.read(path) for path in sorted(options.path.glob("found-*.json"))]
    if not plans:
        raise TuningError(
            f"--judge-only: {options.path} has no found-*.json; leave it out to find plans, or name a front's --out"
        )
    for plan in plans:
        if plan.found is None or (plan.found.scheduler, plan.found.steps) != (options.scheduler, options.steps):
            raise TuningError(
                f"--judge-only: {options.path / plan.name}.json was not found for {options.steps} steps of {options.scheduler}; "
                "give what it was found for"
            )
    return plans


@contextmanager
def _judging(job: _Job, found: Sequence[float]) -> Iterator[Callable[[], None]]:
    """The last stage of a command; gives what is to be called after every call that makes pictures."""
    work = _judging_work(job, found)
    with job.progress.stage(f"pictures of {len(job.pictures[-1].prompts)} prompts under plans found and controls", work):
        share = job.pictures[-1].at_a_time / len(job.pictures[0].prompts)
        yield lambda: job.progress.did(share * job.search.space.steps / 2)


def _write(job: _Job, path: Path, plan: Plan, row: Row) -> None:
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
    write_text(path, plan.model_copy(update={"found": found}).model_dump_json(indent=1) + "\n")
