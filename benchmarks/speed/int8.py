"""`python -m benchmarks.speed.int8`: what int8 in ONNX Runtime does to pictures of the embedded model, and how fast it is.

The UNet's segments are quantised as `benchmarks.speed.int8_bundles` says, calibrated on what they are given while pictures of
prompts that training knew are drawn by --plans: all of them, all but those at the ends, and one kind of operator alone. The fp32
bundle runs in the same engine, and its graphs are those that are quantised.

`quality`: pictures of pairs that were held back from training, from the same noise. PSNR in dB to the fp32 bundle's pictures, and
the shares in which the reader finds concept and style, with intervals of 95 %. Below, fp32 by the last plan, and int8 by it.
`time`: a step of the UNet, and a segment of convolutions and one of attention at Stable Diffusion 1.5's shapes (random weights),
on one thread, int8 over fp32 in the same round. Writes JSON; a part that is not measured stays there as it was.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine, results_file
from benchmarks.quality.judge import MEASURES, Judge, difference, draw_prompts, shares, tensor_of
from benchmarks.quality.plans import likeness
from benchmarks.speed.int8_bundles import CONVOLUTIONS, PRODUCTS, VARIANTS, counted, graph_of, quantised, record
from benchmarks.speed.int8_times import FP32, segment_times, step_times
from engines import Bundle, UserError
from engines.support.cli import run_command
from engines.support.extras import need
from engines.support.files import write_text
from tuning.embedded import training_prompts
from tuning.emoji.pairs import some_pairs

__all__ = ["PARTS", "SEGMENTS", "SHOWN", "main", "table"]

PARTS = ("quality", "time")
SEGMENTS = ("up.3.layer.0.resnet", "up.3.layer.0.attention")
"""A ResNet and a transformer where Stable Diffusion 1.5's features are largest, which is where its time goes."""
SHOWN = ("concept_top1", "style")
"""Of the reader's measures; the others are in the JSON file alone."""
_SOURCE, _SIDE = "random:sd15", 32


def _operators(bundle: Bundle) -> dict[str, int]:
    """How many convolutions and products of the UNet compute in int8, and how many in fp32."""
    found = [counted(graph_of(bundle, segment), CONVOLUTIONS + PRODUCTS) for segment in bundle.manifest.unet_segments]
    return {"int8": sum(a for a, _ in found), "fp32": sum(b for _, b in found)}


def _quality(bundles: Mapping[str, Bundle], options: argparse.Namespace) -> dict[str, Any]:
    """The worth of each bundle's pictures, by `full` beside those of fp32; then of fp32 and int8 by the last plan."""
    judge, plan = Judge.of(options.model), options.plans[-1]
    pairs = some_pairs(judge.held, options.pictures, "judged")
    first, whole = f"{FP32}, {plan}", VARIANTS[0].name
    cases = {name: (bundle, "full", FP32) for name, bundle in bundles.items()}
    cases |= {first: (bundles[FP32], plan, FP32), f"{whole}, {plan}": (bundles[whole], plan, first)}
    rows, pictures, answers = dict[str, Any](), {}, {}
    for name, (bundle, by, beside) in cases.items():
        Console(stderr=True).print(f"{name}: {len(pairs)} pictures", highlight=False)
        prompts = [pair.prompt for pair in pairs]
        pictures[name] = draw_prompts(bundle.folder, prompts, plan=by, steps=options.steps, guidance=options.guidance)
        answers[name] = judge.answers(tensor_of(pictures[name]), pairs)
        over = {key: difference(answers[name][key], answers[beside][key]) for key in MEASURES}
        near = likeness(pictures[name], pictures[beside])
        rows[name] = {"operators": _operators(bundle), "beside": beside, "likeness": near, "over": over} | shares(answers[name])
    settings = {"model": str(options.model), "pictures": len(pairs), "steps": options.steps, "scheduler": "dpm++"}
    return {"settings": settings | _calibration(options), "rows": rows}


def _time(bundles: Mapping[str, Bundle], options: argparse.Namespace) -> dict[str, Any]:
    """Ratios to fp32 of a step of each bundle's UNet, and of single segments."""
    console = Console(stderr=True, highlight=False)
    console.print(f"steps: {options.rounds} rounds")
    steps = step_times(bundles, options.rounds)
    console.print(f"segments of {_SOURCE}")
    with tempfile.TemporaryDirectory() as folder:
        segments = segment_times(_SOURCE, SEGMENTS, _SIDE, options.rounds, Path(folder))
    settings = {"rounds": options.rounds, "threads": 1, "rows": 2, "source": _SOURCE, "latents": [_SIDE, _SIDE]}
    return {"settings": settings | _calibration(options), "step": steps, "segments": segments}


def _calibration(options: argparse.Namespace) -> dict[str, Any]:
    """The settings that both parts share."""
    names = ("calibration", "calibration_steps", "plans", "guidance")
    return {name: getattr(options, name) for name in names} | {"engine": "onnxruntime"}


