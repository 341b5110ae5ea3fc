"""`python -m benchmarks.speed.start`: the CPU seconds of starts, each command in a process of its own, taking turns.

`--help` of each command; the first picture of an embedded model, and diffusers' own; with ``--full``, a bundle of full size
loaded, with and without the graphs that earlier starts kept. With ``--before``, an older checkout's folder, its figures stand
beside these. One thread; medians. Writes a JSON file and prints a table.
"""

import argparse
import os
import statistics
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryDirectory, TemporaryFile

from rich.console import Console
from rich.table import Table

from benchmarks.arguments import embedded_source
from benchmarks.machine import results_file, write_results
from engines import Bundle
from engines.support.cli import run_command
from runtime.embedded import EXAMPLES
from tuning.checkpoints.find_source import EMBEDDED

__all__ = ["main"]

_ROOT = Path(__file__).resolve().parents[2]
_DIFFUSERS = """
import torch
from diffusers import DPMSolverMultistepScheduler, StableDiffusionPipeline
pipeline = StableDiffusionPipeline.from_pretrained({model!r}, safety_checker=None, torch_dtype=torch.float32)
pipeline.set_progress_bar_config(disable=True)
pipeline.scheduler = DPMSolverMultistepScheduler.from_config(pipeline.scheduler.config)
pipeline({prompt!r}, num_inference_steps=8, guidance_scale=3.0).images[0].save({picture!r})
"""
_LOADED = "import warnings; warnings.simplefilter('ignore'); import runtime; runtime.load({!r})"
_UNKEPT = {"UNET_HEIRLOOM_GRAPHS_GIB": "0"}


def main(arguments: Sequence[str]) -> None:
    """Run the benchmark; raises UserError where the bundle is missing or of another model."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--bundle", type=Path, required=True, help="bundle of an embedded model")
    parser.add_argument("--full", type=Path, help="a bundle of full size")
    parser.add_argument("--before", type=Path, help="an older checkout's folder")
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--out", type=results_file, default="benchmarks/results/start.json")
    options = parser.parse_args(arguments)
    with TemporaryDirectory() as folder:
        subjects = _subjects(options.bundle.resolve(), options.full and options.full.resolve(), f"{folder}/picture.png")
        if options.before:
            ours = {name: words for name, (words, more, directory) in subjects.items() if directory and not more}
            subjects |= {f"{name}, before": (words, {}, options.before) for name, words in ours.items()}
        for words, environment, directory in subjects.values():  # caches are filled
            _cpu_seconds(words, environment, directory)
        found: dict[str, list[float]] = {name: [] for name in subjects}
        for _ in range(options.rounds):
            for name, (words, environment, directory) in subjects.items():
                found[name].append(_cpu_seconds(words, environment, directory))
    write_results(options.out, {"cpu_seconds": found})
    _show({name: statistics.median(seconds) for name, seconds in found.items()})


Subject = tuple[list[str], Mapping[str, str], Path | None]
"""The arguments of Python, more of the environment, and the checkout; None for what is not ours."""


def _subjects(bundle: Path, full: Path | None, picture: str) -> dict[str, Subject]:
    found: dict[str, Subject] = {
        f"{name} --help": (["-m", name, "--help"], {}, _ROOT) for name in ("runtime", "exporter", "tuning")
    }
    source = embedded_source(Bundle.open(bundle))
    prompt = EXAMPLES[source]
    words = ["-m", "runtime", prompt, "--bundle", str(bundle), "--steps", "8", "-o", picture]
    found["first picture"] = (words, {}, _ROOT)
    theirs = _DIFFUSERS.format(model=str(EMBEDDED[source]), prompt=prompt, picture=picture)
    found["first picture, diffusers"] = (["-c", theirs], {}, None)
    if full is not None:
        found["full size, loaded"] = (["-c", _LOADED.format(str(full))], {}, _ROOT)
        found["full size, loaded, no graph kept"] = (["-c", _LOADED.format(str(full))], _UNKEPT, _ROOT)
    return found


def _cpu_seconds(words: Sequence[str], environment: Mapping[str, str], directory: Path | None) -> float:
    """CPU seconds of a process, user's and system's."""
    with TemporaryFile() as said:
        process = os.posix_spawn(
            "/usr/bin/env",
            ["env", "-C", str(directory or _ROOT), sys.executable, *words],
            {**os.environ, "OMP_NUM_THREADS": "1", **environment},
            file_actions=[
                (os.POSIX_SPAWN_OPEN, 1, os.devnull, os.O_WRONLY, 0),
                (os.POSIX_SPAWN_DUP2, said.fileno(), 2),
            ],
        )
        _, status, usage = os.wait4(process, 0)
        if status:
            said.seek(0)
            last = said.read().decode(errors="replace").strip().rpartition("\n")[2]
            raise RuntimeError(f"{' '.join(words)} failed with status {os.waitstatus_to_exitcode(status)}: {last}")
    return usage.ru_utime + usage.ru_stime


def _show(medians: Mapping[str, float]) -> None:
    table = Table("start", "CPU s", "before")
    for name, seconds in medians.items():
        if not name.endswith(", before"):
            before = medians.get(f"{name}, before")
            table.add_row(name, f"{seconds:.2f}", "" if before is None else f"{before:.2f}")
    Console().print(table)


if __name__ == "__main__":
    run_command(main)
