"""`python -m benchmarks.plans`: what plans cost and what they do to pictures, for the embedded model.

For each plan: MACs and UNet time relative to `full` on one bundle that is cut for all of them, the share of held-back prompts
that the picture shows (by the rule reader), and PSNR and SSIM to the pictures that `full` makes from the same noise. Times are
taken in turns, plan after plan, and the median of the ratios to `full` counts. Writes a CSV, a JSON beside it and a plot.
"""

import argparse
import csv
import json
import statistics
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from rich.box import SIMPLE
from rich.console import Console
from rich.progress import track
from rich.table import Table

import runtime
from benchmarks.attributes import measure
from benchmarks.machine import machine
from engines.command import run_command
from runtime.cost import relative_macs
from runtime.schedulers import make_scheduler
from tuning.mini.scenes import held_back_prompts

__all__ = ["PLANS", "front", "main"]

PLANS = (
    "full", "block:2", "block:3", "block:4", "block:6", "layer:2", "layer:3", "layer:5", "deepcache:2", "deepcache:3",
    "deepcache:4", "deepcache:6", "unit:2", "unit:3", "unit:5", "encoder:faster", "encoder:3", "quadratic:2", "quadratic:3",
    "adaptive:0.1", "adaptive:0.2", "switch:0.4", "switch:0.7", "switch:0.4+block:3", "switch:0.7+block:3", "switch:0.4+layer:3",
    "switch:0.7+deepcache:3", "block:3+unit:2",
)  # fmt: skip
COLUMNS = ("plan", "macs", "time", "time_low", "time_high", "accuracy", "psnr", "ssim")


def times(pipeline: runtime.Pipeline, plans: Sequence[str], steps: int, guidance: float, rounds: int) -> dict[str, list[float]]:
    """UNet seconds of each plan as a ratio to `full` of the same round; plans take turns."""
    ratios: dict[str, list[float]] = {plan: [] for plan in plans}
    for number in range(rounds + 1):
        seconds = {}
        for plan in ("full", *plans):
            made = pipeline.generate(
                "a red star on a blue background", steps=steps, guidance_scale=guidance, seed=number, plan=plan
            )
            seconds[plan] = sum(record.seconds for record in made.steps)
        if number:  # the first round warms up
            for plan in plans:
                ratios[plan].append(seconds[plan] / seconds["full"])
    return ratios


def likeness(pictures: Sequence[Image.Image], reference: Sequence[Image.Image]) -> tuple[float, float]:
    """Mean PSNR in dB (over those that differ at all) and mean SSIM."""
    from torchmetrics.functional.image import peak_signal_noise_ratio, structural_similarity_index_measure

    one, other = (
        torch.from_numpy(np.stack([np.asarray(p) for p in some])).permute(0, 3, 1, 2) / 255 for some in (pictures, reference)
    )
    if torch.equal(one, other):
        return float("inf"), 1.0
    psnr = peak_signal_noise_ratio(one, other, data_range=1.0, dim=(1, 2, 3), reduction="none")
    ssim = structural_similarity_index_measure(one, other, data_range=1.0)
    assert isinstance(ssim, torch.Tensor)  # a tuple only where the full picture is asked for
    return float(psnr[torch.isfinite(psnr)].mean()), float(ssim)


def front(rows: Sequence[Mapping[str, float | str]]) -> list[str]:
    """Names of the plans that no other plan beats in both time and accuracy."""
    better = sorted(rows, key=lambda row: (float(row["time"]), -float(row["accuracy"])))
    names, best = [], -1.0
    for row in better:
        if float(row["accuracy"]) > best:
            names.append(str(row["plan"]))
            best = float(row["accuracy"])
    return names


