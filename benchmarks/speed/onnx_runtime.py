"""`python -m benchmarks.speed.onnx_runtime`: ONNX Runtime's settings on the CPU, at the size of Stable Diffusion 1.5.

For each setting of attention, memory and threads, a process of its own loads the UNet of ``benchmarks.speed.partition`` as a
chain of segments and runs steps; the most memory it held is read; then it loads the whole UNet in one ONNX file too, and both
take turns.
Processes of all settings take turns as well. Writes a JSON file and prints a table.
"""

import argparse
import json
import os
import resource
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Literal

import onnxruntime
from rich.console import Console
from rich.progress import track
from rich.table import Table

from benchmarks.machine import results_file, write_results
from benchmarks.speed.full_size import random_inputs, spread, take_turns
from benchmarks.speed.partition import PLAN, make_bundles
from engines import Bundle
from engines.bundle.names import NOISE, SAMPLE, TEXT, TIMESTEP
from engines.ort.engine import OnnxRuntime
from engines.support.cli import run_command
from runtime import LoadedBundle
from tuning.ranking.timing import clock

__all__ = ["SETTINGS", "Setting", "main"]


@dataclass(frozen=True)
class Setting:
    """How segments are loaded: as ``OnnxRuntime`` does it, but for what is named here."""

    fused: bool = True
    """Attention as one operator."""
    arena: Literal["none", "session", "shared"] = "shared"
    patterns: bool = False
    """Memory for a whole run in one piece, as the last run with the same shapes needed it."""
    pool: Literal["session", "shared"] = "session"
    """Threads of each session, or of the process."""
    spinning: bool = False
    """Idle threads look for work instead of sleeping."""
    threads: int = 1


SETTINGS = {
    "as traced, no arena": Setting(fused=False, arena="none", patterns=True),
    "fused, no arena": Setting(arena="none", patterns=True),
    "fused, an arena per session": Setting(arena="session", patterns=True),
    "fused, shared arena, patterns": Setting(patterns=True),
    "fused, shared arena": Setting(),
    "the same, 2 threads": Setting(threads=2),
    "the same, spinning": Setting(threads=2, spinning=True),
    "the same, one pool": Setting(threads=2, pool="shared"),
}
"""The fifth is what ``OnnxRuntime`` does."""


class _Engine(OnnxRuntime):
    def __init__(self, setting: Setting) -> None:
        if setting.pool == "shared":  # before anything else is asked of it
            onnxruntime.set_global_thread_pool_sizes(setting.threads, 1)
        super().__init__(setting.threads, "cpu")
        onnxruntime.set_default_logger_severity(3)  # it warns of options that are set again
        self._setting = setting

    def _options(self) -> Any:
        options, setting = super()._options(), self._setting
        options.enable_cpu_mem_arena = setting.arena != "none"
        options.enable_mem_pattern = setting.patterns
        options.use_per_session_threads = setting.pool == "session"
        options.add_session_config_entry("session.use_env_allocators", str(int(setting.arena == "shared")))
        options.add_session_config_entry("session.intra_op.allow_spinning", str(int(setting.spinning)))
        return options


def _without_copies(bundle: Bundle) -> Bundle:
    segments = tuple(segment.model_copy(update={"engines": {}}) for segment in bundle.manifest.segments)
    return replace(bundle, manifest=bundle.manifest.model_copy(update={"segments": segments}))


def _measure(setting: Setting, bundles: tuple[Bundle, Bundle], side: int, rounds: int, whole: bool) -> dict[str, Any]:
    """Seconds of each step, and gigabytes of the process that only has the chain, with its weights."""
    fitted, pieces = bundles if setting.fused else (_without_copies(bundles[0]), _without_copies(bundles[1]))
    engine = _Engine(setting)
    given = random_inputs((SAMPLE, TIMESTEP, TEXT), fitted.manifest.features, {"batch": 2, "height": side, "width": side})
    network = LoadedBundle.load(fitted, engine)
    cases = {"chain": lambda: network.compute(NOISE, given)}
    seconds = take_turns(cases, rounds)
    held = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024 / 1e9
    if whole:
        runner = engine.load(pieces, pieces.manifest.segment("whole"))
        seconds = take_turns(cases | {"whole": lambda: runner.run(given)[NOISE]}, rounds)
    return {"seconds": seconds, "gigabytes": held, "clock": clock().__name__}


