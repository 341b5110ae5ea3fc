"""The options of the GPU check."""

import argparse
import re
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from benchmarks.arguments import check_buildable, check_counts
from benchmarks.gpu.stages import PARTS, SPEED_SOURCE, STAGES, Stage
from engines import ENGINES
from engines.errors import UserError
from engines.support.cli import Parser, parse_size
from exporter.options import PRECISIONS
from runtime.embedded import DEFAULT

__all__ = ["BUDGET", "parse"]

BUDGET = 10.0
"""Minutes, where none are named."""


def parse(arguments: Sequence[str], description: str) -> argparse.Namespace:
    """The options of a command line, and the stages that they choose.

    Raises:
        UserError: a word or a plan is none of those allowed, a number is too small, the words choose nothing, or a source,
            its variant or the size cannot be had.
    """
    options = _parser(description).parse_args(arguments)
    options.targets = [target for target in options.targets.split(",") if target]
    for target in options.targets:
        if not re.fullmatch(r"sm\d{2,3}", target):
            raise UserError(f"--targets: {target!r} is no compute capability; write such as sm89, or several with commas")
    words = {**STAGES, **PARTS}
    for name, allowed in (("engines", ENGINES), ("precision", PRECISIONS), ("only", words), ("plans", None)):
        chosen = getattr(options, name).split(",")
        for one in chosen:
            if allowed is not None and one not in allowed:
                raise UserError(f"--{name}: unknown {one!r}; choose from: {', '.join(allowed)}")
        setattr(options, name, chosen)
    _check_plans(options.plans)
    check_counts(options, "steps", "rounds", "jobs")
    if not options.budget >= 0:
        raise UserError(f"--budget: {options.budget:g} is no number of minutes; give 0 or more, or inf for no end")
    options.stages = _stages(options.only)
    if not options.stages:
        chosen = ",".join(options.only)
        raise UserError(f"--only {chosen}: these stages measure nothing of the kind; choose from: {', '.join(words)}")
    for source in dict.fromkeys(stage.source(options) for stage in options.stages):
        if source:
            check_buildable(source, [options.variant], options.size)
    return options


def _check_plans(plans: Sequence[str]) -> None:
    from runtime import find_plan  # which --help does not wait for

    for plan in plans:
        find_plan(plan)


def _parser(description: str) -> Parser:
    parser = Parser(prog="python -m benchmarks.gpu.gpu_check", description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the program itself; no graphs")
    parser.add_argument(
        "--source",
        help="as for python -m exporter build, for correctness and for speed "
        f"(default: {DEFAULT} for correctness, {SPEED_SOURCE} for speed)",
    )
    parser.add_argument("--variant", default="original")
    parser.add_argument("--engines", default="torch,tensorrt-rtx,tensorrt,onnxruntime", help="torch comes first: the reference")
    parser.add_argument("--precision", default="fp32,fp16", help="speed is measured in the last (default: %(default)s)")
    parser.add_argument("--plans", default="full,deepcache:3,adaptive:0.2")
    parser.add_argument(
        "--only",
        default=",".join(STAGES),
        metavar="WORDS",
        help=f"stages, of: {', '.join(STAGES)}; and what these measure of engines, of: {', '.join(PARTS)} (default: everything)",
    )
    parser.add_argument(
        "--budget", type=float, metavar="MINUTES", default=BUDGET,
        help="leave out a stage that does not fit what is left, and begin nothing after it; inf: no end (default: %(default)g)",
    )  # fmt: skip
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, in which order and time; needs no GPU")
    parser.add_argument("--granularity", help="largest segment of the bundle (default: as large as the plans allow)")
    parser.add_argument("--targets", default="", help="targets of tensorrt-rtx, as for python -m exporter build")
    parser.add_argument("--jobs", type=int, default=1, help="processes that build side by side")
    parser.add_argument("--size", type=parse_size, help="size of the picture (default: the model's own)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bundles/gpu-check"), help="where bundles are built")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    return parser


def _stages(only: Sequence[str]) -> list[Stage]:
    """The stages that are named, in their order, with the parts that are named; a kind of which none is named is there whole."""
    parts = [part for part in PARTS if part in only]
    named = [stage for stage in STAGES.values() if stage.name in only]
    if not parts:
        return named
    chosen = [
        replace(stage, parts=tuple(part for part in stage.parts if part in parts)) if stage.parts else stage
        for stage in named or STAGES.values()
        if named or stage.parts
    ]
    return [stage for stage in chosen if stage.parts or not STAGES[stage.name].parts]
