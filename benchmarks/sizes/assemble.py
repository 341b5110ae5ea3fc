"""`python -m benchmarks.sizes.assemble`: what assembling a UNet of Stable Diffusion's full size takes, by each recipe.

Each line is `python -m tuning assemble` in a process of its own, with its seconds and its peak of resident memory. The weights
are random: nothing here depends on what they are.
"""

import json
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import results_file, write_results
from benchmarks.sizes.process import run
from engines.errors import UserError
from engines.support.cli import Parser, run_command
from tuning.checkpoints.folder import ASSEMBLY_NOTE


def measure(source: str, recipe: str, work: Path) -> dict[str, Any]:
    """Assemble into a folder under ``work``, which goes again. Raises UserError where the command fails."""
    out = work / Path(recipe).stem
    try:
        found = run(["tuning", "assemble", "--source", source, "--recipe", recipe, "--out", str(out)])
        if found["exit"]:
            raise UserError(f"assembling {source} by {recipe} ended with an error, which stands above; nothing is written")
        return {"recipe": recipe, "parameters": json.loads((out / ASSEMBLY_NOTE).read_text())["parameters"]["after"], **found}
    finally:
        shutil.rmtree(out, ignore_errors=True)


def main(arguments: Sequence[str]) -> None:
    """Measure every recipe, print and write what was found."""
    parser = Parser(prog="python -m benchmarks.sizes.assemble", description=__doc__)
    parser.add_argument("--source", default="random:sd15", help="(default: %(default)s)")
    parser.add_argument(
        "--recipes", nargs="+", default=["bk-base", "bk-small", "bk-tiny", "assembled"], help="(default: %(default)s)"
    )
    parser.add_argument("--work", type=Path, default=Path("runs/assemble"), help="where UNets go (default: %(default)s)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/assemble.json", help="(default: %(default)s)")
    options = parser.parse_args(arguments)
    rows = [measure(options.source, recipe, options.work) for recipe in options.recipes]
    write_results(options.out, {"source": options.source, "rows": rows}, indent=1)
    show(rows)


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("recipe", "parameters", "seconds", "processor s", "peak MB")
    for row in rows:
        table.add_row(
            row["recipe"], f"{row['parameters'] / 1e6:.0f} M", *(str(row[n]) for n in ("seconds", "processor_seconds", "peak_mb"))
        )
    Console(width=110).print(table)


if __name__ == "__main__":
    run_command(main)
