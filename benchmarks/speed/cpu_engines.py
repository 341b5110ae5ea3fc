"""`python -m benchmarks.speed.cpu_engines`: the engines that run a bundle's ONNX files on a CPU, beside each other.

Each takes turns with the first: a step of the whole UNet for one picture with guidance, and the VAE's decoder. With
``--pictures``, a bundle of the embedded model, each then draws held-back prompts, and its pictures are compared with the first
engine's. With one thread (OMP_NUM_THREADS=1) seconds are the process's own. Writes a JSON file and prints a table.
"""

import argparse
import gc
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table
from torch import Tensor

from benchmarks.machine import write_results
from benchmarks.speed.full_size import random_inputs, spread, take_turns
from engines import Bundle, make_engine
from engines.bundle.names import LATENTS, NOISE, SAMPLE, TIMESTEP, TOKENS, VAE_DECODER
from engines.support.cli import parse_size, run_command
from runtime import LoadedBundle
from tuning.ranking.timing import clock

__all__ = ["ENGINES", "main"]

ENGINES = ("onnxruntime", "openvino", "openvino-bf16")
"""The others are compared with the first."""
PLANS = ("full", "deepcache:3")
"""Whose pictures are compared."""


def _speed(folder: Path, size: tuple[int, int], rounds: int) -> dict[str, Any]:
    """Seconds by engine: until it is loaded, of the first step, and of a UNet step and the VAE's decoder with their ratios."""
    bundle = Bundle.open(folder)
    scale = bundle.manifest.vae_scale
    sizes = {"batch": 2, "images": 1, "height": size[0] // scale, "width": size[1] // scale}
    given = random_inputs((SAMPLE, TIMESTEP, TOKENS, LATENTS), bundle.manifest.features, sizes)
    figures: dict[str, Any] = {}
    for name in ENGINES[1:]:
        figures[name] = _pair((ENGINES[0], name), bundle, given, rounds)
        gc.collect()
    return figures


def _pair(names: tuple[str, str], bundle: Bundle, given: dict[str, Tensor], rounds: int) -> dict[str, Any]:
    """Figures of two engines that take turns, by engine, and the second's ratio to the first: there is no memory for more."""
    cases: dict[str, dict[str, Callable[[], object]]] = {"step": {}, "vae_decoder": {}}
    figures: dict[str, Any] = {name: {} for name in names}
    now = clock()
    for name in names:
        started = now()
        network = LoadedBundle.load(bundle, make_engine(name))
        figures[name]["load"] = round(now() - started, 2)
        text = network.runners["text_encoder"].run(given)
        cases["step"][name] = partial(network.compute, NOISE, {n: given[n] for n in (SAMPLE, TIMESTEP, TOKENS)} | text)
        cases["vae_decoder"][name] = partial(network.runners[VAE_DECODER].run, given)
        started = now()
        cases["step"][name]()
        figures[name]["first_step"] = round(now() - started, 2)
    for what, runs in cases.items():
        seconds = take_turns(runs, rounds)
        figures |= {f"{what}_ratio": spread([own / base for base, own in zip(*seconds.values(), strict=True)])}
        for name, values in seconds.items():
            figures[name][what] = spread(values)
    return figures


def _quality(folder: Path, count: int) -> dict[str, Any]:
    """By plan and engine: the share of prompts that pictures show, and how near pictures are to the first engine's."""
    from benchmarks.quality.attributes import measure
    from benchmarks.quality.plans import likeness
    from tuning.mini.scenes import held_back_prompts

    figures: dict[str, Any] = {}
    for plan in PLANS:
        reference: list[Any] = []
        for name in ENGINES:
            shares, pictures, _ = measure(folder, plan, held_back_prompts(count), steps=20, guidance=3.0, engine=name)
            reference = reference or pictures
            psnr, ssim = likeness(pictures, reference)
            figures.setdefault(plan, {})[name] = {"shares": shares["rules"], "psnr": psnr, "ssim": ssim}
    return figures


def main(arguments: Sequence[str]) -> None:
    """Measure, write and print."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.cpu_engines", description=__doc__)
    parser.add_argument("--bundle", type=Path, default=Path("bundles/random-sd15-original"), help="default: %(default)s")
    parser.add_argument("--size", type=parse_size, default=(256, 256), help="HEIGHTxWIDTH in pixels (default: 256x256)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--pictures", type=Path, help="a bundle of the embedded model, whose pictures are compared")
    parser.add_argument("--count", type=int, default=100, help="of its pictures (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/cpu_engines.json"), help="default: %(default)s")
    options = parser.parse_args(arguments)
    found: dict[str, Any] = {"speed": _speed(options.bundle, options.size, options.rounds)}
    if options.pictures:
        found["pictures"] = _quality(options.pictures, options.count)
    settings = {"size": options.size, "rounds": options.rounds, "rows": 2, "count": options.count, "clock": clock().__name__}
    write_results(options.out, {"settings": settings, **found})
    _show(found, options.out)


def _show(found: dict[str, Any], out: Path) -> None:
    console = Console(highlight=False)
    table = Table("engine", "load, s", "first step, s", "step, s", "ratio", "VAE, s", "ratio")
    for pair, figures in found["speed"].items():
        for name in (ENGINES[0], pair):
            one, ratios = figures[name], ["1", "1"]
            if name == pair:
                ratios = [f"{figures[f'{what}_ratio']['median']:.3f}" for what in ("step", "vae_decoder")]
            steps = [f"{one[what]['median']:.3f}" for what in ("step", "vae_decoder")]
            table.add_row(name, str(one["load"]), str(one["first_step"]), steps[0], ratios[0], steps[1], ratios[1])
    console.print(table)
    for plan, engines in found.get("pictures", {}).items():
        for name, one in engines.items():
            console.print(f"{plan}, {name}: {one['psnr'] or 'the same pictures'} dB, SSIM {one['ssim']}, shown {one['shares']}")
    console.print(f"wrote {out}")


if __name__ == "__main__":
    run_command(main)
