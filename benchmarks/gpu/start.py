"""How long a process takes from its start to its first pictures: what a second start finds compiled is not compiled again."""

import json
import os
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path

from engines.support.cli import Parser, run_command

__all__ = ["main", "start_process"]


def main(arguments: Sequence[str]) -> None:
    """Load a bundle, make two pictures, and print the seconds of each as a line of JSON."""
    parser = Parser(prog="python -m benchmarks.gpu.start", description=__doc__)
    parser.add_argument("bundle", type=Path)
    parser.add_argument("--engine", required=True)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--plan", default="full")
    parser.add_argument("--steps", type=int, default=20)
    options = parser.parse_args(arguments)
    marks = [0.0]

    def mark() -> None:
        marks.append(_seconds_of_process())

    import torch

    from benchmarks.gpu.card import engine_named
    from benchmarks.gpu.plan_runs import PROMPT
    from engines import Bundle
    from runtime import Pipeline

    mark()
    pipeline = Pipeline(Bundle.open(options.bundle), engine_named(options.engine, torch.device(options.device)))
    mark()
    for _ in range(2):
        pipeline.generate(PROMPT, steps=options.steps, seed=1, plan=options.plan)
        mark()
    names = "import_seconds", "load_seconds", "first_seconds", "second_seconds"
    print(json.dumps({name: round(b - a, 3) for name, a, b in zip(names, marks[:-1], marks[1:], strict=True)}))


def start_process(bundle: Path, engine: str, device: str, steps: int) -> Mapping[str, float]:
    """The seconds that a new process prints; raises RuntimeError with the end of what it says where it fails."""
    command = [sys.executable, "-m", "benchmarks.gpu.start", str(bundle), "--engine", engine, "--device", device]
    done = subprocess.run([*command, "--steps", str(steps)], capture_output=True, text=True, timeout=300, check=False)
    if done.returncode:
        raise RuntimeError(done.stderr[-2000:])
    seconds: Mapping[str, float] = json.loads(done.stdout.splitlines()[-1])
    return seconds


def _seconds_of_process() -> float:
    """Since this process was started (Linux)."""
    ticks = int(Path("/proc/self/stat").read_text().rsplit(")", 1)[1].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    run_command(main)
