"""`python -m benchmarks.speed.partition`: what cutting a UNet into segments costs against files in one piece (ONNX Runtime, CPU).

A UNet of full size with random weights, in four files or bundles: diffusers' own model whole; the bundle that is partitioned for
``deepcache``, which runs `full` steps and inherit steps; and DeepCache's shallow network, merged by hand from the stem, the last
layer and the head. All are traced alike, with attention fused. They take turns, and the ratios are of the same round. All four
predict the same noise from the same inputs, which is checked before anything is timed. Writes a JSON file and prints a table.
The committed file is that of `OMP_NUM_THREADS=1 python -m benchmarks.speed.partition --rounds 31`.
"""

import argparse
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import Tensor, nn

import runtime
from benchmarks.machine import results_file, write_results
from benchmarks.speed.full_size import Traceable, export, exported, measured_units, random_inputs, spread, take_turns
from engines import Bundle, Segment, UserError, make_engine
from engines.bundle.names import NOISE, SAMPLE, TEXT, TIMESTEP
from engines.support.cli import run_command
from exporter.graph.partition import partition
from exporter.graph.unit_modules import SegmentModule
from runtime.plans.checks import check_runs
from tuning.checkpoints.find_source import random_unet
from tuning.ranking.timing import clock

__all__ = ["GOALS", "Shallow", "Whole", "main", "make_bundles"]

PLAN = "deepcache:1000"
"""Cut as for any deepcache:N; in a call, every step but the first inherits."""
GOALS = {"full / whole": 1.02, "inherit / merged": 1.05}
_TOLERANCE = 1e-3
"""Of the largest value: one evaluation in float32 differs by some 1e-5, a wrong feature by more than 1e-1."""


class Whole(nn.Module):
    """diffusers' UNet as it is: latents, timestep (1,) and text -> prediction."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        self.unet = unet

    def forward(self, *features: Tensor) -> tuple[Tensor]:
        sample, timestep, text = features
        return (self.unet(sample, timestep, encoder_hidden_states=text, return_dict=False)[0],)


class Shallow(nn.Module):
    """The part that DeepCache runs in its other steps: stem, last layer and head; the feature before the last layer is given."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        last = unet.up_blocks[-1]
        self.projection, self.embedding, self.stem = unet.time_proj, unet.time_embedding, unet.conv_in
        self.resnet, self.attention = last.resnets[-1], last.attentions[-1]
        self.norm, self.activation, self.head = unet.conv_norm_out, unet.conv_act, unet.conv_out

    def forward(self, *features: Tensor) -> tuple[Tensor]:
        sample, timestep, text, cached = features
        x = self.resnet(torch.cat([cached, self.stem(sample)], dim=1), self.embedding(self.projection(timestep)))
        x = self.attention(x, encoder_hidden_states=text, return_dict=False)[0]
        return (self.head(self.activation(self.norm(x))),)


def make_bundles(source: str, side: int, folder: Path) -> tuple[Bundle, Bundle]:
    """The bundle partitioned for deepcache, and one of the two files in one piece; only what ``folder`` lacks is traced."""
    folders = folder / "fitted", folder / "pieces"
    if not all((target / "manifest.json").is_file() for target in folders):
        unet = random_unet(source)
        units, features, modules = measured_units(unet, side)
        segments = partition(units, None, [runtime.find_plan(PLAN)])
        fitted: list[Traceable] = [
            (segment, SegmentModule([u for u in units if u.name in segment.units], modules, segment.inputs, segment.outputs))
            for segment in segments
        ]
        cached = segments[-1].inputs[0]
        pieces: list[Traceable] = [
            (Segment(name="whole", units=(), inputs=(SAMPLE, TIMESTEP, TEXT), outputs=(NOISE,)), Whole(unet)),
            (Segment(name="merged", units=(), inputs=(SAMPLE, TIMESTEP, TEXT, cached), outputs=(NOISE,)), Shallow(unet)),
        ]
        for target, parts in zip(folders, (fitted, pieces), strict=True):
            export(target, unet, parts, units, features)
    return exported(folders[0]), exported(folders[1])


