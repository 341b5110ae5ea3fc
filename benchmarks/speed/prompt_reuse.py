"""`python -m benchmarks.speed.prompt_reuse`: what computing the prompt's keys and values once per call would save.

Every cross-attention projects the same text at every step of a call. Kept for the call, that would cost no quality. Here all of
those projections together are timed against a step of the UNet: every unit of it, traced on its own, in ONNX Runtime on the CPU,
one unit and the projections after another in every round. Units that are alike are timed once and counted as often as they occur.
Weights are random. Writes a JSON file; the committed one is that of `OMP_NUM_THREADS=1 python -m benchmarks.speed.prompt_reuse`.
"""

import argparse
import tempfile
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import torch
from diffusers import UNet2DConditionModel
from rich.console import Console
from torch import Tensor, nn

from benchmarks.machine import results_file, write_results
from benchmarks.speed.full_size import TOKENS, Traceable, export, measured_units, random_inputs, spread, take_turns
from engines import Segment, Unit, make_engine
from engines.bundle.manifest import Feature
from engines.bundle.names import TEXT
from engines.bundle.shapes import resolve
from engines.support.cli import run_command
from tuning.checkpoints.find_source import random_unet
from tuning.ranking.timing import clock

__all__ = ["KeysAndValues", "Pieces", "alike", "main"]

_PROJECTIONS = "prompt"
"""The segment of all keys and values."""
_SIDE = 64
"""Of the latents at which units are told apart; which are alike is the same at any size."""


class KeysAndValues(nn.Module):
    """Text (batch, tokens, width) -> keys and values of every cross-attention, (batch, tokens, channels) each."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        super().__init__()
        attentions: list[Any] = [module for name, module in unet.named_modules() if name.endswith("attn2")]
        self.linear: list[nn.Linear] = [layer for attention in attentions for layer in (attention.to_k, attention.to_v)]
        self.layers = nn.ModuleList(self.linear)

    def forward(self, *features: Tensor) -> tuple[Tensor, ...]:
        return tuple(layer(features[0]) for layer in self.linear)

    def macs(self) -> int:
        """Multiply-accumulates of one row."""
        return sum(TOKENS * layer.in_features * layer.out_features for layer in self.linear)


def alike(units: Sequence[Unit], features: Mapping[str, Feature], sizes: Mapping[str, int]) -> dict[str, int]:
    """The first unit of each sort (kind, weights, MACs and shapes of inputs), and how many there are of it."""
    first: dict[object, str] = {}
    counts: dict[str, int] = {}
    for unit in units:
        sort = unit.kind, unit.parameters, unit.macs, tuple(resolve(features[name].shape, sizes) for name in unit.inputs)
        name = first.setdefault(sort, unit.name)
        counts[name] = counts.get(name, 0) + 1
    return counts


class Pieces:
    """A UNet's units, one of each sort, and the projections of all attentions, each loaded on its own."""

    def __init__(self, unet: UNet2DConditionModel) -> None:
        self._unet, self._projections = unet, KeysAndValues(unet).eval()
        units, features, modules = measured_units(unet, _SIDE)
        self._features, self._counts = features, alike(units, features, {"batch": 2, "height": _SIDE, "width": _SIDE})
        parts: list[Traceable] = [
            (Segment(name=unit.name, units=(unit.name,), inputs=unit.inputs, outputs=(unit.name,)), _Tuple(modules[unit.name]))
            for unit in units
            if unit.name in self._counts
        ]
        made = tuple(f"{_PROJECTIONS}.{number}" for number in range(len(self._projections.linear)))
        parts.append((Segment(name=_PROJECTIONS, units=(), inputs=(TEXT,), outputs=made), self._projections))
        engine = make_engine("onnxruntime")
        with tempfile.TemporaryDirectory() as folder:
            bundle = export(Path(folder) / "units", unet, parts, units, features)
            self._runners = {segment.name: engine.load(bundle, segment) for segment in bundle.manifest.segments}

    def measure(self, side: int, rounds: int) -> dict[str, Any]:
        """Shares of a step with latents of ``side`` x ``side``, in MACs and in time, and the seconds behind them."""
        units, features, _ = measured_units(self._unet, side)
        sizes = {"batch": 2, "height": side, "width": side}
        given = {name: random_inputs(runner.segment.inputs, features, sizes) for name, runner in self._runners.items()}
        seconds = take_turns({name: partial(self._runners[name].run, given[name]) for name in given}, rounds)
        steps = [sum(count * seconds[name][i] for name, count in self._counts.items()) for i in range(rounds)]
        ratios = [prompt / step for prompt, step in zip(seconds[_PROJECTIONS], steps, strict=True)]
        macs = self._projections.macs() / sum(unit.macs for unit in units)
        return {
            "share of a step": {"macs": round(macs, 5), "time": spread(ratios, 5)},
            "seconds": {"projections": spread(seconds[_PROJECTIONS], 5), "step": spread(steps)},
        }


class _Tuple(nn.Module):
    """A unit's module as a segment's: it returns a tuple."""

    def __init__(self, module: nn.Module) -> None:
        super().__init__()
        self.module = module

    def forward(self, *features: Tensor) -> tuple[Tensor]:
        return (self.module(*features),)


def main(arguments: Sequence[str]) -> None:
    """Measure at each size, print the shares and write them."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.prompt_reuse", description=__doc__)
    parser.add_argument("--source", default="random:sd15", help="a UNet's configuration (default: %(default)s)")
    parser.add_argument("--sides", type=int, nargs="+", default=[64, 32], help="sides of latents (default: 64 32)")
    parser.add_argument("--rounds", type=int, default=7, help="default: %(default)s")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/prompt_reuse.json")
    options = parser.parse_args(arguments)
    pieces = Pieces(random_unet(options.source))
    found = {side: pieces.measure(side, options.rounds) for side in options.sides}
    settings = {"source": options.source, "rows": 2, "tokens": TOKENS, "dtype": "float32", "engine": "onnxruntime"}
    settings |= {"threads": torch.get_num_threads(), "clock": clock().__name__, "rounds": options.rounds}
    write_results(options.out, {"settings": settings, "latents": found})
    console = Console(highlight=False)
    for side, figures in found.items():
        shares, step = figures["share of a step"], figures["seconds"]["step"]["median"]
        saved = f"{100 * shares['macs']:.2f} % of MACs and {100 * shares['time']['median']:.2f} % of time"
        console.print(f"latents {side}x{side}: keys and values of the prompt are {saved} of a step of {step:.2f} s")
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
