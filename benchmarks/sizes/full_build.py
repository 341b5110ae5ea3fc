"""`python -m benchmarks.sizes.full_build`: bundles of Stable Diffusion's full size, built on this machine with no GPU.

Each line is a command as a user would give it, in a process of its own, with its seconds and its peak of resident memory: a build
with TensorRT-RTX engines ahead of time (and what its phases need), the same again with nothing changed, one that is killed in the
middle (SIGKILL) and resumed, and `verify` at one small size. The weights are random: nothing here depends on what they are.
`file of random:sd15` is those of that source in one .safetensors file in half precision, `folder of random:sd15` as diffusers
writes them: both are made for the measurement and removed after it.
"""

import re
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import results_file, write_results
from benchmarks.sizes.process import run
from benchmarks.sizes.written_sources import WRITERS
from engines import Bundle
from engines.errors import UserError
from engines.support.cli import Parser, run_command
from tuning.checkpoints.find_source import find_source

SOURCES = ("random:sd15", "random:sd21", "random:bk-tiny", "file of random:sd15", "folder of random:sd15")
VERIFIED = "256x256"
"""Pictures of 32 x 32 latents."""


@contextmanager
def written(source: str, folder: Path) -> Iterator[str]:
    """The value for ``--source``; a file or folder of weights is there until the block ends."""
    kind, of, other = source.partition(" of ")
    if not of:
        yield source
        return
    if kind not in WRITERS:
        raise UserError(f"source {source!r}: unknown kind {kind!r}; choose from: {', '.join(WRITERS)}")
    folder.mkdir(parents=True, exist_ok=True)
    with TemporaryDirectory(dir=folder) as parent:
        yield str(WRITERS[kind](find_source(other), Path(parent)))


def measure(source: str, engine: str, folder: Path, config: Path | None = None) -> list[dict[str, Any]]:
    """Build, build again, build with a kill in the middle, and verify."""
    out = folder / "bundle"
    build = ["exporter", "build", "--source", source, "--variant", "original", "--precision", "fp16", "--engine", engine]
    build += ["--out", str(out), "--json", *(["--config", str(config)] if config else [])]
    rows = [{"what": "build", **run(build)}]
    if rows[0]["exit"]:
        raise UserError(f"the build of {source} ended with exit code {rows[0]['exit']}; it says why above")
    bundle = Bundle.open(out)
    sizes = {"onnx_mb": 0, "engines_mb": 0}
    for segment in bundle.manifest.segments:
        sizes["onnx_mb"] += sum(file.bytes for file in segment.onnx)
        sizes["engines_mb"] += sum(file.bytes for compiled in segment.engines.values() for file in compiled.files)
    rows[0] |= {name: round(size / 1e6) for name, size in sizes.items()}
    rows.append({"what": "again, nothing changed", **run(build)})
    rows.append({"what": "verify", **run(["exporter", "verify", str(out), "--sizes", VERIFIED, "--steps", "0"])})
    shutil.rmtree(out)
    half = rows[0]["seconds"] / 2
    rows.append({"what": "killed in the middle", **run(build, lambda seconds: seconds > half)})
    rows.append({"what": "resumed", **run(build)})
    Bundle.open(out).check()
    shutil.rmtree(out)
    return rows


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write what was found."""
    parser = Parser(prog="python -m benchmarks.sizes.full_build", description=__doc__)
    parser.add_argument("--source", action="append", help=f"may be repeated (default: {', '.join(SOURCES)})")
    parser.add_argument("--config", type=Path, help="folder of configurations, for a file that is not SD 1.x/2.x")
    parser.add_argument("--engine", default="tensorrt-rtx", help="compiled for (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/full-build"), help="where bundles go (default: %(default)s)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/full_build.json")
    options = parser.parse_args(arguments)
    found = {}
    for source in options.source or SOURCES:
        folder = options.work / re.sub("[: /]", "-", source)
        shutil.rmtree(folder, ignore_errors=True)
        with written(source, folder) as given:
            found[source] = measure(given, options.engine, folder, options.config)
        write_results(options.out, {"engine": options.engine, "sources": found}, indent=1)
        show(source, found[source])


def show(source: str, rows: Sequence[dict[str, Any]]) -> None:
    """Print the table of one source."""
    table = Table("what", "seconds", "processor s", "peak MB", "exit", "ONNX MB", "engines MB", title=source)
    for row in rows:
        names = ("what", "seconds", "processor_seconds", "peak_mb", "exit", "onnx_mb", "engines_mb")
        table.add_row(*(str(row.get(name, "")) for name in names))
    console = Console(width=130)
    console.print(table)
    console.print("largest phases of the build, MB:", ", ".join(f"{p} {mb}" for p, mb in [*rows[0]["phases"].items()][:3]))


if __name__ == "__main__":
    run_command(main)
