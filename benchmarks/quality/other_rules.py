"""`python -m benchmarks.quality.other_rules`: the rules that others save steps by, and our plans, on an embedded model.

T-GATE (arXiv 2404.02747) and the change of the first block (ParaAttention, WaveSpeed) are presets. AdaptiveDiffusion (arXiv
2410.09873) and SADA (arXiv 2507.17135) decide by the latents from step to step whether the UNet is evaluated; they are followed
here as their published code does it: `examples/AdaptiveDiffusion/acceleration/sparse_pipeline.py` with its 4 steps in a row at
most, its prediction carried as noise, which is what its models predict; and `sada/solver.py` without its pruning of tokens. One
picture a call, as such rules decide for a whole batch. Prints what each evaluates of `full`, by MACs, and the mean PSNR in dB to
the pictures of `full` (not rounded to 8 bits) with its interval of 95 %, over prompts that training never saw. Writes JSON.

The bundle is built with `python -m exporter build --out bundles/other-rules --plan tgate:0.5 --plan first:0.1 --plan deepcache:2
--plan adaptive:0.1`.
"""

import argparse
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.arguments import embedded_source
from benchmarks.machine import results_file, write_results
from engines import Bundle, UserError, make_engine
from engines.support.cli import run_command
from runtime.execution.device_events import Timer
from runtime.execution.executor import Executor, StepRecord
from runtime.images.prediction_spaces import PredictionSpaces
from runtime.images.schedulers import make_scheduler, read_spaces
from runtime.pipeline import Pipeline
from runtime.plans.presets import find_plan
from runtime.plans.schedule import Schedule
from runtime.report.cost import macs_of, share_of_rows
from runtime.request import Request
from tuning.embedded import held_back_prompts

__all__ = ["Curvature", "Rule", "Sada", "Skipping", "main"]

PRESETS = (
    "tgate:0.2", "tgate:0.4", "tgate:0.6", "tgate:0.8", "first:0.1", "first:0.2", "first:0.3", "first:0.5", "adaptive:0.1",
    "adaptive:0.2", "skip:2", "skip:3", "skip:4", "forecast:2", "forecast:3", "deepcache:2", "deepcache:3",
)  # fmt: skip
CURVATURES = (0.01, 0.05, 0.1, 0.2, 0.4)
"""The first is the code's default, for 50 steps."""
FEWER_STEPS = (8, 11, 14, 16)
_LEAST_ERROR = 1e-10


class Rule:
    """Whether a step evaluates the UNet, and what it predicts where it does not."""

    def skips(self, index: int, x: Tensor) -> bool:
        """Whether the step of that number does without the UNet, given its latents (1, channels, height, width)."""
        raise NotImplementedError

    def saw(self, index: int, x: Tensor, prediction: Tensor) -> None:
        """Told of every step's prediction (rows, channels, height, width), evaluated or not."""
        raise NotImplementedError

    def prediction(self, index: int, x: Tensor) -> Tensor:
        """The prediction (rows, channels, height, width) of a step without the UNet."""
        raise NotImplementedError


@dataclass
class Curvature(Rule):
    """AdaptiveDiffusion: skip where the latents' change is about the mean of the changes beside it; the noise stays.

    From the fifth step on, and at most ``most`` steps in a row.
    """

    above: float
    timesteps: Sequence[float]
    spaces: PredictionSpaces
    most: int = 4
    _last: list[Tensor] = field(default_factory=list)
    _evaluated: list[bool] = field(default_factory=list)
    _noise: Tensor = field(default_factory=lambda: torch.zeros(0))

    def skips(self, index: int, x: Tensor) -> bool:
        """See ``Rule``."""
        self._last = [*self._last[-3:], x]
        if index < 4:
            return False
        before, middle, now = (float((b - a).abs().mean()) for a, b in zip(self._last, self._last[1:], strict=False))
        forced = len(self._evaluated) > 4 and not any(self._evaluated[-self.most :])
        evaluate = forced or abs((now + before) / 2 - middle) > middle * self.above
        self._evaluated.append(evaluate)
        return not evaluate

    def saw(self, index: int, x: Tensor, prediction: Tensor) -> None:
        """See ``Rule``."""
        self._noise = self.spaces.to("eps", prediction, torch.cat([x, x]), self.timesteps[index])

    def prediction(self, index: int, x: Tensor) -> Tensor:
        """See ``Rule``."""
        return self.spaces.back("eps", self._noise, torch.cat([x, x]), self.timesteps[index])


