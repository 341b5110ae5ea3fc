"""A plan before it runs: a table of steps, what it costs, and a picture of steps against units."""

import statistics
from collections.abc import Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from engines import DTYPES
from engines.bundle.names import BRANCH, NOISE, TEXT
from engines.bundle.shapes import resolve
from engines.support.extras import need
from engines.support.files import atomic_file
from engines.support.tables import fit
from runtime.errors import RequestError
from runtime.execution.executor import LoadedBundle
from runtime.execution.swapping import Swapper
from runtime.plans.demand import demand
from runtime.plans.schedule import Schedule, Step
from runtime.plans.subgraph import subgraph_for
from runtime.report.cost import from_to, macs_of, peak_bytes, share_of_rows

__all__ = ["COLOURS", "explain", "explained_as_json", "in_order", "listed", "plot", "segment_seconds", "unit_states"]

_REPEATS = 5
_MOST_NAMED = 5


def segment_seconds(network: LoadedBundle, sizes: Mapping[str, int]) -> dict[str, float]:
    """Median seconds of each UNet segment on random inputs of the given sizes (``batch``, ``height``, ``width``)."""
    manifest, seconds = network.manifest, {}
    for segment in subgraph_for(manifest, frozenset({NOISE})).segments:
        inputs = {
            name: torch.randn(resolve(manifest.features[name].shape, sizes)).to(
                network.runners[segment.name].device, DTYPES[manifest.features[name].dtype]
            )
            for name in segment.inputs
        }
        runner = network.runners[segment.name]
        runner.run(inputs)
        seconds[segment.name] = statistics.median(runner.timed_run(inputs)[1] for _ in range(_REPEATS))
    return seconds


def explain(
    schedule: Schedule,
    networks: Mapping[str, LoadedBundle],
    sizes: Mapping[str, int],
    swapper: Swapper | None = None,
    console: Console | None = None,
) -> tuple[Table, str]:
    """The table of steps, with MACs and time relative to running the last UNet whole, and lines with the sums of these.

    Steps that are decided while they run are shown as computing afresh, and summed up from the least to the most.

    Args:
        schedule: a plan laid out.
        networks: loaded segments of its UNets, which are timed.
        sizes: ``batch`` (rows of a UNet call), and ``height`` and ``width`` of the latents.
        swapper: sees to it that a UNet is on the device; without one, all are.
        console: whose width the table is made for.
    """
    title = f"plan {schedule.plan.name}, {schedule.steps} steps: MACs and time relative to a whole step"
    table = Table(title=title, box=SIMPLE)
    for name in ("step", "UNet", "kind", "segments run", "inherited", "MACs", "time", "ms"):
        table.add_column(name, justify="right" if name in {"step", "MACs", "time", "ms"} else "left")
    costs = _costs(schedule, networks, sizes, swapper)
    for row in costs.rows:
        names = listed(row["segments"], row["of"]), listed(row["inherited"])
        numbers = f"{row['macs']:.2f}", f"{row['time']:.2f}", f"{row['milliseconds']:.1f}"
        table.add_row(str(row["step"]), row["unet"], row["kind"], *names, *numbers)
    all_macs, all_time = (from_to(*ends, digits=2) for ends in (costs.macs, costs.time))
    decided = "\nsteps of kind 'as decided' are shown as key steps, and may inherit" if schedule.adaptive else ""
    swaps = _swaps(schedule.all_steps(), swapper) if swapper and swapper.swaps else ""
    return fit(table, console or Console(), ["UNet", "MACs", "inherited"]), (
        f"over {schedule.steps} steps, UNet MACs {all_macs} and predicted time {all_time} of full; features between segments "
        f"take at most {peak_bytes(schedule, sizes) / 2**20:.2f} MiB at once, cached ones included; what an engine needs "
        f"inside a segment comes on top{decided}{swaps}"
    )


