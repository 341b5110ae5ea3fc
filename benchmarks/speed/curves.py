"""`python -m benchmarks.speed.curves`: time and memory of a picture as the work grows.

Five curves: over its size, the pictures of a call, the steps, N of `deepcache:N`, and how finely the bundle is partitioned (under
`full`). Every point has a process of its own, with one thread, which makes a small picture before it counts: medians of the CPU
seconds of some calls, and the peak of resident memory, which a process keeps from its largest call on. Writes JSON, a table and a
plot. What is measured stays in --work, so that a run that was stopped is resumed by the same command.
"""

import argparse
import statistics
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import check_counts
from benchmarks.end_to_end.measure import Log
from benchmarks.end_to_end.worker import Subject
from benchmarks.machine import results_file, write_results
from benchmarks.peers.serve import Call
from engines.errors import UserError
from engines.support.cli import Parser, run_command
from engines.support.extras import need
from engines.support.files import atomic_file
from exporter import BuildOptions, build
from runtime.embedded import EXAMPLES

__all__ = ["Point", "main", "points_of"]

_GRANULARITIES = ("block", "layer", "unit")
_COLUMNS = ("curve", "at", "CPU s", "times the first", "peak MB")


@dataclass(frozen=True)
class Point:
    """A call on a curve, and how finely its bundle is partitioned."""

    curve: str
    at: str
    call: Call
    granularity: str = "block"


def points_of(options: argparse.Namespace) -> list[Point]:
    """Every point, curve by curve, the least work first; curves begin with the same plain call or what is nearest to it."""
    prompt = EXAMPLES.get(options.source, "a lighthouse on a cliff at dusk")
    plain = Call(prompt, options.steps[0], options.guidance, 0, options.sizes[0], options.sizes[0])
    return [
        *(Point("size", f"{side}", replace(plain, height=side, width=side)) for side in options.sizes),
        *(Point("pictures", f"{count}", replace(plain, images=count)) for count in options.pictures),
        *(Point("steps", f"{steps}", replace(plain, steps=steps)) for steps in options.steps),
        *(Point("N", f"{n}", replace(plain, steps=options.steps[-1], plan=_every(n))) for n in options.every),
        *(Point("partition", one, plain, one) for one in _GRANULARITIES),
    ]


def _every(n: int) -> str:
    return "full" if n == 1 else f"deepcache:{n}"


def _numbers(text: str) -> list[int]:
    try:
        found = [int(part) for part in text.split(",")]
    except ValueError:
        found = []
    if not found or min(found) < 1 or found != sorted(set(found)):
        raise argparse.ArgumentTypeError(f"{text!r} is no rising list of whole numbers, such as 1,2,4")
    return found


def _options(arguments: Sequence[str]) -> argparse.Namespace:
    parser = Parser(prog="python -m benchmarks.speed.curves", description=__doc__)
    add = parser.add_argument
    add("--source", default="random:sd15", help="as for python -m exporter build (default: %(default)s)")
    add("--sizes", type=_numbers, default="256,384,512,768", help="sides in pixels (default: %(default)s)")
    add("--pictures", type=_numbers, default="1,2,4,8", help="pictures of a call (default: %(default)s)")
    add("--steps", type=_numbers, default="10,20,30,50", help="(default: %(default)s)")
    add("--every", type=_numbers, default="1,2,3,4,6,8", help="N of deepcache:N, at the most steps (default: %(default)s)")
    add("--guidance", type=float, default=7.5, help="(default: %(default)s)")
    add("--engine", default="onnxruntime", help="(default: %(default)s)")
    add("--rounds", type=int, default=3, help="(default: %(default)s)")
    add("--work", type=Path, default=Path("runs/curves"), help="where bundles and what is measured stay")
    add("--out", type=results_file, default="benchmarks/results/curves.json", help="the figures; table and plot lie beside it")
    options = parser.parse_args(arguments)
    check_counts(options, "rounds")
    return options


def _built(options: argparse.Namespace, granularity: str) -> Path:
    """The bundle with a partition, built unless it is up to date."""
    folder: Path = options.work / "bundles" / f"{options.source}-{granularity}".replace(":", "-").replace("/", "-")
    most = options.pictures[-1]
    fine: Any = granularity
    build(
        BuildOptions(
            source=options.source, granularity=fine, plans=("deepcache:2",), engines=(options.engine,), out=folder, force=True,
            max_images=most,
        )
    )  # fmt: skip
    return folder