@dataclass
class Sada(Rule):
    """SADA: skip where an extrapolation along the last three slopes errs against their second difference.

    ``alphas`` are of the noise schedule, squared, ``betas`` its steps; ``timesteps`` those that run. For velocities, as the
    embedded model predicts them, under DPM++.
    """

    timesteps: Sequence[int]
    alphas: Tensor
    betas: Tensor
    guidance: float
    most: int = 4
    _x: Tensor = field(default_factory=lambda: torch.zeros(0))
    _slopes: list[Tensor] = field(default_factory=list)
    _velocity: Tensor = field(default_factory=lambda: torch.zeros(0))
    _expected: Tensor = field(default_factory=lambda: torch.zeros(0))
    _in_a_row: int = 0

    def skips(self, index: int, x: Tensor) -> bool:
        """See ``Rule``."""
        if len(self._slopes) < 3:
            return False
        f0, f1, f2 = self._slopes
        self._expected = self._x - (0.625 * f2 + 0.75 * f1 - 0.375 * f0) / len(self.timesteps)
        stable = float(((x - self._expected) * ((f2 - f1) - (f1 - f0))).mean()) <= 0
        # Steps 10 to 46 of 50 may be followed by one that is skipped.
        first, last = (int(share * len(self.timesteps)) for share in (0.2, 0.94))
        if self._in_a_row >= self.most or not stable or not first < index <= last:
            self._in_a_row = 0
            return False
        self._in_a_row += 1
        return True

    def saw(self, index: int, x: Tensor, prediction: Tensor) -> None:
        """See ``Rule``."""
        if not self._in_a_row:
            negative, positive = prediction.chunk(2)
            self._velocity = negative + self.guidance * (positive - negative)
        t = self.timesteps[index]
        alpha, sigma = self._scales(t)
        slope = 0.5 * float(self.betas[t]) * len(self.timesteps) / sigma * alpha * self._velocity
        self._slopes, self._x = [*self._slopes[-2:], slope], x

    def prediction(self, index: int, x: Tensor) -> Tensor:
        """See ``Rule``: the velocity that stands for the picture foreseen from where the latents were expected."""
        alpha, sigma = self._scales(self.timesteps[index])
        picture = alpha * self._expected - sigma * self._velocity
        return ((alpha * x - picture) / sigma).repeat(2, 1, 1, 1)

    def _scales(self, t: int) -> tuple[float, float]:
        share = float(self.alphas[t])
        return math.sqrt(share), math.sqrt(1 - share)


class Skipping(Executor):
    """Runs the steps of `full`, but those that a rule does without. With guidance, whose two halves have the same latents."""

    def __init__(self, whole: Executor, rule: Rule) -> None:
        self._whole, self._rule = whole, rule

    def step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        """As ``Executor.step``."""
        x = sample.chunk(2)[0]
        if self._rule.skips(index, x):
            timer = Timer(sample.device)
            prediction = self._rule.prediction(index, x)
            timer.stop()
            record = StepRecord(index, float(timestep), "original", "skip", (), (), timer=timer)
        else:
            prediction, record = self._whole.step(index, sample, timestep, text)
        self._rule.saw(index, x, prediction)
        return prediction, record

    def close(self) -> None:
        """As ``Executor.close``."""
        self._whole.close()


class _Ruled(Pipeline):
    """A pipeline whose calls follow a rule, one made anew for each, if there is one."""

    rule: Callable[[Schedule], Rule] | None = None

    def executor(self, schedule: Schedule) -> Executor:
        whole = super().executor(schedule)
        return whole if self.rule is None else Skipping(whole, self.rule(schedule))


_Row = tuple[Callable[[Schedule], Rule] | None, str, int]
"""A rule, a plan and a number of steps."""