def explained_as_json(
    schedule: Schedule, networks: Mapping[str, LoadedBundle], sizes: Mapping[str, int], swapper: Swapper | None = None
) -> dict[str, Any]:
    """What ``explain`` prints, in JSON's terms: ranges are pairs of the least and the most."""
    costs = _costs(schedule, networks, sizes, swapper)
    return {
        "plan": schedule.plan.name,
        "steps": costs.rows,
        "macs_of_full": costs.macs,
        "time_of_full": costs.time,
        "features_bytes": peak_bytes(schedule, sizes),
    }


@dataclass(frozen=True)
class _Costs:
    """Steps as they are listed, and the least and the most mean MACs and time of all steps, relative to a whole one."""

    rows: list[dict[str, Any]]
    macs: tuple[float, float]
    time: tuple[float, float]


def _costs(schedule: Schedule, networks: Mapping[str, LoadedBundle], sizes: Mapping[str, int], swapper: Swapper | None) -> _Costs:
    """Time the segments, and say what each step costs."""
    steps = schedule.all_steps()
    halves = {step.half for step in steps} | {False}
    seconds: dict[tuple[str, bool], dict[str, float]] = {}
    for name in schedule.unets:
        with swapper.pinned(name) if swapper else nullcontext():
            for half in halves:
                rows = sizes["batch"] // 2 if half else sizes["batch"]
                seconds[name, half] = segment_seconds(networks[name], {**sizes, "batch": rows})
    last = schedule.unets[steps[-1].unet]
    whole = subgraph_for(last, frozenset({NOISE})).segment_names
    full_macs = macs_of(last, whole, sizes)
    full_seconds = sum(seconds[steps[-1].unet, False][name] for name in whole)

    def cost(step: Step) -> tuple[float, float]:
        """A step's MACs and time, relative to those of the whole UNet."""
        ran = schedule.subgraph(step).segment_names
        time = sum(seconds[step.unet, step.half][name] for name in ran) / full_seconds
        return share_of_rows(step.half) * macs_of(schedule.unets[step.unet], ran, sizes) / full_macs, time

    listed_steps = []
    for step in steps:
        subgraph, (macs, time) = schedule.subgraph(step), cost(step)
        listed_steps.append({
            "step": step.index,
            "unet": step.unet,
            "kind": "as decided" if schedule.pending_threshold(step.index) else step.kind,
            "segments": list(subgraph.segment_names),
            "of": len(seconds[step.unet, False]),
            "inherited": sorted(subgraph.cached_inputs),
            "macs": macs,
            "time": time,
            "milliseconds": 1000 * time * full_seconds,
        })  # fmt: skip
    sums = [map(statistics.fmean, zip(*map(cost, schedule.all_steps(changed)), strict=True)) for changed in (False, True)]
    all_macs, all_time = zip(*sums, strict=True)
    return _Costs(listed_steps, all_macs, all_time)


def _swaps(steps: tuple[Step, ...], swapper: Swapper) -> str:
    """The UNets that move at each switch where the device cannot hold all; the first may be there from the last call."""
    moves = [f"{name} ({swapper.bytes_of(name) / 2**20:.0f} MiB) before step {index}" for index, name in _starts(steps)]
    return f"\nthe UNets do not fit into the device's memory together and are swapped: {', '.join(moves)}"


def listed(names: Sequence[str], of: int | None = None) -> str:
    """Names for a table's cell, or how many there are (of all) where that would be too long."""
    if len(names) == of:
        return f"all {of}"
    return ", ".join(names) if len(names) <= _MOST_NAMED else f"{len(names)}" + (f" of {of}" if of else "")


_SKIPPED, _INHERITED, _COMPUTED, _DECIDED, _ABSENT, _FORECAST = range(6)
COLOURS = {
    "not needed": "#e8e8e8",
    "inherited": "#f2b134",
    "computed": "#2f6690",
    "as decided": "#7fb069",
    "not in this UNet": "#ffffff",
    "forecast": "#e07a5f",
}


