"""`python -m benchmarks.quality.forecasts`: what forecasts would be worth by other measures than the number of steps.

A plan's forecast goes on along the last two key steps by the number of steps; here beside it by the logarithm of the
signal-to-noise ratio and by the timestep. Its halves of guidance take the difference of the last step that had both, times a
scale; here 1 beside the scale that fits best: the least squares, over pairs of such a step and one after it, of what `full` has
at the two, on prompts of their own. Prints the mean PSNR in dB to the pictures of `full` (not rounded to 8 bits) with its
interval of 95 %, over prompts that training never saw. Writes JSON.

Any bundle that can run `deepcache:2` will do, as `python -m exporter build` makes it.
"""

import argparse
import statistics
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table
from torch import Tensor

from benchmarks.arguments import check_counts, embedded_source
from benchmarks.machine import results_file, write_results
from engines import Bundle, UserError, make_engine
from engines.support.cli import run_command
from runtime.execution.executor import Executor, StepRecord
from runtime.execution.feature_cache import FeatureCache
from runtime.images.schedulers import make_scheduler, read_spaces
from runtime.pipeline import Pipeline
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from runtime.plans.schedule import Schedule, Step
from tuning.embedded import held_back_prompts, training_prompts
from tuning.planning.evaluation import Pictures
from tuning.planning.report import bootstrap

__all__ = ["Differences", "best_scale", "main", "positions"]

MEASURES = ("steps", "log-SNR", "timestep")
FORECASTS = ("forecast:2", "forecast:3", "forecast:4", "skip:2", "skip:3")
HALVES = ("guide:2", "guide:3")
_AT_A_TIME = 4

Row = dict[str, str | float]


def positions(measure: str, timesteps: Sequence[float], alphas_cumprod: Tensor) -> list[float]:
    """Where each step is, by one of ``MEASURES``; ``alphas_cumprod`` are those of the whole noise schedule."""
    if measure == "steps":
        return list(map(float, range(len(timesteps))))
    if measure == "timestep":
        return [-timestep for timestep in timesteps]
    shares = np.interp(timesteps, np.arange(len(alphas_cumprod)), alphas_cumprod.double().numpy())
    return [float(each) for each in np.log(shares / (1 - shares))]


