"""`python -m benchmarks.full_build`: bundles of Stable Diffusion's full size, built on this machine with no GPU.

Each line is a command as a user would give it, in a process of its own, with its seconds and its peak of resident memory: a build
with TensorRT-RTX engines ahead of time (and what its phases need), the same again with nothing changed, one that is killed in the
middle (SIGKILL) and gone on with, and `verify` at one small size. The weights are random: nothing here depends on what they are.
"""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import IO, Any

from rich.console import Console
from rich.table import Table

from benchmarks.machine import machine
from engines import Bundle
from engines.command import Parser, run_command
from engines.errors import UserError

SOURCES = ("random:sd15", "random:sd21", "random:bk-tiny")
VERIFIED = "256x256"
"""Pictures of 32 x 32 latents."""


def run(arguments: Sequence[str], stop: Callable[[float], bool] = lambda seconds: False) -> dict[str, Any]:
    """Run ``python -m`` with these arguments; its seconds, peak memory in MB and exit code. SIGKILL when ``stop`` says so.

    A build also gets ``phases``: the peak of memory in each phase of each segment, the largest first.
    """
    started = time.perf_counter()
    peak, phases = 0, dict[str, int]()
    with TemporaryFile() as output:
        process = subprocess.Popen([sys.executable, "-m", *arguments], stdout=output)
        killed = False
        while True:
            done, status, usage = os.wait4(process.pid, os.WNOHANG)
            seconds = time.perf_counter() - started
            if done:
                break
            if not killed and stop(seconds):
                process.send_signal(signal.SIGKILL)
                killed = True
            phase, memory = _phase(_printed(output)), _memory(process.pid)
            peak = max(peak, memory.get("VmHWM", 0))
            phases[phase] = max(phases.get(phase, 0), memory.get("VmRSS", 0))
            time.sleep(0.05)
        print(*_printed(output)[-3:], sep="\n")
    found = {
        "command": " ".join(["python -m", *arguments]),
        "seconds": round(seconds, 1),
        "processor_seconds": round(usage.ru_utime + usage.ru_stime, 1),
        "peak_mb": peak,
        "exit": os.waitstatus_to_exitcode(status),
    }
    if "--json" in arguments:
        found["phases"] = dict(sorted(phases.items(), key=lambda item: -item[1]))
    return found


def _printed(output: IO[bytes]) -> list[str]:
    """The lines printed so far; the place where the process goes on writing stays."""
    return os.pread(output.fileno(), 1 << 20, 0).decode().splitlines()


def _phase(lines: Sequence[str]) -> str:
    """What a build with ``--json`` last said that it does."""
    for line in reversed(lines):
        try:
            step = json.loads(line)
            return f"{step['phase']} {step['segment']}".strip()
        except (ValueError, TypeError, KeyError):  # half a line, or none of a build's steps
            continue
    return "starting"


def _memory(process: int) -> dict[str, int]:
    """Resident memory in MB: now (``VmRSS``) and at its peak (``VmHWM``). Its own: ``rusage`` has its parent's too."""
    try:
        lines = [line.split() for line in Path(f"/proc/{process}/status").read_text().splitlines()]
    except OSError:  # it has just ended
        return {}
    return {line[0].rstrip(":"): round(int(line[1]) / 1024) for line in lines if line and line[0] in ("VmRSS:", "VmHWM:")}


def measure(source: str, engine: str, folder: Path) -> list[dict[str, Any]]:
    """Build, build again, build with a kill in the middle, and verify."""
    out = folder / "bundle"
    build = ["exporter", "build", "--source", source, "--variant", "original", "--precision", "fp16", "--engine", engine]
    build += ["--out", str(out), "--json"]
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
    rows.append({"what": "gone on with", **run(build)})
    Bundle.open(out).check()
    shutil.rmtree(out)
    return rows


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write what was found."""
    parser = Parser(prog="python -m benchmarks.full_build", description=__doc__)
    parser.add_argument("--source", action="append", help=f"may be repeated (default: {', '.join(SOURCES)})")
    parser.add_argument("--engine", default="tensorrt-rtx", help="compiled for (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/full-build"), help="where bundles go (default: %(default)s)")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/full_build.json"))
    options = parser.parse_args(arguments)
    found = {}
    for source in options.source or SOURCES:
        folder = options.work / source.replace(":", "-").replace("/", "-")
        shutil.rmtree(folder, ignore_errors=True)
        found[source] = measure(source, options.engine, folder)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps({"engine": options.engine, "sources": found, **machine()}, indent=1) + "\n")
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