def plot(schedule: Schedule, path: Path) -> None:
    """Write a picture of the plan: steps across, units down; computed, inherited, not needed, or decided while running.

    Raises:
        RequestError: matplotlib is not installed.
        OSError: it cannot be written there; what was there stays.
    """
    need("matplotlib", "--plot", error=RequestError)
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot
    from matplotlib.colors import ListedColormap
    from matplotlib.patches import Patch

    names, rows = unit_states(schedule)
    steps = schedule.all_steps()
    figure, axis = pyplot.subplots(figsize=(2.8 + 0.22 * len(steps), 1.2 + 0.15 * len(names)))
    axis.pcolormesh(rows, cmap=ListedColormap(list(COLOURS.values())), vmin=0, vmax=_FORECAST, edgecolors="white", linewidth=0.5)
    axis.set_yticks([row + 0.5 for row in range(len(names))], names, fontsize=6)
    axis.set_xticks([column + 0.5 for column in range(len(steps))], [str(step.index) for step in steps], fontsize=6)
    axis.invert_yaxis()
    axis.set_xlabel("step (" + ", ".join(_ranges(steps)) + ")", fontsize=7)
    axis.set_title(f"plan {schedule.plan.name}", fontsize=9)
    shown = {state for row in rows for state in row} | {_SKIPPED, _INHERITED, _COMPUTED}
    labels = [item for state, item in enumerate(COLOURS.items()) if state in shown]
    handles = [Patch(facecolor=colour, edgecolor="#999999", label=label) for label, colour in labels]
    axis.legend(handles=handles, loc="upper left", bbox_to_anchor=(1.01, 1), fontsize=6)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=130, bbox_inches="tight")
    pyplot.close(figure)


def unit_states(schedule: Schedule) -> tuple[list[str], list[list[int]]]:
    """The units of all UNets, and for each the place in ``COLOURS`` of its state at every step."""
    names = [name for name in in_order([unet.unet_units for unet in schedule.unets.values()]) if not name.endswith(BRANCH)]
    rows = [[_state(schedule, step.index, name) for step in schedule.all_steps()] for name in names]
    if schedule.guided:
        both = (not step.half and step.kind != "skip" for step in schedule.all_steps())
        names, rows = ["guidance", *names], [[_COMPUTED if whole else _INHERITED for whole in both], *rows]
    return names, rows


def in_order(unets: Iterable[Sequence[str]]) -> list[str]:
    """The units of all UNets, each once: those of the largest in its order, and each other one behind what it follows."""
    names: list[str] = []
    for units in sorted(unets, key=len, reverse=True):
        position = 0
        for unit in units:
            if unit not in names:
                names.insert(position, unit)
            position = names.index(unit) + 1
    return names


def _state(schedule: Schedule, index: int, unit: str) -> int:
    """Whether a unit is computed, inherited, not needed or absent at a step; ``_DECIDED`` where that is decided while running."""
    less, more = (_state_of(schedule, schedule.resolve(index, changed), unit) for changed in (False, True))
    return more if less == more else _DECIDED


def _state_of(schedule: Schedule, step: Step, unit: str) -> int:
    manifest = schedule.unets[step.unet]
    if unit not in manifest.unet_units:
        return _ABSENT
    cached = schedule.subgraph(step).cached_inputs
    for name in cached & {unit, f"{unit}{BRANCH}"}:
        return _FORECAST if schedule.is_forecast(step, name) else _INHERITED
    running = demand(manifest.units, step.wanted, step.inherited | {TEXT})
    return _COMPUTED if any(unit == node.name for node in running) else _SKIPPED


def _ranges(steps: tuple[Step, ...]) -> list[str]:
    """Which UNet runs from which step on."""
    return [f"{name} from {index}" for index, name in _starts(steps)]


def _starts(steps: tuple[Step, ...]) -> list[tuple[int, str]]:
    """The steps at which another UNet begins than ran before, and its name."""
    pairs = zip((None, *steps), steps, strict=False)
    return [(step.index, step.unet) for before, step in pairs if before is None or before.unet != step.unet]
