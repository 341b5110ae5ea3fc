"""A stage's engines on its source: one bundle for each precision, and what is measured of every engine on it."""

import argparse
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from hashlib import sha256
from pathlib import Path
from typing import Any
from unittest.mock import patch

import torch
from rich.console import Console
from torch import Tensor

from benchmarks.gpu.card import LAYOUTS, base_of, engine_named
from benchmarks.gpu.found import Fit, Found, Memory
from benchmarks.gpu.plan_runs import Settings, measure_plan, measure_text_and_vae
from benchmarks.gpu.stages import Stage
from benchmarks.gpu.start import start_process
from benchmarks.old_precision import OLD_WIDE, write_wide
from engines import Bundle, BundleError, Engine, EngineError
from engines.support.caches import card_name
from exporter import BuildOptions, build, job
from exporter.options import PRECISIONS
from exporter.verification.command import FP16_STEPS
from exporter.verification.verify import Reference, compare_latents, verify
from runtime import Pipeline
from runtime.execution.swapping import free_bytes

__all__ = ["EngineRuns", "KeptLatents"]


@dataclass(frozen=True)
class KeptLatents:
    """The torch engine's latents of a source's weights, by plan and precision: computed once, and kept with the bundles.

    ``digest`` is of the weights: those of a source that was trained again are others.
    """

    options: argparse.Namespace
    device: torch.device
    digest: str

    def _path(self, plan: str, precision: str) -> Path:
        options = self.options
        made_by = precision, card_name(self.device), torch.__version__
        asked = self.digest, options.variant, options.size, options.steps, plan, *made_by
        return Path(options.work) / f"reference-{sha256(repr(asked).encode()).hexdigest()[:16]}.pt"

    def find(self, plan: str) -> tuple[str, Tensor] | None:
        """The most precise that there are, and what made them; None where there are none."""
        for precision in PRECISIONS:
            path = self._path(plan, precision)
            if path.exists():
                return f"torch {precision}", torch.load(path)
        return None

    def keep(self, plan: str, precision: str, latents: Tensor) -> None:
        """Keep them, unless there are some."""
        path = self._path(plan, precision)
        if not path.exists():
            path.parent.mkdir(parents=True, exist_ok=True)
            torch.save(latents.cpu(), path)


