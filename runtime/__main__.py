"""``python -m runtime PROMPT`` and ``python -m runtime plans``."""

import sys
import warnings
from argparse import Namespace
from collections.abc import Mapping, Sequence
from pathlib import Path

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table
from torch import Tensor

from engines import Bundle, BundleError, UserError
from engines.support.cli import Parser, parse_size, run_command
from engines.support.files import atomic_file
from runtime.api import default_bundle, load
from runtime.execution.executor import StepRecord
from runtime.generation import Generation
from runtime.pipeline import Pipeline
from runtime.plans.presets import PRESETS
from runtime.report.cards import find_card
from runtime.report.explain import explain, listed, plot
from runtime.report.least_time import least_time
from runtime.report.plan_table import list_plans
from runtime.report.traffic import traffic_for
from runtime.request import Request

__all__ = ["main"]


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Generate pictures from a prompt; `plans` as the prompt lists the plans and their costs.",
    )
    parser.add_version()
    parser.add_argument("prompt", nargs="?", help="what the picture shows, or the word `plans`")
    parser.add_argument("--negative", default="", help="what it should not show")
    parser.add_argument("--bundle", type=Path, help="a bundle's folder (default: the one in ./bundles that was built last)")
    parser.add_argument("--engine", default="onnxruntime", help="what runs the segments (default: %(default)s)")
    parser.add_argument("--plan", default="full", help="a preset or a .json file (default: %(default)s)")
    parser.add_argument("--scheduler", default="dpm++", help="ddim, pndm, dpm++, euler or heun (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    parser.add_argument("--guidance", type=float, help="classifier-free guidance scale (default: the bundle's, 7.5 or less)")
    parser.add_argument("--seed", type=int, default=0, help="seed of the first picture (default: %(default)s)")
    parser.add_argument("--size", help="HEIGHTxWIDTH in pixels (default: the bundle's first size)")
    parser.add_argument("--image", type=Path, help="a picture to start from instead of noise")
    parser.add_argument(
        "--strength", type=float, default=0.6, help="share of the steps that run on --image, above 0 to 1 (default: %(default)s)"
    )
    parser.add_argument("--mask", type=Path, help="what to repaint of --image: a picture of its size, white where to repaint")
    parser.add_argument("--images", type=int, default=1, help="number of pictures (default: %(default)s)")
    parser.add_argument(
        "--explain", action="store_true", help="print what the plan does and costs, step by step; make no picture"
    )
    parser.add_argument("--card", help="with --explain: the least time that the plan could take on that GPU, such as rtx4090")
    parser.add_argument("--plot", type=Path, metavar="PNG", help="draw the plan, steps across and units down; make no picture")
    parser.add_argument(
        "--allow-nonfinite", action="store_true", help="write the picture, with a warning, where numbers became infinite or NaN"
    )
    parser.add_argument("-o", "--out", type=Path, default=Path("out.png"), help="the PNG file to write (default: %(default)s)")
    return parser


def main(arguments: Sequence[str], prog: str = "python -m runtime") -> None:
    """Run the command, which is called ``prog`` in messages; raises UserError for a user's mistake."""
    options = _parser(prog).parse_args(arguments)
    console = Console(highlight=False, markup=False)
    warnings.showwarning = lambda message, *rest, **others: print(f"warning: {message}", file=sys.stderr)
    if options.card and not options.explain:
        raise UserError(f"--card {options.card} goes with --explain; add that, or leave it out")
    if options.explain or options.plot:
        if options.plot:
            _check_png(options.plot)
        request = _request(options)
        if options.card:
            _explain_card(request, options, console)
        else:
            _explain(load(options.bundle, options.engine), request, options, console)
        return
    if options.prompt == "plans":
        _plans(options, console)
        return
    if options.prompt is None:
        raise UserError(
            "no prompt; say what the picture shows, such as 'a red star on a blue background', or `plans` for a list of them"
        )
    _check_png(options.out)
    request = _request(options)
    folder = options.bundle or default_bundle()
    with console.status(f"loading {folder}"):
        pipeline = load(folder, options.engine)
    generation = _generate(pipeline, request, console)
    console.print(_steps(generation, {name: len(loaded.manifest.unet_segments) for name, loaded in pipeline.networks.items()}))
    for path, image in zip(_paths(options.out, len(generation.images)), generation.images, strict=True):
        _save(image, path, pipeline.manifest.source)
        console.print(
            f"wrote {path} ({image.width}x{image.height}, bundle {folder}, plan {generation.plan.name})", soft_wrap=True
        )


def _check_png(path: Path) -> None:
    """Raise UserError unless a picture can be written there, before anything is loaded for it."""
    advice = "give the name of a .png file in a folder that exists"
    _check_text(path)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"cannot write {path!s:.200}: {advice}")
    if path.is_dir():
        raise UserError(f"cannot write {path!s:.200}: it is a folder; choose another path")
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path!s:.200} ({error.strerror}): {advice} and can be written to") from error


