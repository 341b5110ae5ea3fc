"""The options of the GPU check."""

import argparse
from collections.abc import Sequence
from pathlib import Path

from engines import ENGINES
from engines.errors import UserError
from engines.support.cli import Parser, parse_size
from exporter.options import PRECISIONS
from runtime.embedded import DEFAULT

__all__ = ["PARTS", "parse"]

PARTS = {
    "plans": "time, memory and latents of each plan",
    "segments": "each segment against the diffusers model",
    "start": "a second process",
    "baselines": "diffusers itself",
}
"""The parts that ``--only`` chooses from."""


def parse(arguments: Sequence[str], description: str) -> argparse.Namespace:
    """The options of a command line; raises UserError for a word that is none of those allowed."""
    parser = Parser(prog="python -m benchmarks.gpu.gpu_check", description=description)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda", help="cpu: try the program itself; no graphs")
    parser.add_argument("--source", default=DEFAULT, help="as for python -m exporter build (default: %(default)s)")
    parser.add_argument("--variant", default="original")
    parser.add_argument("--engines", default="torch,tensorrt-rtx,tensorrt,onnxruntime", help="torch comes first: the reference")
    parser.add_argument("--precision", default="fp32,fp16")
    parser.add_argument("--plans", default="full,deepcache:3,adaptive:0.2")
    parser.add_argument("--only", default="plans,segments,start,baselines", help="parts, of: %(default)s")
    parser.add_argument("--budget", type=float, metavar="MINUTES", help="begin nothing new after so long")
    parser.add_argument("--dry-run", action="store_true", help="say what would be done, in which order and time; needs no GPU")
    parser.add_argument("--granularity", help="largest segment of the bundle (default: as large as the plans allow)")
    parser.add_argument("--targets", default="", help="targets of tensorrt-rtx, as for python -m exporter build")
    parser.add_argument("--jobs", type=int, default=1, help="processes that build side by side")
    parser.add_argument("--size", type=parse_size, help="size of the picture (default: the model's own)")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--work", type=Path, default=Path("bundles/gpu-check"), help="where bundles are built")
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results"))
    options = parser.parse_args(arguments)
    options.targets = [target for target in options.targets.split(",") if target]
    for name, allowed in (("engines", ENGINES), ("precision", PRECISIONS), ("only", PARTS), ("plans", None)):
        chosen = getattr(options, name).split(",")
        for one in chosen:
            if allowed is not None and one not in allowed:
                raise UserError(f"--{name}: unknown {one!r}; choose from: {', '.join(allowed)}")
        setattr(options, name, chosen)
    return options
