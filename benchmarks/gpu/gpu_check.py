"""`make gpu-check`: the whole of what runs on an NVIDIA GPU, on the one at hand: right, and how fast.

One bundle for each precision, with every engine that can be had. For each engine and precision: error and cosine of each segment
against the diffusers model, in half precision also the PSNR of the latents after twenty steps; for each plan, the error of the
final latents against the reference (the torch engine, segment by segment, in the first precision that it runs in); whether steps
replayed as CUDA graphs give what they give segment by segment; memory; the time of a picture's UNet steps both ways, of the first
call, and of a whole picture; text encoder and VAE apart; kernels; a second process's start; and diffusers' own pipeline on the
same card. Of memory, the planned bytes of features are compared with those held between segments, which must be within a tenth;
what segments need inside, weights, scratch and what the device has lost in all are only reported. An engine that breaks off,
while it is built, loaded or run, is a fault; the others go on. Writes benchmarks/results/gpu-CARD-SOURCE-VARIANT.json after each
part, so that what is cut off leaves what was done.
"""

import argparse
import gc
import hashlib
import json
import re
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass, field, replace
from functools import partial
from pathlib import Path

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.gpu.card import card_state, check_engines, device_named, engine_named
from benchmarks.gpu.dry_run import show_plan
from benchmarks.gpu.found import Fit, Found, Memory
from benchmarks.gpu.options import parse
from benchmarks.gpu.plan_runs import Settings, measure_plan, measure_text_and_vae
from benchmarks.gpu.tables import show_baselines, show_memory, show_rows, show_text_and_vae
from benchmarks.machine import machine
from engines import Bundle, Engine, EngineError
from engines.errors import UserError
from engines.support.cli import run_command
from engines.support.files import check_writable, write_text
from exporter import BuildOptions, build
from exporter.verification.command import FP16_STEPS
from exporter.verification.verify import Reference, compare_latents, verify
from runtime import Pipeline
from runtime.execution.swapping import free_bytes

__all__ = ["main"]


@dataclass
class _Check:
    """A run of the check: what was asked, what is found, and what engines share."""

    options: argparse.Namespace
    device: torch.device
    console: Console
    found: Found = field(default_factory=Found)
    began: float = field(default_factory=time.monotonic)
    model: Reference | None = None

    def has_time(self, name: str) -> bool:
        """Whether the budget allows another part; noted where it does not."""
        budget = self.options.budget
        if budget is None or time.monotonic() - self.began < 60 * budget:
            return True
        self.found.skipped[name] = f"the budget of {budget:g} minutes is used up"
        return False

    def reference(self, plan: str, own: Tensor | None = None) -> Tensor | None:
        """The latents that a plan's are compared with: the torch engine's first ones, which are kept with the bundles.

        Args:
            plan: the plan.
            own: the torch engine's latents, to be kept where there are none.
        """
        options = self.options
        asked = [options.source, options.variant, options.size, options.steps, plan, options.precision[0]]
        path = Path(options.work) / f"reference-{hashlib.sha256(repr(asked).encode()).hexdigest()[:16]}.pt"
        if own is not None and not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(own.cpu(), path)
        return torch.load(path) if path.exists() else None

    def part(self, name: str, work: Callable[[], None]) -> None:
        """Do a part of the work; whatever becomes of it, what the others do is worth knowing, and what was found is written."""
        if not self.has_time(name):
            return
        started = time.monotonic()
        self.console.print(f"[{started - self.began:.0f} s] {name}", highlight=False, markup=False)
        try:
            work()
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, EngineError):
                raise
            self.console.print_exception()
            self.found.ended[name] = f"{type(error).__name__}: {error}"
        gc.collect()  # what an exception has held, and an engine's memory with it
        self.found.cards[name] = card_state()
        self.found.seconds[name] = round(time.monotonic() - started, 1)
        _write(self)


def _folder(options: argparse.Namespace, precision: str) -> Path:
    name = f"{Path(options.source).name}-{options.variant}-{precision}".replace(":", "-")
    return Path(options.work) / name


