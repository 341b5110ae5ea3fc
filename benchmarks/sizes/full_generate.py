"""`python -m benchmarks.sizes.full_generate`: a picture by a UNet of Stable Diffusion's full size on the CPU, in ONNX Runtime.

Builds the bundle, unless it is there, and runs `python -m runtime` in a process of its own at each size: seconds, peak of
resident memory, and the seconds of each kind of step, as the command prints them. The weights are random: the picture is noise.
"""

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import results_file, write_results
from benchmarks.sizes.process import run
from engines.errors import UserError
from engines.support.cli import Parser, run_command


def step_seconds(lines: Sequence[str]) -> dict[str, Any]:
    """Of each kind of step that `python -m runtime --json` printed: how many there were, and the median of their seconds."""
    kinds = json.loads(lines[-1])["kinds"] if lines else []
    return {"steps": {kind["kind"]: {"count": len(kind["steps"]), "seconds": kind["milliseconds"] / 1000} for kind in kinds}}


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write what was found."""
    parser = Parser(prog="python -m benchmarks.sizes.full_generate", description=__doc__)
    parser.add_argument("--source", default="random:sd15", help="(default: %(default)s)")
    parser.add_argument("--precision", default="fp32", help="(default: %(default)s)")
    parser.add_argument("--sizes", default="256x256,512x512", help="(default: %(default)s)")
    parser.add_argument("--plan", default="deepcache:3", help="(default: %(default)s)")
    parser.add_argument("--steps", default="10", help="(default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/full-generate"), help="where the bundle and pictures go")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/full_generate.json")
    options = parser.parse_args(arguments)
    bundle = options.work / f"{options.source}-{options.precision}".replace(":", "-").replace("/", "-")
    made = [
        "--source",
        options.source,
        "--variant",
        "original",
        "--precision",
        options.precision,
        "--out",
        str(bundle),
        "--force",
    ]
    build = run(["exporter", "build", *made])
    rows = []
    for size in options.sizes.split(","):
        given = ["--bundle", str(bundle), "--size", size, "--plan", options.plan, "--steps", options.steps, "--json"]
        rows.append({"size": size, **run(["runtime", "a lighthouse", *given, "-o", f"{bundle}-{size}.png"], read=step_seconds)})
    if any(row["exit"] for row in (build, *rows)):
        raise UserError("a command ended with an error, which stands above; nothing is written")
    write_results(options.out, {"rows": rows}, indent=1)
    show(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("size", "seconds", "processor s", "peak MB", "key steps", "s each", "inherit steps", "s each")
    for row in rows:
        kinds = [str(row["steps"].get(kind, {}).get(name, "")) for kind in ("key", "inherit") for name in ("count", "seconds")]
        table.add_row(row["size"], str(row["seconds"]), str(row["processor_seconds"]), str(row["peak_mb"]), *kinds)
    Console(width=110).print(table)


if __name__ == "__main__":
    run_command(main)