class _Along(FeatureCache):
    """Forecasts by where steps are."""

    def __init__(self, schedule: Schedule, places: Sequence[float]) -> None:
        super().__init__(schedule, overwritten=False)
        self._places = places

    def _forecast(self, step: Step, name: str, entries: Any, tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
        predict = self._schedule.predict(step.unet, name)
        if predict is None or len(entries) == 1:
            return super()._forecast(step, name, entries, tensors)
        newer, older = (self._places[entry.step] for entry in entries)
        ahead = predict.damping * (self._places[step.index] - newer) / (newer - older)
        return torch.lerp(tensors[1], tensors[0], 1 + ahead), True


class Differences(Executor):
    """Runs `full`, and notes by how much noise the two halves of guidance differ at each step."""

    def __init__(self, whole: Executor, scale: Callable[[float], float], noted: list[Tensor]) -> None:
        self._whole, self._scale, self._noted = whole, scale, noted

    def step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        """As ``Executor.step``."""
        prediction, record = self._whole.step(index, sample, timestep, text)
        negative, positive = prediction.chunk(2)
        self._noted.append(self._scale(float(timestep)) * (positive - negative))
        return prediction, record

    def close(self) -> None:
        """As ``Executor.close``."""
        self._whole.close()


class _Tried(Pipeline):
    """A pipeline whose calls forecast by a measure, or note differences."""

    measure = "steps"
    noted: list[Tensor] | None = None

    def executor(self, schedule: Schedule) -> Executor:
        made, folder = super().executor(schedule), self.bundle.folder / "scheduler"
        if self.noted is not None:
            return Differences(made, read_spaces(folder).noise_scale, self.noted)
        if self.measure != "steps":
            alphas = make_scheduler("ddim", folder, schedule.steps).alphas_cumprod
            made._cache = _Along(schedule, positions(self.measure, schedule.timesteps, alphas))
        return made


def best_scale(differences: Sequence[Tensor], whole: Sequence[int]) -> float:
    """The factor by which the difference of the last step with both halves fits those after it, by least squares.

    Args:
        differences: of each step, of some pictures.
        whole: the steps that have both halves.
    """
    pairs = [(max(key for key in whole if key < step), step) for step in range(len(differences)) if step not in whole]
    products = sum(float((differences[key] * differences[step]).sum()) for key, step in pairs)
    return products / sum(float(differences[key].square().sum()) for key, _ in pairs)


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.forecasts", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/emoji-original"), help="default: %(default)s")
    parser.add_argument("--count", type=int, default=16, help="prompts to judge by, and to fit with (default: %(default)s)")
    parser.add_argument("--scheduler", default="dpm++", help="default: %(default)s")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="above 1 (default: %(default)s)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/forecasts.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    check_counts(options, "count")
    if options.guidance <= 1 or options.steps < 4:
        raise UserError(f"--guidance {options.guidance:g} --steps {options.steps}: choose above 1, and 4 or more")
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure every form; raises UserError where the bundle is missing, cannot run a plan, or is of no embedded model."""
    options, console = _arguments(arguments), Console(highlight=False, width=120)
    pipeline = _Tried(Bundle.open(options.bundle), make_engine("onnxruntime"))
    source = embedded_source(pipeline.bundle)
    shared = {"steps": options.steps, "scheduler": options.scheduler, "guidance_scale": options.guidance}
    pictures = Pictures(pipeline, held_back_prompts(source, options.count), _AT_A_TIME, shared, held_back=True)
    rows: list[Row] = []
    for name in track([*FORECASTS], "forecasts", console=console):
        for measure in MEASURES:
            pipeline.measure = measure
            rows.append(_judged(pictures, find_plan(name), measure))
    pipeline.measure, fitting = "steps", training_prompts(source, options.count, "prompts of a search")
    for name in track([*HALVES], "halves of guidance", console=console):
        rows += _halves(pipeline, pictures, Pictures(pipeline, fitting, _AT_A_TIME, shared), find_plan(name))
    table = Table(
        "plan", "by", "dB", "95 %", title=f"{options.count} prompts, {options.steps} steps of {options.scheduler}", box=SIMPLE
    )
    for row in rows:
        table.add_row(str(row["plan"]), str(row["by"]), f"{row['psnr']:.1f}", f"{row['psnr_low']:.1f} to {row['psnr_high']:.1f}")
    console.print(table)
    write_results(options.out, {"settings": {"source": source, "prompts": options.count, **shared}, "rows": rows})
    console.print(f"wrote {options.out}")


def _judged(pictures: Pictures, plan: Plan, by: str) -> Row:
    decibels = pictures.decibels(plan).tolist()
    values = dict(zip(("psnr", "psnr_low", "psnr_high"), (statistics.fmean(decibels), *bootstrap(decibels)), strict=True))
    return {"plan": plan.name, "by": by, **{name: round(value, 2) for name, value in values.items()}}


def _halves(pipeline: _Tried, pictures: Pictures, fitting: Pictures, plan: Plan) -> list[Row]:
    """A plan as it is, and with the scale that fits other pictures best."""
    assert plan.guidance is not None
    pipeline.noted, steps = list[Tensor](), int(fitting.options["steps"])
    fitting.latents(find_plan("full"))
    evaluations = len(pipeline.noted) // len(fitting.requests)
    calls = [pipeline.noted[at : at + evaluations] for at in range(0, len(pipeline.noted), evaluations)]
    pipeline.noted = None
    scale = round(best_scale([torch.cat(step) for step in zip(*calls, strict=True)], sorted(plan.guidance.when.keys(steps))), 4)
    fitted = plan.model_copy(update={"guidance": plan.guidance.model_copy(update={"scale": scale})})
    return [_judged(pictures, each, f"scale {each.guidance.scale:g}") for each in (plan, fitted) if each.guidance]


if __name__ == "__main__":
    run_command(main)