def _measure(options: argparse.Namespace, points: Sequence[Point], log: Log, console: Console) -> None:
    """Every point; what the log has is not measured again."""
    scratch = options.work / "scratch"
    scratch.mkdir(parents=True, exist_ok=True)
    settings = {"engine": options.engine, "device": "cpu", "threads": 1, "scratch": str(scratch.resolve())}
    left = [point for point in points if not _has(log, point, options.rounds - 1)]
    folders = {granularity: _built(options, granularity) for granularity in dict.fromkeys(point.granularity for point in left)}
    for point in left:
        file = options.work / "logs" / f"{point.curve}-{point.at}.log"
        with Subject("ours", folders[point.granularity], settings, "", file) as subject:
            _rounds(subject, point, options.rounds, log, console)


def _rounds(subject: Subject, point: Point, rounds: int, log: Log, console: Console) -> None:
    subject.picture(replace(point.call, steps=min(2, point.call.steps)))  # warms up
    for round_ in range(rounds):
        if not _has(log, point, round_):
            found = subject.picture(point.call)
            log.add({"curve": point.curve, "at": point.at, "round": round_, "cpu": found["cpu"], "peak_mb": found["peak_mb"]})
            console.print(f"{point.curve} {point.at}, round {round_ + 1}: {found['cpu']:.2f} CPU s", highlight=False)


def _has(log: Log, point: Point, round_: int) -> bool:
    return any((one["curve"], one["at"], one["round"]) == (point.curve, point.at, round_) for one in log.samples)


def _rows(points: Sequence[Point], log: Log) -> Iterator[dict[str, Any]]:
    """Medians of each point, and its time as a ratio to that of the first of its curve."""
    first: dict[str, float] = {}
    for point in points:
        own = [one for one in log.samples if (one["curve"], one["at"]) == (point.curve, point.at)]
        cpu = statistics.median(one["cpu"] for one in own)
        first.setdefault(point.curve, cpu)
        yield {
            "curve": point.curve, "at": point.at, "cpu": round(cpu, 3), "low": round(min(one["cpu"] for one in own), 3),
            "high": round(max(one["cpu"] for one in own), 3), "ratio": round(cpu / first[point.curve], 3),
            "peak_mb": round(max(one["peak_mb"] or 0 for one in own)),
        }  # fmt: skip


def _plot(rows: Sequence[dict[str, Any]], path: Path, title: str) -> None:
    """A panel for each curve: CPU seconds in blue, the peak of memory in red."""
    from matplotlib.figure import Figure

    curves = list(dict.fromkeys(row["curve"] for row in rows))
    figure = Figure(figsize=(3.2 * len(curves), 3.4), layout="constrained")
    for axis, curve in zip(figure.subplots(1, len(curves), squeeze=False)[0], curves, strict=True):
        own = [row for row in rows if row["curve"] == curve]
        at = [row["at"] if curve == "partition" else int(row["at"]) for row in own]
        spread = [[row["cpu"] - row["low"] for row in own], [row["high"] - row["cpu"] for row in own]]
        axis.errorbar(at, [row["cpu"] for row in own], spread, marker="o", color="#2f6690", capsize=3)
        axis.set_ylim(0, 1.15 * max(row["high"] for row in own))
        axis.set_xlabel({"size": "side, pixels", "pictures": "pictures of a call", "N": "N of deepcache:N"}.get(curve, curve))
        axis.set_ylabel("CPU seconds of a call", color="#2f6690")
        memory = axis.twinx()
        memory.plot(at, [row["peak_mb"] / 1000 for row in own], marker="s", linestyle=":", color="#c8553d")
        memory.set_ylim(0, 1.3 * max(row["peak_mb"] for row in own) / 1000)
        memory.set_ylabel("peak of memory, GB", color="#c8553d")
        axis.grid(alpha=0.3)
    figure.suptitle(title, fontsize=9)
    with atomic_file(path) as temporary:
        figure.savefig(temporary, dpi=110)


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write. Raises UserError where --work holds a run with other settings."""
    options = _options(arguments)
    need("matplotlib", "the plot")
    points, console = points_of(options), Console(stderr=True)
    settings = {name: value for name, value in vars(options).items() if name not in {"work", "out"}}
    options.work.mkdir(parents=True, exist_ok=True)
    try:
        log = Log(options.work / "samples.jsonl", settings | {"points": [asdict(point) for point in points]}, resume=True)
    except ValueError as error:
        raise UserError(f"{options.work} holds a run with other settings; remove it, or choose another --work") from error
    _measure(options, points, log, console)
    rows = list(_rows(points, log))
    table = Table(*_COLUMNS)
    for row in rows:
        table.add_row(*(str(row[name]) for name in ("curve", "at", "cpu", "ratio", "peak_mb")))
    Console(width=80).print(table)
    write_results(options.out, {"settings": settings, "rows": rows}, indent=1)
    _plot(rows, options.out.with_suffix(".png"), f"{options.source}, {options.engine}, one thread")


if __name__ == "__main__":
    run_command(main)
