"""`python -m benchmarks.quality.schedulers`: what plans do to pictures under the usual schedulers, on an embedded model.

For each scheduler: the cost of each plan (MACs as a share of those of `full` with that scheduler), and the mean PSNR in dB to the
pictures of `full` with that scheduler (not rounded to 8 bits) with its interval of 95 %, over prompts that training never saw.
Beside the presets stand fewer steps of the scheduler, and a plan that was found for DPM++ (`--found`). Writes JSON.

Any bundle that can run `deepcache:2` will do, as `python -m exporter build` makes it.
"""

import argparse
import statistics
import warnings
from collections.abc import Sequence
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.arguments import check_counts, embedded_source
from benchmarks.machine import results_file, write_results
from engines import Bundle, UserError, make_engine
from engines.support.cli import run_command
from runtime.images.schedulers import SCHEDULERS, make_scheduler
from runtime.pipeline import Pipeline
from runtime.plans.presets import find_plan
from runtime.report.cost import relative_macs
from tuning.embedded import held_back_prompts
from tuning.planning.evaluation import Pictures
from tuning.planning.report import bootstrap

__all__ = ["PLANS", "main"]

PLANS = ("deepcache:2", "forecast:2", "skip:2", "deepcache:3", "forecast:3", "skip:3")
SHARES = 0.55, 0.4
"""Of the steps, that controls have: what plans with 2 and with 3 cost."""
_AT_A_TIME = 4

Row = dict[str, str | float]


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.quality.schedulers", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/emoji-original"), help="default: %(default)s")
    parser.add_argument(
        "--found",
        type=Path,
        default=Path("benchmarks/results/front/found-0.535.json"),
        help="a found plan (default: %(default)s)",
    )
    parser.add_argument("--schedulers", nargs="+", default=[*SCHEDULERS], help="default: %(default)s")
    parser.add_argument("--count", type=int, default=16, help="prompts (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="default: %(default)s")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/schedulers.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    check_counts(options, "count")
    if options.steps < 4:
        raise UserError(f"--steps {options.steps}: choose 4 or more")
    return options


def main(arguments: Sequence[str]) -> None:
    """Measure every plan; raises UserError where the bundle is missing, cannot run one, or is of no embedded model."""
    options, console = _arguments(arguments), Console(highlight=False, width=120)
    pipeline = Pipeline(Bundle.open(options.bundle), make_engine("onnxruntime"))
    source = embedded_source(pipeline.bundle)
    plans = [find_plan(name) for name in (*PLANS, options.found)]
    for scheduler in options.schedulers:  # refused now rather than after minutes
        for plan in plans:
            pipeline.schedule(plan, _timesteps(pipeline, scheduler, options.steps), guided=options.guidance > 1)
    warnings.filterwarnings("ignore", message="plan .* was found for")  # that is what is measured
    rows: list[Row] = []
    for scheduler in track(options.schedulers, "schedulers", console=console):
        shared = {"steps": options.steps, "scheduler": scheduler, "guidance_scale": options.guidance}
        pictures = Pictures(pipeline, held_back_prompts(source, options.count), _AT_A_TIME, shared, held_back=True)
        timesteps = _timesteps(pipeline, scheduler, options.steps)
        for plan in plans:
            cost = relative_macs(pipeline.schedule(plan, timesteps, guided=options.guidance > 1))
            rows.append(
                {"scheduler": scheduler, "plan": plan.name, "cost": round(cost, 3)} | _figures(pictures.decibels(plan).tolist())
            )
        for steps in (round(share * options.steps) for share in SHARES):
            cost = len(_timesteps(pipeline, scheduler, steps)) / len(timesteps)
            fewer = _figures(pictures.decibels(find_plan("full"), steps).tolist())
            rows.append({"scheduler": scheduler, "plan": f"{steps} steps", "cost": round(cost, 3)} | fewer)
    table = Table("scheduler", "plan", "cost", "dB", "95 %", title=f"{options.count} prompts, {options.steps} steps", box=SIMPLE)
    for row in rows:
        interval = f"{row['psnr_low']:.1f} to {row['psnr_high']:.1f}"
        table.add_row(str(row["scheduler"]), str(row["plan"]), f"{row['cost']:.3f}", f"{row['psnr']:.1f}", interval)
    console.print(table)
    settings = {"source": source, "prompts": options.count, "steps": options.steps, "guidance": options.guidance}
    write_results(options.out, {"settings": settings, "rows": rows})
    console.print(f"wrote {options.out}")


def _timesteps(pipeline: Pipeline, scheduler: str, steps: int) -> list[float]:
    timesteps: list[float] = make_scheduler(scheduler, pipeline.bundle.folder / "scheduler", steps).timesteps.tolist()
    return timesteps


def _figures(decibels: Sequence[float]) -> Row:
    low, high = bootstrap(decibels)
    return {"psnr": round(statistics.fmean(decibels), 2), "psnr_low": round(low, 2), "psnr_high": round(high, 2)}


if __name__ == "__main__":
    run_command(main)