class Cases:
    """The four things to time, on the same inputs."""

    def __init__(self, fitted: Bundle, pieces: Bundle, side: int, rows: int, steps: int) -> None:
        engine = make_engine("onnxruntime")
        sizes = {"batch": rows, "height": side, "width": side}
        given = random_inputs((SAMPLE, TIMESTEP, TEXT), fitted.manifest.features, sizes)
        self._network = runtime.LoadedBundle.load(fitted, engine)
        self._given = given
        whole, merged = (engine.load(pieces, pieces.manifest.segment(name)) for name in ("whole", "merged"))
        (cached,) = set(merged.segment.inputs) - set(given)
        inputs = given | {cached: self._network.compute(cached, given)}
        self.cases: dict[str, Callable[[], Tensor]] = {
            "whole": lambda: whole.run(given)[NOISE],
            "full": self._steps("full", steps),
            "merged": lambda: merged.run(inputs)[NOISE],
            "inherit": self._steps(PLAN, steps),
        }

    def _steps(self, plan: str, steps: int) -> Callable[[], Tensor]:
        """One step of a plan after another; the first, which computes everything, is taken here."""
        schedule = runtime.Schedule(runtime.find_plan(plan), {"one": self._network.manifest}, [500.0] * steps)
        check_runs(schedule)
        executor, numbers = runtime.Executor({"one": self._network}, schedule), iter(range(steps))

        def step() -> Tensor:
            return executor.step(next(numbers), self._given[SAMPLE], self._given[TIMESTEP], self._given[TEXT])[0]

        step()
        return step

    def check(self) -> float:
        """The largest difference to the whole model's prediction, relative to its largest value; runs each case once."""
        made = {name: case() for name, case in self.cases.items()}
        worst = max(float((made[name] - made["whole"]).abs().max() / made["whole"].abs().max()) for name in made)
        if not worst < _TOLERANCE:
            raise UserError(
                f"predictions differ by {worst:.1e} of the largest, expected less than {_TOLERANCE:.0e}: remove --work"
            )
        return worst


def _figures(seconds: dict[str, list[float]]) -> dict[str, Any]:
    ratios = {
        name: [a / b for a, b in zip(*(seconds[part] for part in name.split(" / ")), strict=True)]
        for name in (*GOALS, "inherit / full")
    }
    return {
        "seconds": {name: spread(values) for name, values in seconds.items()},
        "ratios": {name: spread(values) for name, values in ratios.items()},
        "goals": GOALS,
    }


def main(arguments: Sequence[str]) -> None:
    """Trace what is not there yet, check, time, print and write; raises UserError where predictions differ."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.partition", description=__doc__)
    parser.add_argument("--source", default="random:sd15", help="a UNet's configuration (default: %(default)s)")
    parser.add_argument("--side", type=int, default=32, help="side of the latents (default: %(default)s)")
    parser.add_argument("--rows", type=int, default=2, help="rows of a UNet call: 2 is a picture with guidance (default: 2)")
    parser.add_argument("--rounds", type=int, default=15, help="default: %(default)s")
    parser.add_argument(
        "--work", type=Path, default=Path("runs/partition"),
        help="where traced files are kept, 7 GB for random:sd15; to be removed when the exporter has changed",
    )  # fmt: skip
    parser.add_argument("--out", type=results_file, default="benchmarks/results/partition.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    folder = options.work / Path(options.source.removeprefix("random:")).stem
    fitted, pieces = make_bundles(options.source, options.side, folder)
    cases = Cases(fitted, pieces, options.side, options.rows, options.rounds + 3)
    error = cases.check()
    figures = _figures(take_turns(cases.cases, options.rounds))
    settings = {
        "source": options.source, "latents": [options.side, options.side], "rows": options.rows, "rounds": options.rounds,
        "segments": [segment.name for segment in fitted.manifest.segments], "plan": "deepcache:N", "engine": "onnxruntime",
        "threads": torch.get_num_threads(), "clock": clock().__name__, "dtype": "float32",
        "largest difference of predictions": float(f"{error:.1e}"),
    }  # fmt: skip
    write_results(options.out, {"settings": settings} | figures)
    _show(figures, options)


def _show(figures: dict[str, Any], options: argparse.Namespace) -> None:
    table = Table("", "median", "low", "high", "goal", title=f"{options.source}, latents {options.side}x{options.side}")
    for group, unit in (("seconds", " s"), ("ratios", "")):
        for name, values in figures[group].items():
            goal = f"{GOALS[name]:.2f}" if name in GOALS else ""
            table.add_row(name, *(f"{values[key]:.3f}{unit}" for key in ("median", "low", "high")), goal)
    console = Console(highlight=False)
    console.print(table)
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