def _check_text(path: Path) -> None:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"cannot write {str(path)!a:.200}: its name is no text in UTF-8; choose another") from error


def _request(options: Namespace) -> Request:
    """The request that the options make; a plan is explained without a prompt, too."""
    height, width = (None, None) if options.size is None else parse_size(options.size)
    return Request(
        prompt="any" if options.prompt is None else options.prompt,
        negative_prompt=options.negative,
        steps=options.steps,
        guidance_scale=options.guidance,
        seed=options.seed,
        height=height,
        width=width,
        num_images=options.images,
        scheduler=options.scheduler,
        plan=options.plan,
        image=options.image,
        strength=options.strength,
        mask=options.mask,
        allow_nonfinite=options.allow_nonfinite,
    )


def _generate(pipeline: Pipeline, request: Request, console: Console) -> Generation:
    columns = (TextColumn("{task.completed} steps"), BarColumn(), TimeRemainingColumn())
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as bar:
        task = bar.add_task("", total=request.steps * (request.strength if request.image else 1))

        def callback(record: StepRecord, latents: Tensor) -> None:
            bar.update(task, completed=record.index + 1)

        return pipeline.generate(request, callback=callback)


def _explain(pipeline: Pipeline, request: Request, options: Namespace, console: Console) -> None:
    prepared = pipeline.prepare(request)
    if options.plot:
        plot(prepared.schedule, options.plot)
        console.print(f"wrote {options.plot}", soft_wrap=True)
    if options.explain:
        table, summary = explain(prepared.schedule, pipeline.networks, prepared.sizes, pipeline.swapper)
        console.print(table)
        console.print(summary, soft_wrap=True)


def _explain_card(request: Request, options: Namespace, console: Console) -> None:
    """Print what the plan could do on a card that is not here: from the manifests alone, nothing is loaded."""
    card, pipeline = find_card(options.card), load(options.bundle, "null")
    prepared = pipeline.prepare(request)
    if options.plot:
        plot(prepared.schedule, options.plot)
        console.print(f"wrote {options.plot}", soft_wrap=True)
    traffic, counted = traffic_for({name: pipeline.swapper.bundle_of(name) for name in prepared.schedule.unets}, card)
    table, lines = least_time(prepared.schedule, card, prepared.sizes, request.images, traffic, counted)
    console.print(table)
    for line in lines:
        console.print(line, soft_wrap=True)


def _steps(generation: Generation, segments: Mapping[str, int]) -> Table:
    """A row for each step: the segments that ran, given how many each UNet has, and the features inherited."""
    table = Table(title=f"{len(generation.steps)} steps, {generation.seconds:.2f} s in all", box=SIMPLE)
    swapped = any(record.swap_seconds for record in generation.steps)
    switches = len({record.unet for record in generation.steps}) > 1
    words = *(["UNet"] if switches else []), "kind", "segments run", "inherited"
    for name in ("step", "timestep", *(["swap ms"] if swapped else []), "ms", *words):
        table.add_column(name, justify="left" if name in words else "right")
    for record in generation.steps:
        swap = f"{1000 * record.swap_seconds:.1f}" if record.swap_seconds else ""
        numbers = str(record.index), f"{record.timestep:.0f}", *([swap] if swapped else []), f"{1000 * record.seconds:.1f}"
        ran = listed(record.ran, segments[record.unet])
        table.add_row(*numbers, *([record.unet] if switches else []), record.kind, ran, listed(record.inherited))
    return table


def _plans(options: Namespace, console: Console) -> None:
    """List the plans; what they cost is a bundle's to say."""
    if options.plan != "full":
        raise UserError(
            f"`plans` lists all of them, and takes no --plan {options.plan}; for that one: --plan {options.plan} --explain"
        )
    try:
        bundle = Bundle.open(options.bundle or default_bundle())
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


def _save(image: Image.Image, path: Path, source: str) -> None:
    """Write a picture whole or not at all; what was there before stays if it cannot be written. Its text names the source."""
    text = PngInfo()
    text.add_text("source", source)
    with atomic_file(path) as temporary:
        image.save(temporary, format="PNG", pnginfo=text)


def _paths(out: Path, count: int) -> list[Path]:
    if count == 1:
        return [out]
    return [out.with_name(f"{out.stem}-{number}{out.suffix}") for number in range(count)]


if __name__ == "__main__":
    run_command(main)
