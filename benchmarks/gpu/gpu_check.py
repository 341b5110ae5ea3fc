"""`make gpu-check`: the whole of what runs on an NVIDIA GPU, on the one at hand: right, and how fast.

In stages, in the order of a first session on a card; one that does not fit into what is left of ``--budget`` is left out. The
tests marked ``gpu``. A small model on every engine that can be had, each with its segments against the diffusers model, in half
precision also the PSNR of the latents after twenty steps, and plans with and without CUDA graphs. Stable Diffusion's full size
for speed, on TensorRT-RTX as segments are built now and with the casts that they once had, and on TensorRT; and diffusers' own
pipeline on the same card. Drills: what is provoked to go wrong.

For each plan, the error of the final latents against the reference (engine torch segment by segment, in the most precise of its
precisions); whether steps replayed as CUDA graphs give what they give segment by segment; memory; the time of a picture's UNet
steps both ways, of the first call, and of a whole picture; text encoder and VAE apart; kernels; a second process' start. Of
memory, the planned bytes of features are compared with those held between segments, which must be within a tenth; what segments
need inside, weights, scratch and what the device has lost in all are only reported. An engine that breaks off, while it is built,
loaded or run, is a fault; the others go on.

Writes benchmarks/results/gpu-CARD-VARIANT.json (with a --source, gpu-CARD-SOURCE-VARIANT.json) after each part, so that what is
cut off leaves what was done. What is in the file of other stages and parts stays there, if it is of the same driver, versions,
weights and settings.
"""

import argparse
import gc
import json
import re
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from benchmarks.gpu.baselines import measure_apart
from benchmarks.gpu.card import base_of, card_state, check_engines, device_named
from benchmarks.gpu.engine_runs import EngineRuns, KeptLatents
from benchmarks.gpu.found import Found
from benchmarks.gpu.gpu_tests import DRILLS, REST, run_tests
from benchmarks.gpu.options import parse
from benchmarks.gpu.stages import STAGES, Stage, show_stages, too_long
from benchmarks.gpu.tables import show_found
from benchmarks.machine import machine, versions_of
from engines import EngineError
from engines.bundle.digests import known_sha256
from engines.errors import UserError
from engines.support.cli import run_command
from engines.support.files import check_writable, write_text
from exporter.graph.checkpoint import open_source

__all__ = ["main"]

_PACKAGES = ("onnxruntime-gpu", "DeepCache")
_SETTINGS = ("variant", "steps", "rounds", "size", "plans", "granularity")
_LONGEST = 600.0
"""Seconds that tests may take where the budget has no end."""


@dataclass
class _Check:
    """A run of the check: what was asked, what is found by stage, and what stages share."""

    options: argparse.Namespace
    device: torch.device
    console: Console
    digests: dict[str, str]
    """Of the weights, by source."""
    engines: list[str] = field(default_factory=list)
    """Those that can be had."""
    found: dict[str, Found] = field(default_factory=dict)
    skipped: dict[str, str] = field(default_factory=dict)
    """Why an engine could not be had, or a stage was left out."""
    measured: set[tuple[str, str, str, bool]] = field(default_factory=set)
    began: float = field(default_factory=time.monotonic)

    def minutes(self) -> float:
        """Since it began."""
        return (time.monotonic() - self.began) / 60

    def run(self, stage: Stage) -> None:
        """Do the parts of a stage one after another, unless there is a reason not to."""
        reason = self._unfit(stage) or too_long(stage, self.options, self.minutes())
        if reason:
            self.skipped[stage.name] = reason
            self._say(f"left out: {stage.name}: {reason}")
            return
        found = self.found[stage.name] = Found()
        self._say(f"{stage.name}: {stage.words(self.options)}; about {stage.takes(self.options):g} minutes")
        for name, work in self._parts(stage, found):
            self._part(found, name, work)
        show_found(self.console, f"{stage.name} {stage.source(self.options)}", found)

    def _unfit(self, stage: Stage) -> str:
        """Why none of a stage's engines can run; nothing where one can."""
        wanted = list(dict.fromkeys(map(base_of, stage.engines)))
        if not wanted or set(wanted) & set(self.engines):
            return ""
        return "; ".join(f"{name}: {self.skipped.get(name, 'not among --engines')}" for name in wanted)

    def _parts(self, stage: Stage, found: Found) -> Iterator[tuple[str, Callable[[], None]]]:
        source, options = stage.source(self.options), self.options
        if stage.engines:
            kept, save = KeptLatents(options, self.device, self.digests[source]), partial(_write, self)
            yield from EngineRuns(
                options, stage, self.engines, self.device, self.console, kept, found, save, self.measured
            ).parts()
        elif stage.of:
            for compiled in (False, True):
                name = "baselines, compiled" if compiled else "baselines"
                yield name, partial(measure_apart, options, source, compiled, found.baselines)
        else:
            marks = DRILLS if stage.name == "drills" else REST
            yield f"tests marked {marks}", partial(self._run_tests, found, marks)

    def _run_tests(self, found: Found, marks: str) -> None:
        """Within the budget: what hangs does not take the other stages' time."""
        left = 60 * (self.options.budget - self.minutes())
        found.tests[marks] = run_tests(marks, min(_LONGEST, left))

    def _part(self, found: Found, name: str, work: Callable[[], None]) -> None:
        """Do a part of the work; whatever becomes of it, what the others do is worth knowing, and what was found is written."""
        if self.minutes() >= self.options.budget:
            found.skipped[name] = f"the budget of {self.options.budget:g} minutes is used up"
            return
        started = time.monotonic()
        self._say(f"[{started - self.began:.0f} s] {name}")
        try:
            work()
        except Exception as error:
            if isinstance(error, UserError) and not isinstance(error, EngineError):
                raise
            self.console.print_exception()
            found.ended[name] = f"{type(error).__name__}: {error}"
        gc.collect()  # what an exception has held, and an engine's memory with it
        found.cards[name] = card_state()
        found.seconds[name] = round(time.monotonic() - started, 1)
        _write(self)

    def _say(self, text: str) -> None:
        self.console.print(text, highlight=False, markup=False, soft_wrap=True)