def _plot(rows: Sequence[Mapping[str, float | str]], path: Path) -> None:
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot

    best = front(rows)
    figure, axis = pyplot.subplots(figsize=(9, 5.5))
    for row in rows:
        x, y, on_front = 1 / float(row["time"]), 100 * float(row["accuracy"]), row["plan"] in best
        axis.scatter(x, y, s=36 if on_front else 18, color="#c8553d" if on_front else "#8a9ba8", zorder=3 if on_front else 2)
        axis.annotate(str(row["plan"]), (x, y), fontsize=7, xytext=(4, 3), textcoords="offset points")
    line = [(1 / float(row["time"]), 100 * float(row["accuracy"])) for row in rows if row["plan"] in best]
    axis.plot(*zip(*sorted(line), strict=True), color="#c8553d", linewidth=1, zorder=1)
    axis.set_xlabel("UNet speed relative to full")
    axis.set_ylabel("held-back prompts shown, %")
    axis.grid(alpha=0.3)
    axis.set_title("Plans on the embedded model; the Pareto front in red", fontsize=10)
    figure.savefig(path, dpi=120, bbox_inches="tight")
    pyplot.close(figure)


def _row(
    pipeline: runtime.Pipeline, plan: str, options: argparse.Namespace, ratios: list[float]
) -> tuple[dict[str, float | str], list[Image.Image]]:
    timesteps = make_scheduler("dpm++", pipeline.bundle.folder / "scheduler", options.steps).timesteps.tolist()
    schedule = pipeline.schedule(runtime.find_plan(plan), timesteps)
    figures, pictures, _ = measure(
        options.bundle,
        plan,
        held_back_prompts(options.count),
        steps=options.steps,
        guidance=options.guidance,
        engine="onnxruntime",
    )
    row: dict[str, float | str] = {
        "plan": plan,
        "macs": round(relative_macs(schedule, "original"), 3),
        "time": round(statistics.median(ratios), 3),
        "time_low": round(min(ratios), 3),
        "time_high": round(max(ratios), 3),
        "accuracy": round(figures["rules"]["all"], 4),
    }
    return row, pictures


def main(arguments: Sequence[str]) -> None:
    """Measure every plan; raises UserError where the bundle is missing or cannot run one."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.plans", description=__doc__)
    parser.add_argument(
        "--bundle", type=Path, default=Path("bundles/plans/original"), help="cut for all plans, as make plans builds it"
    )
    parser.add_argument("--count", type=int, default=500, help="prompts (default: 500)")
    parser.add_argument("--steps", type=int, default=20, help="of DPM++ (default: 20)")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: 3")
    parser.add_argument("--rounds", type=int, default=7, help="rounds of timing (default: 7)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/plans.csv"))
    parser.add_argument("--plot", type=Path, default=Path("docs/plans.png"))
    options = parser.parse_args(arguments)
    pipeline = runtime.load(options.bundle)
    ratios = times(pipeline, PLANS, options.steps, options.guidance, options.rounds)
    rows, reference = [], None
    for plan in track(PLANS, "plans"):
        row, pictures = _row(pipeline, plan, options, ratios[plan])
        reference = reference or pictures
        psnr, ssim = likeness(pictures, reference)
        rows.append(row | {"psnr": round(psnr, 2), "ssim": round(ssim, 4)})
    _write(rows, options)


def _write(rows: Sequence[Mapping[str, float | str]], options: argparse.Namespace) -> None:
    options.out.parent.mkdir(parents=True, exist_ok=True)
    with options.out.open("w", newline="") as stream:
        writer = csv.DictWriter(stream, COLUMNS)
        writer.writeheader()
        writer.writerows(rows)
    settings = {
        "prompts": options.count,
        "steps": options.steps,
        "scheduler": "dpm++",
        "guidance": options.guidance,
        "dtype": "float32",
    }
    settings |= {"engine": "onnxruntime", "rounds": options.rounds, "front": front(rows)}
    options.out.with_suffix(".json").write_text(json.dumps({"settings": settings} | machine(), indent=2) + "\n")
    options.plot.parent.mkdir(parents=True, exist_ok=True)
    _plot(rows, options.plot)
    table = Table(*COLUMNS, title=f"{options.count} prompts, {options.steps} steps of DPM++", box=SIMPLE)
    for row in rows:
        table.add_row(*(str(row[column]) for column in COLUMNS))
    console = Console()
    console.print(table)
    console.print(f"Pareto front: {', '.join(front(rows))}; wrote {options.out} and {options.plot}", highlight=False)


if __name__ == "__main__":
    run_command(main)
