"""The work of ``python -m runtime`` once its arguments are read: pictures, a plan explained, or the list of plans."""

import json
from argparse import Namespace
from dataclasses import replace
from typing import Any

from rich.console import Console

from engines import Bundle, BundleError, UserError
from engines.support.cli import print_warnings, starting
from runtime.api import find_bundle, load
from runtime.command.arguments import PLANS, check_png, request_of
from runtime.command.comparison import Comparison, draw
from runtime.command.output import announce, as_json, progress, show_kinds, show_steps
from runtime.generation import Generation
from runtime.pipeline import Pipeline
from runtime.plans.notes import described_find, plan_notes
from runtime.plans.presets import PRESETS
from runtime.report.cards import find_card
from runtime.report.explain import explain, explained_as_json, plot
from runtime.report.kinds import segment_counts
from runtime.report.plan_table import list_plans
from runtime.report.rules import described_rules
from runtime.report.traffic import at_best
from runtime.request import Request

__all__ = ["run"]


def run(options: Namespace) -> None:
    """Run the command on its arguments by name; raises UserError for a user's mistake."""
    console = Console(highlight=False, markup=False, quiet=options.quiet or options.json)
    print_warnings()
    if options.card is not None and not options.explain:
        raise UserError(f"--card {options.card} goes with --explain; add that, or leave it out")
    if options.explain or options.plot:
        _explain(options, console)
    elif options.prompt == PLANS:
        _plans(options, console)
    else:
        _generate(options, console)


def _generate(options: Namespace, console: Console) -> None:
    """Make pictures, write them, and print what ran. What needs no bundle is checked before one is loaded."""
    if options.prompt is None:
        raise UserError(
            "no prompt; say what the picture shows, such as 'a red star on a blue background', or `plans` for a list of them"
        )
    check_png(options.out)
    request = request_of(options)
    other = None if options.compare is None else replace(request, plan=options.compare)
    folder = find_bundle(options.bundle, options.engine, request.found_plan)
    with console.status(f"loading {folder}"), starting():
        if options.check:
            Bundle.open(folder).check()
        pipeline = load(folder, options.engine, request.found_plan)
        prepared = pipeline.prepare(request)
        for name in prepared.schedule.unets if options.check else ():
            if (bundle := pipeline.swapper.bundle_of(name)).folder != pipeline.bundle.folder:
                bundle.check()
    if other is not None:
        pipeline.prepare(other)  # refused now rather than after the first
    console.print(announce(pipeline, prepared, folder), soft_wrap=True)
    made = _made(pipeline, request, console, request.found_plan.name if other else "")
    compared = None if other is None else Comparison(made, _made(pipeline, other, console, other.found_plan.name))
    (show_steps if options.every_step else show_kinds)(made, segment_counts(pipeline.networks), console)
    paths = made.save(options.out)
    for path, image, seed in zip(paths, made.images, made.seeds, strict=True):
        console.print(
            f"wrote {path} ({image.width}x{image.height}, bundle {folder}, plan {made.plan.name}, seed {seed})", soft_wrap=True
        )
    if compared is not None:
        sheet = options.out.with_name(f"{options.out.stem}-compared{options.out.suffix}")
        draw(compared, prepared.schedule, sheet)
        console.print(f"wrote {sheet}, with both pictures and what the plan computes", soft_wrap=True)
        console.print(str(compared), soft_wrap=True)
    if options.json:
        figures = None if compared is None else {**compared.as_json(), "picture": str(sheet)}
        print(json.dumps(as_json(made, pipeline, folder, paths, figures)))


def _made(pipeline: Pipeline, request: Request, console: Console, name: str) -> Generation:
    evaluations = len(pipeline.prepare(request).timesteps)
    with progress(console, evaluations, name) as step:
        return pipeline.generate(request, callback=step)


def _explain(options: Namespace, console: Console) -> None:
    if options.plot:
        check_png(options.plot)
    request = request_of(options)
    if options.card is not None:
        _explain_card(request, options, console)
        return
    folder = find_bundle(options.bundle, options.engine, request.found_plan)
    pipeline = load(folder, options.engine, request.found_plan)
    prepared = pipeline.prepare(request)
    console.print(announce(pipeline, prepared, folder), soft_wrap=True)
    if options.plot:
        plot(prepared.schedule, options.plot)
        console.print(f"wrote {options.plot}", soft_wrap=True)
    told: dict[str, Any] = {"bundle": str(folder), "engine": pipeline.engine.name}
    if options.plot:
        told["plot"] = str(options.plot)
    parts = prepared.schedule, pipeline.networks, prepared.sizes, pipeline.swapper
    if options.explain and options.json:
        told |= explained_as_json(*parts) | {"rules": list(described_rules(prepared.schedule))}
    elif options.explain:
        table, summary = explain(*parts, console)
        console.print(table)
        console.print(summary, soft_wrap=True)
        for line in described_rules(prepared.schedule):
            console.print(line, soft_wrap=True)
    plan = request.found_plan
    notes = [*filter(None, [described_find(plan)]), *plan_notes(plan, prepared.schedule, prepared.call)]
    for line in notes:
        console.print(line, soft_wrap=True)
    if options.json:
        print(json.dumps(told | {"notes": notes}))


def _explain_card(request: Request, options: Namespace, console: Console) -> None:
    """Print what the plan could do on a card that is not here: from the manifests alone, nothing is loaded."""
    card, folder = find_card(options.card), find_bundle(options.bundle)
    pipeline = load(folder, "null")
    prepared = pipeline.prepare(request)
    if options.plot:
        plot(prepared.schedule, options.plot)
        console.print(f"wrote {options.plot}", soft_wrap=True)
    bundles = {name: pipeline.swapper.bundle_of(name) for name in prepared.schedule.unets}
    encodes = request.image is not None
    table, lines, told = at_best(prepared.schedule, bundles, card, prepared.sizes, request.images, encodes=encodes)
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)
    if options.json:
        print(json.dumps({"bundle": str(folder), **({"plot": str(options.plot)} if options.plot else {}), **told}))


def _plans(options: Namespace, console: Console) -> None:
    """List the plans; what they cost is a bundle's to say."""
    if options.json:
        raise UserError("`plans` is a table and takes no --json; for one plan: --plan PLAN --explain --json")
    if options.plan != "full":
        raise UserError(
            f"`plans` lists all of them, and takes no --plan {options.plan}; for that one: --plan {options.plan} --explain"
        )
    try:
        bundle = Bundle.open(find_bundle(options.bundle, options.engine))
    except BundleError as error:
        if options.bundle:
            raise
        console.print(list_plans(None, options.steps))
        console.print(f"What plans cost depends on the UNet; {error.line}", soft_wrap=True)
        return
    console.print(list_plans(bundle, options.steps))
    examples = ", ".join(preset.example for preset in PRESETS.values() if preset.example != preset.form)
    console.print(
        f"N: one step in N is a key step, which computes everything. MACs: those of {examples} over {options.steps} steps, "
        f"relative to full, with the UNet of {bundle.folder}. "
        "*: that bundle is partitioned for other plans; build one with --plan. "
        "-: not with this UNet, or there is no bundle of the other UNet beside it. "
        "With --plan PLAN --explain a prompt's steps are listed, and the time that they will take."
    )