def _in_a_process(name: str, side: int, rounds: int, whole: bool, options: argparse.Namespace) -> dict[str, Any]:
    command = [
        sys.executable,
        "-m",
        "benchmarks.speed.onnx_runtime",
        "--only",
        name,
        "--side",
        str(side),
        "--rounds",
        str(rounds),
    ]
    command += ["--source", options.source, "--work", str(options.work), *(["--whole"] if whole else [])]
    environment = os.environ | {"OMP_NUM_THREADS": str(SETTINGS[name].threads)}
    done = subprocess.run(command, env=environment, stdout=subprocess.PIPE, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


def _figures(runs: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Of one setting, over all its processes."""
    seconds = {case: [value for run in runs for value in run["seconds"][case]] for case in runs[0]["seconds"]}
    figures: dict[str, Any] = {
        "clock": runs[0]["clock"], "gigabytes": round(max(run["gigabytes"] for run in runs), 2),
        "seconds": {case: spread(values) for case, values in seconds.items()},
    }  # fmt: skip
    if "whole" in seconds:
        figures["chain / whole"] = spread([a / b for a, b in zip(seconds["chain"], seconds["whole"], strict=True)])
    return figures


def main(arguments: Sequence[str]) -> None:
    """Measure every setting at 32x32 latents, and those with one thread at 64x64 without the whole file."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks.speed.onnx_runtime", description=__doc__)
    parser.add_argument("--source", default="random:sd15", help="a UNet's configuration (default: %(default)s)")
    parser.add_argument("--side", type=int, default=32, help="side of the latents; twice that too (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=3, help="rounds of each process (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="processes of each setting (default: %(default)s)")
    parser.add_argument("--work", type=Path, default=Path("runs/partition"), help="as for benchmarks.speed.partition")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/onnxruntime.json", help="default: %(default)s")
    parser.add_argument("--only", choices=SETTINGS, help=argparse.SUPPRESS)  # what the processes are started with
    parser.add_argument("--whole", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args(arguments)
    bundles = make_bundles(options.source, options.side, options.work / Path(options.source.removeprefix("random:")).stem)
    if options.only:
        print(json.dumps(_measure(SETTINGS[options.only], bundles, options.side, options.rounds, options.whole)))
        return
    small: dict[str, list[dict[str, Any]]] = {name: [] for name in SETTINGS}
    for name in track([*SETTINGS] * options.processes, "settings"):
        small[name].append(_in_a_process(name, options.side, options.rounds, True, options))
    single = [name for name, setting in SETTINGS.items() if setting.threads == 1]
    large = {name: [_in_a_process(name, 2 * options.side, 2, False, options)] for name in track(single, "large")}
    figures = {
        f"{side}x{side}": {name: _figures(runs) for name, runs in group.items()}
        for side, group in ((options.side, small), (2 * options.side, large))
    }
    settings = {
        "source": options.source, "rows": 2, "dtype": "float32", "plan": PLAN, "rounds": options.rounds,
        "processes": options.processes, "settings": {name: asdict(setting) for name, setting in SETTINGS.items()},
    }  # fmt: skip
    write_results(options.out, {"settings": settings, "latents": figures})
    _show(figures, options)


def _show(figures: dict[str, Any], options: argparse.Namespace) -> None:
    console = Console(highlight=False)
    for latents, group in figures.items():
        table = Table("", "chain, s", "chain / whole", "low", "high", "memory, GB", title=f"{options.source}, latents {latents}")
        for name, values in group.items():
            ratio = values.get("chain / whole")
            shares = [f"{ratio[key]:.3f}" for key in ("median", "low", "high")] if ratio else [""] * 3
            table.add_row(name, f"{values['seconds']['chain']['median']:.2f}", *shares, f"{values['gigabytes']:.2f}")
        console.print(table)
    console.print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
