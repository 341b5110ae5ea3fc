"""A picture's time from prompt to pixels: every variant, plan and engine of this project, and beside them what people would use
otherwise, with the same weights, scheduler, steps and seeds, in one run.

    python benchmarks/run_trt.py --quick                         two minutes on two cores, the embedded model
    python benchmarks/run_trt.py --source FILE.safetensors --device cuda --engine tensorrt-rtx
    python benchmarks/run_trt.py --source random:sd15 --dry-run  what it would do, and how long that would take

Every row is a process of its own beside that of the base row, `original full`; they take turns, so that what slows the machine
down slows both. The first round warms up. Results go to --out as JSON, CSV, Markdown and a plot, in files named after the
card or the processor. A run that was stopped keeps what it has, and --resume continues it.
"""

import argparse
import re
import sys
from collections.abc import Sequence
from pathlib import Path

if __package__ in {None, ""}:  # as a script: its folder is on the path, and the repository is not
    sys.path[0] = str(Path(__file__).resolve().parents[1])

from rich.console import Console

from benchmarks.arguments import check_buildable, check_counts
from benchmarks.end_to_end.checks import check_engines_named, check_plans, check_targets, names
from benchmarks.end_to_end.rows import Settings, chosen_peers, rows_of
from benchmarks.peers import PEERS
from engines.errors import UserError
from engines.support.cli import Parser, parse_size, quiet_libraries, run_command
from engines.support.files import check_writable
from runtime.embedded import DEFAULT

__all__ = ["main"]

OUT = Path("benchmarks/results")
_STEPS = 20
QUICK = {
    "variants": ("original", "assembled"), "plans": ("full", "deepcache:3"), "engines": ("onnxruntime",),
    "peers": "diffusers,deepcache", "steps": 10, "rounds": 3,
}  # fmt: skip


def _parser() -> Parser:
    parser = Parser(prog="benchmarks/run_trt.py", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--source", default=DEFAULT, help="emoji, mini, random:sd15, a diffusers folder, a file, a hub id (default: %(default)s)")
    add("--variants", type=names, default=("original", "assembled"), help="default: original,assembled")
    add("--plans", type=names, default=("full", "block:3", "layer:3", "unit:3", "encoder:faster", "deepcache:3"),
        help="default: full,block:3,layer:3,unit:3,encoder:faster,deepcache:3")  # fmt: skip
    add("--engine", "--engines", dest="engines", type=names, help="default: onnxruntime; on a GPU torch,tensorrt-rtx")
    add("--device", choices=["cpu", "cuda"], help="default: cuda where PyTorch finds one")
    add("--precision", choices=["fp32", "fp16"], help="precision of the bundles (default: fp16 on a GPU, fp32 elsewhere)")
    add("--peers", default="all", help=f"all, none, or of: {', '.join(PEERS)} (default: all)")
    add("--size", type=parse_size, help="HEIGHTxWIDTH in pixels (default: the model's own)")
    add("--steps", type=int, default=_STEPS, help="default: %(default)s")
    add("--batch", type=int, default=1, help="pictures at a time (default: %(default)s)")
    add("--rounds", type=int, default=5, help="rounds that count, after one that warms up (default: %(default)s)")
    add("--threads", type=int, default=1, help="threads of every process (default: %(default)s)")
    add("--prompt", help="default: one that suits the source")
    add("--quick", action="store_true", help="few rows of the embedded model and few rounds, unless you name others: two minutes")
    add("--dry-run", action="store_true", help="print rows, sizes and expected minutes; nothing is built or measured")
    add("--build-only", action="store_true", help="build the bundles and stop; with --targets, for a card of another machine")
    add("--targets", type=names, default=(), help="compute capabilities for tensorrt-rtx, such as sm89; implies --device cuda")
    add("--plot", type=Path, metavar="FILE.json", help="draw the plot of a file of results again; nothing is measured")
    add("--resume", action="store_true", help="resume a run of the same settings that was stopped")
    add("--work", type=Path, default=Path("runs/run_trt"), help="bundles, environments, logs (default: %(default)s)")
    add("--out", type=Path, default=OUT, help="the results (default: %(default)s)")
    return parser


def _settings(options: argparse.Namespace) -> Settings:
    """The options, checked. Raises UserError; nothing heavy is imported but torch, where the device must be known."""
    device = options.device or ("cuda" if options.targets else _found_device())
    default = ("onnxruntime",) if device == "cpu" else ("tensorrt-rtx",) if options.targets else ("torch", "tensorrt-rtx")
    engines = options.engines or default
    check_engines_named(engines)
    check_targets(options.targets, engines, device)
    if device == "cuda" and not options.build_only and not options.dry_run:
        _require_cuda()
    check_counts(options, "steps", "batch", "rounds", "threads")
    variants = ("original", *(name for name in options.variants if name != "original"))
    plans = ("full", *(str(Path(plan).resolve()) if plan.endswith(".json") else plan for plan in options.plans if plan != "full"))
    check_plans(plans, variants)
    return Settings(
        source=options.source,
        variants=variants,
        plans=plans,
        engines=engines,
        peers=chosen_peers(options.peers),
        device=device,
        precision=options.precision or ("fp16" if device == "cuda" else "fp32"),
        size=options.size,
        steps=options.steps,
        batch=options.batch,
        rounds=options.rounds,
        threads=options.threads,
        work=options.work,
        prompt=options.prompt,
        targets=options.targets,
    )


def _found_device() -> str:
    import torch

    return "cuda" if torch.cuda.is_available() else "cpu"


def _require_cuda() -> None:
    from engines.cuda.gpu import missing_gpu

    if missing := missing_gpu():
        raise UserError(
            f"--device cuda needs an NVIDIA GPU, and {missing}; here you can measure with --device cpu, see with --dry-run what "
            "would be done, or build with --build-only --engine tensorrt-rtx --targets sm89 and take the bundles to a card"
        )


def _file_name(settings: Settings, quick: bool = False) -> str:
    """The results' name: card or processor, source, size, precision, pictures at a time, threads, and what is not usual."""
    if settings.device == "cuda":
        import torch

        machine = torch.cuda.get_device_name()
    else:
        from benchmarks.machine import machine as described

        machine = str(described()["machine"]["processor"])  # type: ignore[index]
    size = "x".join(map(str, settings.size)) if settings.size else "own"
    text = f"run_trt-{settings.device}-{machine}-{Path(settings.source).name}-{size}-{settings.precision}-b{settings.batch}"
    text += f"-t{settings.threads}"
    text += "-quick" if quick else f"-{settings.steps}-steps" if settings.steps != _STEPS else ""
    return re.sub(r"[^\w.]+", "-", text.lower()).strip("-")


def main(arguments: Sequence[str]) -> None:
    """Run the command. Raises UserError for a user's mistake; exits with 1 where a row's output is not what it has to be."""
    parser = _parser()
    options = parser.parse_args(arguments)
    if options.quick:
        parser.set_defaults(**QUICK)
        options = parser.parse_args(arguments)
    if options.plot:
        from benchmarks.end_to_end.plots import plot_again

        print(f"written: {plot_again(options.plot)}")
        return
    settings, console = _settings(options), Console()
    quiet_libraries()
    check_buildable(settings.source, settings.variants, settings.size)
    from benchmarks.end_to_end import forecast, run

    if options.dry_run:
        forecast.show(settings, rows_of(settings, {}), console)
        return
    if options.build_only:
        for variant in settings.variants:
            run.build(settings, variant, console)
        return
    name = _file_name(settings, options.quick)
    check_writable(options.out)
    if not run.measured(settings, name, options.out, console, resume=options.resume):
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
