"""`python -m benchmarks.condconv.costs`: what conditional convolutions cost, in every form that they can be exported in.

One layer at Stable Diffusion 1.5's shapes, each form over a plain convolution; `mini`'s UNet, condconv over its
assembled twin; and a UNet of Stable Diffusion 1.5's widths (random weights), block by block.
ONNX Runtime on the CPU, everything in turns: medians of the ratios of one round, with lowest and highest. Also the ratios of
MACs, and from how many layers of its own TensorRT-RTX builds the layer.
"""

import argparse
import json
import tempfile
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from diffusers import UNet2DConditionModel
from rich.console import Console
from rich.table import Table
from torch import nn

import tuning
from benchmarks.condconv.forms import CHANNELS, EXPERTS, layers, ratios, session
from benchmarks.condconv.page import update
from benchmarks.machine import results_file, write_results
from benchmarks.quality.variants_page import measured_before
from engines import Segment
from engines.bundle.manifest import Feature, Unit
from engines.bundle.names import NOISE, SAMPLE, STEM, TEXT, TIMESTEP
from engines.bundle.shapes import resolve
from engines.support.cli import run_command
from engines.support.files import write_text
from exporter.graph.condconv import FORM
from exporter.graph.partition import partition
from exporter.graph.shapes_and_macs import infer_shapes_and_macs
from exporter.graph.topology import block_of, depth_factor, topology
from exporter.graph.unit_modules import SegmentModule, unit_module
from exporter.segments.trace import trace
from tuning.surgery.changes import changes_of
from tuning.surgery.meta import on_meta

__all__ = ["main"]

_MINI, _SD15 = Path("models/mini"), Path("models/sd15")


@dataclass(frozen=True)
class _Student:
    unet: UNet2DConditionModel
    units: Sequence[Unit]
    features: Mapping[str, Feature]

    def segment(self, block: str) -> Segment:
        """A block, or the whole UNet where `block` is empty."""
        return next(one for one in partition(self.units, "block" if block else None) if one.name == block or not block)

    def trace(self, block: str, path: Path) -> None:
        segment = self.segment(block)
        inside = [unit for unit in self.units if unit.name in segment.units]
        modules = {unit.name: unit_module(self.unet, unit.name) for unit in inside}
        module = SegmentModule(inside, modules, segment.inputs, segment.outputs)
        trace(segment, module, self.features, depth_factor(self.unet), path)


def text_length(model: Path) -> int:
    """How many tokens a checkpoint's text has."""
    return int(json.loads((model / "text_encoder" / "config.json").read_text())["max_position_embeddings"])


def students(unet: UNet2DConditionModel, tokens: int) -> dict[str, _Student]:
    """The UNet assembled, and with experts for each router; it reads a text of so many tokens."""
    recipe, side, made = tuning.recipe("condconv"), unet.config.sample_size, {}
    assert recipe.experts is not None
    recipes = {"assembled": tuning.recipe("assembled"), "timestep": recipe}
    recipes["features"] = recipe.model_copy(update={"experts": recipe.experts.model_copy(update={"router": "features"})})
    inputs = {
        SAMPLE: Feature(dtype="float32", shape=("batch", unet.config.in_channels, "height", "width")),
        TIMESTEP: Feature(dtype="float32", shape=(1,)),
        TEXT: Feature(dtype="float32", shape=("batch", tokens, unet.config.cross_attention_dim)),
    }
    for name, one in recipes.items():
        student = tuning.assemble(unet, one, share=True).eval()
        units = topology(student)
        modules = {unit.name: unit_module(student, unit.name) for unit in units}
        with student.device:  # without weights, on the meta device, shapes are enough
            made[name] = _Student(student, *infer_shapes_and_macs(units, modules, inputs, {"height": side, "width": side}))
    return made


def macs(made: Mapping[str, _Student]) -> dict[str, float]:
    """MACs of one row over the assembled UNet's."""
    total = {name: sum(unit.macs for unit in student.units) for name, student in made.items()}
    return {name: round(count / total["assembled"], 4) for name, count in total.items()}


def compare(
    made: Mapping[str, _Student], block: str, side: int, rounds: int, threads: int, folder: Path, steps: int = 1
) -> list[dict[str, Any]]:
    """Times of one block (or the whole UNet, where it is empty) of each student on random features, over the assembled one's."""
    sessions = {}
    for name, student in made.items():
        path = folder / f"{block or 'whole'}-{name}.onnx"
        student.trace(block, path)
        sessions[name] = session(path, threads)
    rows, rng = [], np.random.default_rng(0)
    for batch in (1, 2):
        sizes = {"batch": batch, "height": side, "width": side}
        features, names = made["assembled"].features, made["assembled"].segment(block).inputs
        feed = {name: rng.standard_normal(resolve(features[name].shape, sizes), dtype=np.float32) for name in names}
        runs = {name: partial(one.run, None, feed) for name, one in sessions.items()}
        rows += [{"router": name, "batch": batch, **row} for name, row in ratios(runs, "assembled", rounds, steps).items()]
    return rows