def _rows(pipeline: Pipeline, options: argparse.Namespace) -> dict[str, _Row]:
    folder = pipeline.bundle.folder / "scheduler"
    scheduler, spaces = make_scheduler("dpm++", folder, options.steps), read_spaces(folder)

    def sada(schedule: Schedule) -> Rule:
        return Sada(list(map(int, schedule.timesteps)), scheduler.alphas_cumprod, scheduler.betas, options.guidance)

    def curvature(above: float) -> _Row:
        return (lambda schedule: Curvature(above, schedule.timesteps, spaces)), "full", options.steps

    rows: dict[str, _Row] = {name: (None, name, options.steps) for name in PRESETS}
    rows |= {f"AdaptiveDiffusion {above:g}": curvature(above) for above in CURVATURES}
    rows["SADA"] = sada, "full", options.steps
    return rows | {f"{steps} steps": (None, "full", steps) for steps in FEWER_STEPS}


def _pictures(pipeline: _Ruled, row: _Row, options: argparse.Namespace) -> tuple[Tensor, float]:
    """Pictures (prompts, 3, height, width) in [0, 1], and the mean MACs of one row of a picture."""
    (rule, plan, steps), pictures, macs = row, list[Tensor](), 0.0
    pipeline.rule = rule
    for number, prompt in enumerate(held_back_prompts(pipeline.manifest.source, options.count)):
        made = pipeline.generate(
            Request(prompt, seed=number, plan=find_plan(plan), steps=steps, guidance_scale=options.guidance, output_type="pt")
        )
        images: Any = made.images
        pictures.append(images)
        macs += sum(share_of_rows(record.half) * macs_of(pipeline.manifest, record.ran) for record in made.steps)
    return torch.cat(pictures), macs / options.count


def _decibels(pictures: Tensor, reference: Tensor) -> dict[str, float]:
    """Mean PSNR and its interval of 95 %."""
    squares = (pictures - reference).square().mean((1, 2, 3)).clamp_min(_LEAST_ERROR)
    values = -10 * squares.log10()
    mean, error = float(values.mean()), 1.96 * float(values.std()) / math.sqrt(len(values))
    return {"psnr": round(mean, 2), "psnr_low": round(mean - error, 2), "psnr_high": round(mean + error, 2)}


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.other_rules", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/other-rules"), help="default: %(default)s")
    parser.add_argument("--count", type=int, default=48, help="prompts, 2 or more (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of DPM++ (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="above 1 (default: %(default)s)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/other_rules.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    if options.count < 2 or options.guidance <= 1 or options.steps < 8:
        given = f"--count {options.count} --guidance {options.guidance:g} --steps {options.steps}"
        raise UserError(f"{given}: choose 2 or more, above 1, and 8 or more")
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure every rule; raises UserError where the bundle is missing, cannot run a plan, or is of no embedded model."""
    options, console = _arguments(arguments), Console(highlight=False, width=120)
    pipeline = _Ruled(Bundle.open(options.bundle), make_engine("onnxruntime"))
    source = embedded_source(pipeline.bundle)
    timesteps = [1000 * (1 - step / options.steps) for step in range(options.steps)]
    for name in PRESETS:  # refused now rather than after minutes
        pipeline.schedule(find_plan(name), timesteps, guided=True)
    reference, whole = _pictures(pipeline, (None, "full", options.steps), options)
    found = {}
    for name, row in track(_rows(pipeline, options).items(), "rules", console=console):
        pictures, macs = _pictures(pipeline, row, options)
        found[name] = {"macs": round(macs / whole, 3)} | _decibels(pictures, reference)
    table = Table("rule", "MACs", "dB", "95 %", title=f"{options.count} prompts, {options.steps} steps of DPM++", box=SIMPLE)
    for name, figures in sorted(found.items(), key=lambda each: each[1]["macs"]):
        interval = f"{figures['psnr_low']:.1f} to {figures['psnr_high']:.1f}"
        table.add_row(name, f"{figures['macs']:.3f}", f"{figures['psnr']:.1f}", interval)
    console.print(table)
    settings = {name: getattr(options, name) for name in ("count", "steps", "guidance")} | {"source": source}
    write_results(options.out, {"settings": settings, "rules": found})
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