@dataclass
class EngineRuns:
    """What a stage does with engines.

    Args:
        options: of the check.
        stage: which.
        engines: those that can be had, in their order.
        device: they run on.
        console: what is worth saying.
        kept: the reference's latents.
        found: what is found goes there.
        save: writes it.
        measured: the source, engine, precision and way of building of all plans that were measured in this run.
    """

    options: argparse.Namespace
    stage: Stage
    engines: Sequence[str]
    device: torch.device
    console: Console
    kept: KeptLatents
    found: Found
    save: Callable[[], object]
    measured: set[tuple[str, str, str, bool]]
    model: Reference | None = None

    def parts(self) -> Iterator[tuple[str, Callable[[], None]]]:
        """The parts of the stage, in order: the name of each part, and its work."""
        for precision in self.stage.precisions(self.options):
            layouts = [name for name in LAYOUTS if base_of(name) in self.engines]
            names = [name for name in (*self.engines, *layouts) if name in self.stage.engines]
            wanted = {name: self._wanted(name, precision) for name in self._first(names)}
            yield f"build {precision}", partial(self._build, list(dict.fromkeys(map(base_of, wanted))), precision)
            for name, parts in wanted.items():
                if parts:
                    yield f"{name} {precision}", partial(self._check, name, precision, parts)
            if "start" in self.stage.parts:
                for name in names:
                    yield f"start {name} {precision}", partial(self._start, name, precision)

    def _first(self, names: Sequence[str]) -> Sequence[str]:
        """Engine torch comes first where there is nothing yet to compare with."""
        missing = "plans" in self.stage.parts and not all(self.kept.find(plan) for plan in self.options.plans)
        return ["torch", *names] if missing and "torch" in self.engines and "torch" not in names else names

    def _wanted(self, name: str, precision: str) -> list[str]:
        """What is to be measured of a loaded engine; nothing again that an earlier stage has measured."""
        parts = [part for part in self.stage.parts if part != "start"]
        again = self._key(name, precision) in self.measured
        return [part for part in parts if not (part == "plans" and again)]

    def _key(self, name: str, precision: str) -> tuple[str, str, str, bool]:
        return self.stage.source(self.options), name, precision, self.stage.old_precision

    def _folder(self, precision: str) -> Path:
        source, old = Path(self.stage.source(self.options)).name, "-old" * self.stage.old_precision
        return Path(self.options.work) / f"{source}-{self.options.variant}-{precision}{old}".replace(":", "-")

    def _bundle(self, engines: Sequence[str], precision: str) -> Bundle:
        options = self.options
        wanted = BuildOptions(
            variant=options.variant,
            source=self.stage.source(options),
            engines=tuple(engines),
            granularity=options.granularity,
            plans=tuple(options.plans),
            precision=precision,  # type: ignore[arg-type]
            sizes=(options.size,) if options.size else (),
            max_images=1,
            targets=tuple(options.targets) if "tensorrt-rtx" in engines else (),
            out=self._folder(precision),
            force=True,
            jobs=options.jobs,
        )
        if not self.stage.old_precision:
            return build(wanted)[0]
        with _old_precision():
            return build(replace(wanted, jobs=1))[0]  # other processes would build as builds do now

    def _build(self, engines: Sequence[str], precision: str) -> None:
        """One bundle for all engines, with those that it has already; those that cannot be built for are left out of it."""
        kept: list[str] = []
        started = time.monotonic()
        here = _engines_of(self._folder(precision))
        engines = [name for name in self.engines if name in engines or name in here]
        try:
            self._bundle(engines, precision)
            kept = list(engines)
        except EngineError as error:
            self.console.print(f"not for all engines at once: {error.line}", highlight=False, markup=False, soft_wrap=True)
            for name in engines:  # each adds what it needs to what is there
                try:
                    self._bundle([*kept, name], precision)
                    kept.append(name)
                except EngineError as error:
                    self.found.skipped[f"{name} {precision}"] = error.line
        self.found.build_seconds[precision] = round(time.monotonic() - started, 1)

    def _open(self, name: str, precision: str) -> Bundle | None:
        """The bundle, unless it could not be built, or not for this engine, which was noted then."""
        if f"build {precision}" in self.found.ended:
            return None
        bundle = Bundle.open(self._folder(precision))
        base = base_of(name)
        return bundle if base in bundle.manifest.segments[0].engines or base == "onnxruntime" else None

    def _check(self, name: str, precision: str, parts: Sequence[str]) -> None:
        """What is measured of an engine at one precision in this process."""
        free = free_bytes(self.device)
        bundle = self._open(name, precision)
        if bundle is None:
            return
        with _own_benchmark():
            self._check_bundle(bundle, name, precision, parts, free)

    def _check_bundle(self, bundle: Bundle, name: str, precision: str, parts: Sequence[str], free: int | None) -> None:
        pipeline = Pipeline(bundle, engine_named(name, self.device))
        scratch = pipeline.engine.scratch_bytes()
        if "segments" in parts:
            self._compare(bundle, pipeline.engine, f"{name} {precision}")
        if "plans" in parts:
            self._run_plans(pipeline, name, precision, free)
        left = free_bytes(self.device)
        weights = pipeline.swapper.bytes_of(bundle.manifest.variant)
        taken = None if free is None or left is None else free - left
        self.found.memory[f"{name} {precision}"] = Memory(weights, scratch, taken)

    def _compare(self, bundle: Bundle, engine: Engine, name: str) -> None:
        """How near each segment, and the chain, comes to the diffusers model."""
        self.model = self.model or Reference.load(bundle)
        fits: dict[str, Fit] = {}
        for one in verify(bundle, engine, bundle.manifest.sizes[:1], self.model):
            fit = fits.get(one.segment, Fit(0.0, 1.0))
            fits[one.segment] = Fit(max(one.error, fit.error), min(one.cosine, fit.cosine))
        self.found.segments[name] = fits
        if bundle.manifest.precision == "fp16":
            psnr = compare_latents(bundle, engine, bundle.manifest.sizes[0], FP16_STEPS, self.model)
            self.found.psnr[name] = round(psnr, 1)

    def _run_plans(self, pipeline: Pipeline, name: str, precision: str, free: int | None) -> None:
        settings = Settings(self.options.steps, self.options.rounds)
        for plan in self.options.plans:
            made_by, reference = self.kept.find(plan) or (None, None)
            row, latents = measure_plan(pipeline, plan, reference, settings, free)
            self.found.rows.append(replace(row, engine=name, reference=made_by))
            if name == "torch":
                self.kept.keep(plan, precision, latents)
            self.save()
        self.measured.add(self._key(name, precision))
        self.found.ends[f"{name} {precision}"] = measure_text_and_vae(pipeline, settings)

    def _start(self, name: str, precision: str) -> None:
        """Start another process on a bundle that one has run: on one that none has run here, two."""
        if self._open(name, precision) is None:
            return
        start = partial(start_process, self._folder(precision), name, self.device.type, self.options.steps)
        if self._key(name, precision) not in self.measured:
            start()
        self.found.starts[f"{name} {precision}"] = start()


@contextmanager
def _own_benchmark() -> Iterator[None]:
    """After it, cuDNN times its ways of a convolution as before: an engine's option, which holds for the whole process."""
    cudnn: Any = torch.backends.cudnn
    before = cudnn.benchmark
    try:
        yield
    finally:
        cudnn.benchmark = before


def _engines_of(folder: Path) -> set[str]:
    """The engines that a bundle holds; none where there is no bundle."""
    try:
        return set(Bundle.open(folder).manifest.segments[0].engines)
    except BundleError:
        return set()


@contextmanager
def _old_precision() -> Iterator[None]:
    """Inside it, builds write graphs as they once did, under keys of their own: no other bundle shares their pieces."""
    code = job._own_code()
    with write_wide(OLD_WIDE), patch.object(job, "_own_code", lambda: f"{code} old precision"):
        yield