def _bundle(options: argparse.Namespace, engines: Sequence[str], precision: str) -> Bundle:
    wanted = BuildOptions(
        variant=options.variant,
        source=options.source,
        engines=tuple(engines),
        granularity=options.granularity,
        plans=tuple(options.plans),
        precision=precision,  # type: ignore[arg-type]
        sizes=(options.size,) if options.size else (),
        max_images=1,
        targets=tuple(options.targets) if "tensorrt-rtx" in engines else (),
        out=_folder(options, precision),
        force=True,
        jobs=options.jobs,
    )
    return build(wanted)[0]


def _build(check: _Check, engines: Sequence[str], precision: str) -> None:
    """One bundle for all engines; those that cannot be built for are left out of it."""
    kept: list[str] = []
    started = time.monotonic()
    try:
        _bundle(check.options, engines, precision)
        kept = list(engines)
    except EngineError as error:
        check.console.print(f"not for all engines at once: {error.line}", highlight=False, markup=False, soft_wrap=True)
        for name in engines:  # each adds what it needs to what is there
            try:
                _bundle(check.options, [*kept, name], precision)
                kept.append(name)
            except EngineError as error:
                check.found.skipped[f"{name} {precision}"] = error.line
    check.found.build_seconds[precision] = round(time.monotonic() - started, 1)


def _check_engine(check: _Check, name: str, precision: str) -> None:
    """Everything about one engine at one precision, unless its bundle could not be built."""
    if f"build {precision}" in check.found.ended:
        return
    free = free_bytes(check.device)
    bundle = Bundle.open(_folder(check.options, precision))
    if name not in bundle.manifest.segments[0].engines and name != "onnxruntime":
        return  # noted when it was built
    pipeline = Pipeline(bundle, engine_named(name, check.device))
    scratch = pipeline.engine.scratch_bytes()
    if "segments" in check.options.only:
        _compare(check, bundle, pipeline.engine, f"{name} {precision}")
    if "plans" in check.options.only:
        _run_plans(check, pipeline, f"{name} {precision}", free)
    left = free_bytes(check.device)
    weights = pipeline.swapper.bytes_of(bundle.manifest.variant)
    taken = None if free is None or left is None else free - left
    check.found.memory[f"{name} {precision}"] = Memory(weights, scratch, taken)


def _compare(check: _Check, bundle: Bundle, engine: Engine, name: str) -> None:
    """How near each segment, and the chain, comes to the diffusers model."""
    check.model = check.model or Reference.load(bundle)
    fits: dict[str, Fit] = {}
    for one in verify(bundle, engine, bundle.manifest.sizes[:1], check.model):
        fit = fits.get(one.segment, Fit(0.0, 1.0))
        fits[one.segment] = Fit(max(one.error, fit.error), min(one.cosine, fit.cosine))
    check.found.segments[name] = fits
    if bundle.manifest.precision == "fp16":
        found = compare_latents(bundle, engine, bundle.manifest.sizes[0], FP16_STEPS, check.model)
        check.found.psnr[name] = round(found, 1)


def _run_plans(check: _Check, pipeline: Pipeline, name: str, free: int | None) -> None:
    settings = Settings(check.options.steps, check.options.rounds)
    for plan in check.options.plans:
        row, latents = measure_plan(pipeline, plan, check.reference(plan), settings, free)
        check.found.rows.append(row)
        if pipeline.engine.name == "torch":
            check.reference(plan, latents)
        _write(check)
    check.found.ends[name] = measure_text_and_vae(pipeline, settings)


def _start_again(check: _Check, name: str, precision: str) -> None:
    """A second process on the bundle that the first one has run."""
    folder = _folder(check.options, precision)
    if f"{name} {precision}" not in check.found.memory:
        return
    command = [sys.executable, "-m", "benchmarks.gpu.start", str(folder), "--engine", name, "--device", check.device.type]
    done = subprocess.run(
        [*command, "--steps", str(check.options.steps)], capture_output=True, text=True, timeout=300, check=False
    )
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    check.found.starts[f"{name} {precision}"] = json.loads(done.stdout.splitlines()[-1])


