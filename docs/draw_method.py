"""Draws docs/partition.png and docs/inherit_steps.png: Stable Diffusion 1.5's UNet, its segments, and what steps compute of it.

python -m docs.draw_method

Everything drawn is worked out by the project's own code from the configuration in models/sd15; no weights are needed.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from diffusers import UNet2DConditionModel

from engines.bundle.manifest import Feature, Unit
from engines.bundle.names import BRANCH, NOISE, SAMPLE, TEXT, TIMESTEP
from engines.support.extras import need
from exporter.graph.partition import partition
from exporter.graph.shapes_and_macs import infer_shapes_and_macs
from exporter.graph.topology import topology
from exporter.graph.unit_modules import unit_module
from runtime.plans.demand import demand
from runtime.plans.plan import inherited_features
from runtime.plans.presets import find_plan

if TYPE_CHECKING:
    from matplotlib.axes import Axes

FOLDER = Path(__file__).resolve().parent
PLANS = ("block:3", "deepcache:3", "unit:3")
STATES = {"computed": "#2f6690", "inherited": "#f2b134", "not needed": "#e3e3e3"}
LETTERS = {"resnet": "R", "attention": "A"}
"""Others have the first letter of their block: stem, head, and samplers on the way down and up."""
LEGEND = "S: stem, R: ResNet, A: transformer, D and U: down- and upsampler, H: head"
LATENT_SIDE, TOKENS = 64, 77


def stable_diffusion() -> tuple[Unit, ...]:
    """The units of Stable Diffusion 1.5's UNet, with their multiply-accumulates at 512 x 512 pixels."""
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(UNet2DConditionModel.load_config(FOLDER.parent / "models" / "sd15" / "unet"))
    units = topology(unet)
    inputs = {
        SAMPLE: Feature(dtype="float32", shape=("batch", unet.config.in_channels, "height", "width")),
        TIMESTEP: Feature(dtype="float32", shape=(1,)),
        TEXT: Feature(dtype="float32", shape=("batch", TOKENS, unet.config.cross_attention_dim)),
    }
    modules = {unit.name: unit_module(unet, unit.name) for unit in units}
    measured, _ = infer_shapes_and_macs(units, modules, inputs, {"height": LATENT_SIDE, "width": LATENT_SIDE})
    return tuple(measured)


def inherited_by(units: Sequence[Unit], plan: str) -> frozenset[str]:
    """The features that a plan's inherit steps take from the last key step."""
    return frozenset().union(*inherited_features(find_plan(plan), [unit.name for unit in units]))


def states(units: Sequence[Unit], inherited: frozenset[str]) -> tuple[dict[str, str], set[str], float]:
    """The state of each drawn unit at a step that inherits these features, the nodes that run, and their share of all MACs."""
    running = demand(units, {NOISE}, inherited | {TEXT})
    read = {name for unit in running for name in unit.inputs}
    names = {unit.name for unit in running}

    def state(name: str) -> str:
        if {name, f"{name}{BRANCH}"} & inherited & read:
            return "inherited"
        return "computed" if name in names else "not needed"

    share = sum(unit.macs for unit in running) / sum(unit.macs for unit in units)
    return {unit.name: state(unit.name) for unit in units if not unit.name.endswith(BRANCH)}, names, share


def positions(units: Sequence[Unit]) -> dict[str, tuple[int, int]]:
    """Where units are drawn: across in the order of data, down by resolution."""
    names = [unit.name for unit in units if not unit.name.endswith(BRANCH) and unit.name != "time"]
    level, places = 0, {}
    for x, name in enumerate(names):
        rises = name.startswith("up.") and name.endswith(".sampler")
        level += name.startswith("down.") and name.endswith(".sampler")
        level -= rises
        places[name] = (x, -level)
    return places


