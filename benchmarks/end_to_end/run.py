"""A run of ``run_trt.py``: build, measure row by row, and report what there is, however the run ends."""

import time
from collections.abc import Sequence
from dataclasses import asdict, replace
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console

from benchmarks.end_to_end.figures import Figures, figures_of
from benchmarks.end_to_end.measure import Log, measure
from benchmarks.end_to_end.plots import plot_all
from benchmarks.end_to_end.prepare import built, environment_of, written_pipeline
from benchmarks.end_to_end.references import References
from benchmarks.end_to_end.report import terminal_table, write_all
from benchmarks.end_to_end.rows import Row, Settings, rows_of
from benchmarks.end_to_end.timeline import Span, plot_timeline
from benchmarks.end_to_end.worker import Subject, SubjectError
from benchmarks.gpu.card import card_state, check_engines
from benchmarks.peers import OURS
from benchmarks.peers.serve import Call
from engines import ON_ONNX, Bundle
from engines.bundle.manifest import File
from engines.errors import UserError
from runtime import Schedule, find_plan
from runtime.embedded import EXAMPLES
from runtime.images.schedulers import make_scheduler
from runtime.report.cost import full_macs, relative_macs

__all__ = ["build", "measured"]

PROMPT = "a lighthouse on a cliff at dusk, oil painting"
_MOST_LINES = 6
"""Of a timeline."""


def build(settings: Settings, variant: str, console: Console) -> Bundle:
    """The bundle of a variant, said on the console."""
    return built(settings, variant, lambda text: console.print(text, highlight=False, soft_wrap=True))


def measured(settings: Settings, name: str, out: Path, console: Console, *, resume: bool) -> bool:
    """Measure and report, also where it is interrupted. Returns whether every row has the output that it has to have.

    Raises:
        KeyboardInterrupt: it was, and the rows until then are reported.
        UserError: no engine can be had, or ``resume`` finds a run with other settings.
    """
    import torch

    found, missing = check_engines(settings.engines, torch.device(settings.device))
    if not found:
        raise UserError("; ".join(f"{engine}: {reason}" for engine, reason in missing.items()))
    rows = rows_of(settings, missing)
    having = replace(settings, engines=tuple(found))  # the others have rows with their reasons
    bundles = {variant: build(having, variant, console) for variant in settings.variants}
    try:
        header = asdict(settings) | {"bundles": {variant: bundle.manifest.key for variant, bundle in bundles.items()}}
        log = Log(settings.work / f"{name}.jsonl", header, resume=resume)
    except ValueError as error:
        raise UserError(f"--resume: {settings.work / name}.jsonl is of another run ({error}); leave --resume out") from error
    first = next(row for row in rows if row.is_base and not row.reason)
    references = References(settings.work / "scratch", name, first, resume=resume)
    run = _Run(settings, bundles, console, log, references, rows)
    stopped: KeyboardInterrupt | None = None
    try:
        run.all_rows()
    except KeyboardInterrupt as error:
        stopped = error
        stopped.add_note("the rows until then are reported, and the same command with --resume goes on")
    else:
        path = out / f"{name}-timeline.png"
        if settings.device == "cpu" and not (resume and path.exists()):
            _draw_timeline(run, path, name, console)
    figures = figures_of(rows, log.samples, {row: _known(row, settings, bundles) for row in rows}, settings.batch)
    right = _report(figures, name, out, settings, console)
    if stopped is not None:
        raise stopped
    return right


def _draw_timeline(run: "_Run", path: Path, title: str, console: Console) -> None:
    """One more picture of each plan, segment by segment."""
    try:
        plot_timeline(run.timeline(), path, title)
    except (UserError, SubjectError) as error:
        console.print(f"no timeline: {error}", highlight=False, soft_wrap=True)