def _baselines(check: _Check, compiled: bool) -> None:
    options, out = check.options, Path(check.options.work) / "baselines.json"
    command = [sys.executable, "-m", "benchmarks.gpu.baselines", "--source", options.source, "--variant", options.variant]
    command += ["--device", check.device.type, "--steps", str(options.steps), "--rounds", str(options.rounds), "--out", str(out)]
    command += ["--size", "x".join(map(str, options.size))] if options.size else []
    out.parent.mkdir(parents=True, exist_ok=True)
    try:
        subprocess.run([*command, *(["--compiled"] if compiled else [])], timeout=300, check=True)
    finally:
        if out.exists():
            check.found.baselines += json.loads(out.read_text())
            out.unlink()


def _parts(options: argparse.Namespace, engines: Sequence[str]) -> list[tuple[str, Callable[[_Check], None]]]:
    """The parts of the check, in order: the name of each part, and its work."""
    parts: list[tuple[str, Callable[[_Check], None]]] = [
        (f"build {precision}", partial(_build, engines=engines, precision=precision)) for precision in options.precision
    ]
    if not {"plans", "segments"}.isdisjoint(options.only):
        parts += [
            (f"{name} {precision}", partial(_check_engine, name=name, precision=precision))
            for precision in options.precision
            for name in engines
        ]
    last = options.precision[-1]
    if "start" in options.only:
        parts += [(f"start {name} {last}", partial(_start_again, name=name, precision=last)) for name in engines]
    if "baselines" in options.only:
        parts += [("baselines", partial(_baselines, compiled=False)), ("baselines, compiled", partial(_baselines, compiled=True))]
    return parts


def main(arguments: Sequence[str]) -> None:
    """Check what runs on the GPU; raises UserError without one, exits with 1 where something is wrong."""
    options = parse(arguments, __doc__ or "")
    if options.dry_run:
        show_plan(Console(width=80), options, [name for name, _ in _parts(options, options.engines)])
        return
    check_writable(options.out)
    check = _Check(options, device_named(options.device), Console(width=150))
    engines, missing = check_engines(options.engines, check.device)
    check.found.skipped |= missing
    for name, work in _parts(options, engines):
        check.part(name, partial(work, check))
    _report(check)


def _report(check: _Check) -> None:
    found, console = check.found, check.console
    show_rows(console, found.rows)
    show_text_and_vae(console, found.ends)
    show_memory(console, found.memory)
    show_baselines(console, found.baselines)
    for name, reason in found.skipped.items():
        console.print(f"left out: {name}: {reason}", highlight=False, soft_wrap=True, markup=False)
    for name, seconds in found.starts.items():
        console.print(f"second start: {name}: {json.dumps(seconds)}", highlight=False, soft_wrap=True, markup=False)
    console.print(f"wrote {_write(check)}", highlight=False)
    faults = found.faults()
    for fault in faults:
        console.print(f"WRONG: {fault}", highlight=False, markup=False, soft_wrap=True)
    if faults or not (found.rows or found.baselines):
        raise SystemExit(1)


def _write(check: _Check) -> Path:
    """Write what has been found so far; returns the file."""
    options, found = check.options, check.found
    card = torch.cuda.get_device_name() if check.device.type == "cuda" else "cpu"
    settings = {name: getattr(options, name) for name in ("source", "variant", "steps", "rounds", "size", "plans", "granularity")}
    report = {"card": card, "cuda": torch.version.cuda, "driver": card_state(), "settings": settings, "faults": found.faults()}
    name = f"gpu-{card}-{Path(options.source).stem}-{options.variant}".lower()
    path = Path(options.out) / f"{re.sub('[^a-z0-9-]', '-', name)}.json"
    write_text(path, json.dumps(machine() | report | asdict(replace(found)), indent=2) + "\n")
    return path


if __name__ == "__main__":
    run_command(main)