def _arguments(arguments: Sequence[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.int8", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/emoji-original"), help="fp32 bundle (default: %(default)s)")
    parser.add_argument("--model", type=Path, default=Path("models/emoji"), help="the reader's model (default: %(default)s)")
    parser.add_argument("--pictures", type=int, default=150, help="pictures of pairs held back, at most (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=20, help="steps of DPM++ (default: %(default)s)")
    parser.add_argument("--guidance", type=float, default=3.0, help="default: %(default)s")
    parser.add_argument("--calibration", type=int, default=8, help="prompts to calibrate with (default: %(default)s)")
    parser.add_argument("--calibration-steps", type=int, default=20, help="steps of these pictures (default: %(default)s)")
    parser.add_argument(
        "--plans", nargs="+", default=["full", "deepcache:3"], help="plans to calibrate with (default: full deepcache:3)"
    )
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing (default: %(default)s)")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (default: %(default)s); others stay")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/int8.json", help="default: %(default)s")
    options = parser.parse_args(arguments)
    options.parts = options.parts.split(",")
    if unknown := sorted({*options.parts} - {*PARTS}):
        raise UserError(f"--parts: got {unknown[0]!r:.40}; choose from {', '.join(PARTS)}")
    for name in ("pictures", "steps", "calibration", "calibration_steps", "rounds"):
        if getattr(options, name) < 1:
            raise UserError(f"--{name.replace('_', '-')} {getattr(options, name)}: give 1 or more")
    return options


def _kept(path: Path) -> dict[str, Any]:
    """The parts that were measured before. Raises UserError where a file is there that holds something else."""
    try:
        before = json.loads(path.read_text("utf-8")) if path.is_file() else {}
        return {part: before[part] for part in PARTS if part in before}
    except (ValueError, TypeError) as error:
        raise UserError(f"{path} holds no figures ({error}); remove it, or choose another --out") from error


def table(found: Mapping[str, Any]) -> Table:
    """A row for each variant, with what was measured of it, then one for each segment that was timed."""
    quality, time = found.get("quality", {}).get("rows", {}), found.get("time", {})
    titles = [name.replace("_", " ") for name in SHOWN]
    result = Table("", "int8 operators", *titles, "beside", "PSNR", "concept over that", "time", box=SIMPLE)
    for name in dict.fromkeys([*quality, *time.get("step", {})]):
        result.add_row(name, *_quality_cells(quality.get(name)), _ratio(time.get("step", {}).get(name)))
    for name, kinds in time.get("segments", {}).items():
        result.add_row(f"{name}, int8", *_quality_cells(None), _ratio(kinds["int8"]))
    return result


def _quality_cells(row: Mapping[str, Any] | None) -> list[str]:
    if row is None:
        return ["-"] * (len(SHOWN) + 4)
    near, over, count = row["likeness"], row["over"][SHOWN[0]], row["operators"]
    found = [_percent(row[name]) for name in SHOWN]
    psnr = "same" if near["psnr"] is None else f"{near['psnr']:.1f} ({near['psnr_low']:.1f} to {near['psnr_high']:.1f})"
    gained = f"{100 * over['mean']:+.1f} ({100 * over['low']:+.1f} to {100 * over['high']:+.1f})"
    return [f"{count['int8']} of {count['int8'] + count['fp32']}", *found, row["beside"], psnr, gained]


def _percent(figures: Mapping[str, float]) -> str:
    share, low, high = (100 * figures[name] for name in ("share", "low", "high"))
    return f"{share:.1f} % ({low:.0f} to {high:.0f})"


def _ratio(figures: Mapping[str, float] | None) -> str:
    return "-" if figures is None else f"{figures['ratio']:.2f} ({figures['low']:.2f} to {figures['high']:.2f})"


def _bundle(options: argparse.Namespace) -> Bundle:
    """The bundle to quantise. Raises UserError for one of another precision, or of a model without prompts of its own."""
    bundle = Bundle.open(options.bundle)
    if bundle.manifest.precision != "fp32":
        raise UserError(
            f"--bundle {options.bundle} is {bundle.manifest.precision}: give one that was built with --precision fp32"
        )
    if bundle.manifest.source != "emoji":
        raise UserError(
            f"--bundle {options.bundle} is of {bundle.manifest.source}, which the reader cannot judge: give one of emoji"
        )
    return bundle


def main(arguments: Sequence[str]) -> None:
    """Quantise, measure the parts that are asked for, print and write; raises UserError for a bundle that does not fit."""
    options = _arguments(arguments)
    found, bundle = _kept(options.out), _bundle(options)
    if "quality" in options.parts:
        need("torchmetrics", "PSNR of the pictures", "train")
    prompts = training_prompts(bundle.manifest.source, options.calibration, "int8")
    feeds = record(bundle, prompts, options.plans, steps=options.calibration_steps, guidance=options.guidance)
    with tempfile.TemporaryDirectory() as folder:
        made = {variant.name: quantised(bundle, Path(folder) / variant.name, feeds, variant) for variant in VARIANTS}
        for part in options.parts:
            measure = _quality if part == "quality" else _time
            found[part] = measure({FP32: bundle} | made, options) | machine()
            write_text(options.out, json.dumps({name: found[name] for name in PARTS if name in found}, indent=1) + "\n")
    console = Console(width=180, highlight=False)
    console.print(table(found))
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