class _Run:
    """The state of a run: what is there, what is done, and how long the rest will take."""

    def __init__(
        self, settings: Settings, bundles: dict[str, Bundle], console: Console, log: Log, references: References,
        rows: Sequence[Row],
    ) -> None:  # fmt: skip
        self._settings, self._bundles, self._console, self._log, self._rows = settings, bundles, console, log, rows
        self._references = references
        self._pictures = len([row for row in rows if not row.reason]) * (settings.rounds + 1)
        self._made, self._started = 0, time.monotonic()
        manifest = bundles["original"].manifest
        height, width = settings.size or manifest.sizes[0]
        prompt = settings.prompt or EXAMPLES.get(settings.source, PROMPT)
        self._call = Call(prompt, settings.steps, manifest.guidance_scale, 0, height, width, settings.batch)

    def all_rows(self) -> None:
        """Measure every subject's rows beside the base row of its engine."""
        rows = [row for row in self._rows if not row.reason]
        first = next(row for row in rows if row.is_base)
        for subject in dict.fromkeys(row.subject for row in rows):
            own = [row for row in rows if row.subject == subject]
            base = next((row for row in rows if row.is_base and row.engine == own[0].engine), first)
            leads = [first, base] if base in own and base != first else [base]
            measure(own, leads, self._start, self._call, self._settings, self._log, self._references, self._tell)

    def _start(self, row: Row, *, timeline: bool = False) -> Subject:
        """The process of a row's subject, with what it needs made first. Raises SubjectError."""
        settings, say = self._settings, partial(self._console.print, highlight=False, soft_wrap=True)
        scratch = settings.work / "scratch"
        scratch.mkdir(parents=True, exist_ok=True)
        options: dict[str, Any] = {
            "engine": row.engine, "device": settings.device, "threads": settings.threads, "images": settings.batch,
            "height": self._call.height, "width": self._call.width, "precision_of_weights": settings.precision,
            "scratch": str(scratch.resolve()),
        }  # fmt: skip
        if row.peer is OURS:
            folder, python = self._bundles[row.variant].folder, ""
        else:
            try:
                python = environment_of(row, settings, say)
            except UserError as error:
                raise SubjectError(str(error)) from error
            folder = written_pipeline(settings, say)
        options |= {"work": str(folder.parent.resolve() / f"{folder.name}-exported"), **dict(row.peer.settings)}
        options["timeline"] = timeline
        return Subject(row.peer.module, folder, options, python, settings.work / "logs" / f"{'-'.join(row.subject)}.log")

    def timeline(self) -> dict[str, list[Span]]:
        """When each segment runs under each plan: of the first variant, on the first engine."""
        rows = [row for row in self._rows if row.peer is OURS and not row.reason]
        rows = [row for row in rows if row.subject == rows[0].subject][:_MOST_LINES]
        found = {}
        with self._start(rows[0], timeline=True) as subject:
            for row in rows:
                call = replace(self._call, plan=row.plan)
                subject.picture(call)  # warms up
                found[f"{row.name}\n{row.engine}"] = subject.picture(call)["segments"]
        return found

    def _tell(self, row: Row, round_: int, seconds: float | None) -> None:
        if seconds is None:
            return
        self._made += 1
        spent = time.monotonic() - self._started
        left = spent / self._made * max(0, self._pictures - self._made)
        which = "warm-up" if round_ < 0 else f"round {round_ + 1}"
        name = f"{row.name}, {row.engine}" if row.engine else row.name
        self._console.print(f"[about {left / 60:.0f} min left] {name}, {which}: {seconds:.2f} s", highlight=False, markup=False)


def _known(row: Row, settings: Settings, bundles: dict[str, Bundle]) -> Figures:
    """Figures that need no measuring: the plan's share of the original's MACs, sizes of files, and what building took."""
    if row.peer is not OURS:
        return {}
    bundle = bundles[row.variant]
    manifest = bundle.manifest
    return {
        "macs_ratio": round(_macs(row, settings, bundles), 4),
        "engine_mb": round(sum(file.bytes for file in _engine_files(bundle, row.engine)) / 1e6, 1),
        "build_seconds": round(sum(segment.seconds or 0 for segment in manifest.segments), 1),
        "segments": len(manifest.unet_segments),
    }


def _engine_files(bundle: Bundle, engine: str) -> list[File]:
    """What an engine reads of a bundle: what was compiled for it; of engines that run ONNX, the weights beside the graphs too."""
    files: dict[str, File] = {}
    for segment in bundle.manifest.segments:
        made = segment.engines.get(engine)
        copies = made.files if made else ()
        graphs = [file for file in segment.onnx if not (copies and file.path.endswith(".onnx"))]  # a copy stands for the graph
        files |= {file.path: file for file in (*copies, *(graphs if engine in ON_ONNX else ()))}
    return list(files.values())


def _macs(row: Row, settings: Settings, bundles: dict[str, Bundle]) -> float:
    """MACs of the UNet under a plan, as a share of the original's run in full at every step."""
    bundle, plan = bundles[row.variant], find_plan(row.plan)
    timesteps = make_scheduler("dpm++", bundle.folder / "scheduler", settings.steps).timesteps.tolist()
    manifests = {variant: other.manifest for variant, other in bundles.items()}
    names = [part.unet for part in plan.unets] or [row.variant]
    schedule = Schedule(plan, {name: manifests[name] for name in names}, timesteps)
    manifest = manifests["original"]
    height, width = (side // manifest.vae_scale for side in settings.size or manifest.sizes[0])
    sizes = {"height": height, "width": width}
    last = manifests[names[-1]]
    return relative_macs(schedule, sizes=sizes) * full_macs(last, sizes) / full_macs(manifest, sizes)


def _report(figures: list[Figures], name: str, out: Path, settings: Settings, console: Console) -> bool:
    console.print(terminal_table(figures, console.width))
    for one in figures:
        if "reason" in one:
            console.print(f"{one['name']}: {one['reason']}", highlight=False, markup=False, soft_wrap=True)
    paths = write_all(out, name, asdict(settings), figures, card_state() if settings.device == "cuda" else {})
    try:
        plot_all(figures, out / f"{name}.png", name)
        paths.append(out / f"{name}.png")
    except UserError as error:
        console.print(f"no plot: {error}", highlight=False, soft_wrap=True)
    console.print(f"written: {', '.join(path.name for path in paths)} in {out}", highlight=False, soft_wrap=True)
    wrong = [one for one in figures if "fault" in one]
    for one in wrong:
        console.print(
            f"{one['name']}, {one['engine']}: {one['fault']}", highlight=False, markup=False, style="red", soft_wrap=True
        )
    return not wrong