def main(arguments: Sequence[str]) -> None:
    """Check what runs on the GPU; raises UserError without one, exits with 1 where something is wrong."""
    options = parse(arguments, __doc__ or "")
    if options.dry_run:
        show_stages(Console(width=80), options, options.stages)
        return
    check_writable(options.out)
    device = device_named(options.device)
    sources = dict.fromkeys(source for stage in STAGES.values() if (source := stage.source(options)))
    digests = {source: open_source(source, options.variant).fingerprint(options.variant, known_sha256) for source in sources}
    check = _Check(options, device, Console(width=150), digests)
    if any(stage.engines for stage in options.stages):
        check.engines, check.skipped = check_engines(options.engines, device, options.targets)
    for stage in options.stages:
        check.run(stage)
    _report(check)


def _report(check: _Check) -> None:
    """Say what was left out and what is wrong; exits with 1 for the latter, or where nothing was measured."""
    for name, reason in check.skipped.items():
        check._say(f"left out: {name}: {reason}")
    for stage, found in check.found.items():
        for name, reason in found.skipped.items():
            check._say(f"left out: {stage}: {name}: {reason}")
    check._say(f"wrote {_write(check)}")
    faults = _faults(check.found)
    for fault in faults:
        check._say(f"WRONG: {fault}")
    if faults or all(found.is_empty for found in check.found.values()):
        raise SystemExit(1)


def _faults(found: dict[str, Found]) -> list[str]:
    return [f"{stage}: {fault}" for stage, one in found.items() for fault in one.faults()]


def _write(check: _Check) -> Path:
    """Write what has been found so far, beside what of the file still holds; returns the file."""
    options = check.options
    card = torch.cuda.get_device_name() if check.device.type == "cuda" else "cpu"
    words = ["gpu", card, *([Path(options.source).stem] if options.source else []), options.variant]
    path = Path(options.out) / f"{re.sub('[^a-z0-9-]', '-', '-'.join(words).lower())}.json"
    report = machine() | {"card": card, "cuda": torch.version.cuda, "driver": card_state()}
    report["versions"] = {**report["versions"], **_versions()}  # type: ignore[dict-item]
    found = {name: one.beside(earlier) for name, one, earlier in _earlier(check, path, report)}
    stages = {name: _made_by(check, STAGES[name]) | asdict(found[name]) for name in STAGES if name in found}
    report |= {"skipped": check.skipped, "faults": _faults(found), "stages": stages}
    write_text(path, json.dumps(report, indent=2) + "\n")
    return path


def _versions() -> dict[str, str]:
    """Of the packages that matter here only."""
    return versions_of(_PACKAGES)


def _made_by(check: _Check, stage: Stage) -> dict[str, Any]:
    """What a stage's findings are of."""
    source = stage.source(check.options)
    settings = {name: getattr(check.options, name) for name in _SETTINGS}
    made_by = {"source": source, "weights": check.digests.get(source, ""), "settings": settings}
    return json.loads(json.dumps(made_by))


def _earlier(check: _Check, path: Path, report: dict[str, Any]) -> Iterator[tuple[str, Found, Found]]:
    """The findings of each stage: of this run, and of an earlier one where they are of the same things."""
    try:
        written = json.loads(path.read_text("utf-8"))
        same = written["versions"] == report["versions"] and _driver(written) == _driver(report)
        stages = written["stages"] if same else {}
    except (OSError, ValueError, KeyError, TypeError):
        stages = {}
    for name, stage in STAGES.items():
        made_by, earlier = _made_by(check, stage), Found()
        try:
            values = stages.get(name, {})
            if values and all(values[key] == value for key, value in made_by.items()):
                earlier = Found.from_json(values)
        except (KeyError, TypeError, AttributeError):
            earlier = Found()  # another version of the check wrote it
        if name in check.found or not earlier.is_empty:
            yield name, check.found.get(name, Found()), earlier


def _driver(report: dict[str, Any]) -> str | None:
    version: str | None = report["driver"].get("driver_version")
    return version


if __name__ == "__main__":
    run_command(main)