def draw(axis: Axes, units: Sequence[Unit], colour: Callable[[str], Any], running: Collection[str]) -> None:
    """Draw one UNet: a box for each unit, a line for each feature that a unit reads, dark where it runs."""
    places = positions(units)
    for unit in units:
        reader = unit.name.removesuffix(BRANCH)
        for name in unit.inputs:
            if name in places and reader in places and reader != name:
                line(axis, places[name], places[reader], strong=unit.name in running)
    for name, (x, y) in places.items():
        dark = colour(name) == STATES["computed"]
        letter = LETTERS.get(name.rsplit(".", maxsplit=1)[-1], name[0].upper())
        box = {"boxstyle": "round,pad=0.25", "facecolor": colour(name), "edgecolor": "#777777", "linewidth": 0.5}
        axis.text(x, y, letter, ha="center", va="center", fontsize=6, color="white" if dark else "black", bbox=box, zorder=3)
    axis.set_xlim(-0.8, len(places) - 0.2)
    axis.set_ylim(min(y for _, y in places.values()) - 0.6, 1.2)
    axis.axis("off")


def line(axis: Axes, start: tuple[int, int], end: tuple[int, int], strong: bool) -> None:
    """A line from the unit that makes a feature to one that reads it; skip connections run straight across."""
    shade: dict[str, Any] = {"color": "#333333" if strong else "#d0d0d0", "linewidth": 0.8 if strong else 0.5}
    if end[0] - start[0] <= 1:
        axis.plot([start[0], end[0]], [start[1], end[1]], zorder=1, **shade)
        return
    lift = 0.2 + 0.018 * (end[0] - start[0])
    axis.plot(
        [start[0], start[0] + 0.3, end[0] - 0.3, end[0]], [start[1], start[1] + lift, end[1] + lift, end[1]], zorder=1, **shade
    )


def draw_partition(units: Sequence[Unit], path: Path) -> None:
    """The UNet as a graph of units, a colour for each segment of the default partition."""
    from matplotlib import colormaps, pyplot
    from matplotlib.patches import Patch

    segments = partition(units, "block", [find_plan("block:2"), find_plan("deepcache:2")])
    palette = {segment.name: colormaps["tab20"](number) for number, segment in enumerate(segments)}
    home = {unit: segment.name for segment in segments for unit in segment.units}
    figure, axis = pyplot.subplots(figsize=(11, 2.6))
    draw(axis, units, lambda name: palette[home[name]], home)
    handles = [Patch(facecolor=shade, edgecolor="#777777", label=name) for name, shade in palette.items()]
    axis.legend(
        handles=handles, ncol=7, loc="upper center", bbox_to_anchor=(0.5, -0.02), fontsize=7, title="segment", title_fontsize=7
    )
    axis.set_title(f"The UNet of Stable Diffusion 1.5. {LEGEND}", fontsize=9)
    figure.savefig(path, dpi=140, bbox_inches="tight")
    pyplot.close(figure)


def draw_steps(units: Sequence[Unit], path: Path) -> None:
    """A key step, and an inherit step of each of ``PLANS``: what is computed, inherited and not needed."""
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    cases = [("a key step", frozenset[str]())]
    cases += [(f"an inherit step of {plan}", inherited_by(units, plan)) for plan in PLANS]
    figure, axes = pyplot.subplots(len(cases), 1, figsize=(11, 2.1 * len(cases)))
    for axis, (title, inherited) in zip(axes, cases, strict=True):
        found, running, share = states(units, inherited)
        draw(axis, units, lambda name, found=found: STATES[found[name]], running)  # type: ignore[misc]
        axis.set_title(f"{title}: {share:.1%} of the multiply-accumulates", fontsize=9, loc="left")
        print(f"{title}: {share:.1%} of the multiply-accumulates")
    handles = [Patch(facecolor=shade, edgecolor="#777777", label=name) for name, shade in STATES.items()]
    figure.tight_layout(rect=(0, 0.04, 1, 1))
    figure.legend(handles=handles, ncol=3, loc="lower center", fontsize=8, title=LEGEND, title_fontsize=8)
    figure.savefig(path, dpi=140, bbox_inches="tight")
    pyplot.close(figure)


def main() -> None:
    """Write both pictures beside this file."""
    need("matplotlib", "drawing")
    import matplotlib as mpl

    mpl.use("Agg")
    units = stable_diffusion()
    draw_partition(units, FOLDER / "partition.png")
    draw_steps(units, FOLDER / "inherit_steps.png")


if __name__ == "__main__":
    main()