def whole(rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """`mini`'s UNet in one segment, at its own size; a turn is twenty steps."""
    unet = tuning.load_unet(_MINI / "unet")
    made, side = students(unet, text_length(_MINI)), unet.config.sample_size
    return {"side": side, "macs": macs(made), "time": compare(made, "", side, rounds, threads, folder, steps=20)}


def blocks(rounds: int, threads: int, folder: Path) -> dict[str, Any]:
    """Stable Diffusion 1.5's widths, one block after another: the whole would not fit into a small machine three times."""
    with on_meta():
        unet = UNet2DConditionModel.from_config(json.loads((_SD15 / "unet" / "config.json").read_text()))
    made, side, rows = students(unet, text_length(_SD15)), unet.config.sample_size, {}
    experts = changes_of(made["timestep"].unet).experts
    assert experts is not None
    placed = {block_of(name) for name in experts.resnets}
    for block in dict.fromkeys(block_of(unit.name) for unit in made["assembled"].units):
        if block in {STEM, NOISE}:
            continue  # a hundredth of the time
        timed = made if block in placed else {"assembled": made["assembled"]}
        modules = [student.unet.get_submodule(_path(block)) for student in timed.values()]
        for module in modules:
            _fill(module)
        rows[block] = compare(timed, block, side, rounds, threads, folder)
        for module in modules:
            module.to("meta")
        for file in folder.iterdir():
            file.unlink()
    return {"side": side, "macs": macs(made), "time": rows, "sum": _sums(rows, list(made))}


def _sums(rows: Mapping[str, list[dict[str, Any]]], routers: Sequence[str]) -> list[dict[str, Any]]:
    """Time of all blocks, over the assembled UNet's."""
    found = []
    for batch in (1, 2):
        times = {block: {row["router"]: row["ms"] for row in some if row["batch"] == batch} for block, some in rows.items()}
        sums = {router: sum(one.get(router, one["assembled"]) for one in times.values()) for router in routers}
        for router, total in sums.items():
            ratio = round(total / sums["assembled"], 3)
            found.append({"router": router, "batch": batch, "ratio": ratio, "ms": round(total, 2)})
    return found


def _path(block: str) -> str:
    return "mid_block" if block == "mid" else block.replace(".", "_blocks.")


def _fill(part: nn.Module) -> None:
    """Random weights in place of those on the meta device."""
    part.to_empty(device="cpu")
    for module in part.modules():
        for name, parameter in module.named_parameters(recurse=False):
            if isinstance(module, nn.GroupNorm | nn.LayerNorm) and name == "weight":
                nn.init.ones_(parameter)
            else:
                nn.init.normal_(parameter, std=0.02)


PARTS = {"layers": layers, "whole": whole, "blocks": blocks}
"""The measurements to choose from."""


def main(arguments: Sequence[str]) -> None:
    """Measure layers, `mini`'s UNet and blocks of Stable Diffusion 1.5's widths; print and write what was found."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.condconv.costs", description=__doc__)
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing (default: 15)")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (default: 1)")
    parser.add_argument("--parts", default=",".join(PARTS), help="what to measure (default: %(default)s); others stay")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/condconv.json")
    parser.add_argument("--doc", type=results_file, default="docs/condconv.md", help="the page with the figures")
    parser.add_argument("--page", action="store_true", help="measure nothing: write the page's figures from what --out holds")
    options = parser.parse_args(arguments)
    found = measured_before(options.out) if options.page else _measure(options)
    _print(found)
    if options.page:
        write_text(options.doc, update(options.doc.read_text(), found))
    Console().print(f"wrote {options.doc if options.page else options.out}", highlight=False)


def _measure(options: argparse.Namespace) -> dict[str, Any]:
    """Measures the parts that are asked for, and writes them beside those that were measured before."""
    found: dict[str, Any] = {"settings": {"rounds": options.rounds, "threads": options.threads, "experts": EXPERTS, "form": FORM}}
    found["settings"] |= {"channels": CHANNELS, "dtype": "float32", "engine": "onnxruntime"}
    found |= _kept(options.out, found["settings"])
    for part in options.parts.split(","):
        with tempfile.TemporaryDirectory() as folder:
            found[part] = PARTS[part](options.rounds, options.threads, Path(folder))
    write_results(options.out, found, indent=1)
    return found


def _kept(path: Path, settings: Mapping[str, Any]) -> dict[str, Any]:
    """The parts that were measured before with the same settings."""
    before: dict[str, Any] = json.loads(path.read_text()) if path.is_file() else {}
    return {part: before[part] for part in PARTS if part in before} if before.get("settings") == settings else {}


def _print(found: Mapping[str, Any]) -> None:
    rows = [(f"layer {r['side']}x{r['side']}", r["form"], r) for r in found.get("layers", ())]
    if "whole" in found:
        rows += [("`mini`'s UNet", r["router"], r) for r in found["whole"]["time"]]
    for name, some in found.get("blocks", {}).get("time", {}).items():
        rows += [(f"SD 1.5's {name}", r["router"], r) for r in some if len(some) > 2]
    rows += [("SD 1.5's, all blocks", r["router"], r) for r in found.get("blocks", {}).get("sum", ())]
    table = Table("what", "router, form", "batch", "time over plain", "low", "high", "ms", "MACs", "RTX layers")
    for what, form, row in rows:
        more = [row.get(key) for key in ("batch", "ratio", "low", "high", "ms", "macs", "rtx_layers")]
        table.add_row(what, form, *("" if value is None else str(value) for value in more))
    Console(width=130).print(table)
    for part in ("whole", "blocks"):
        if part in found:
            Console().print(f"MACs over the assembled UNet's, {part}: {found[part]['macs']}", highlight=False)


if __name__ == "__main__":
    run_command(main)
