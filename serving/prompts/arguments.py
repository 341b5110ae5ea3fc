"""The arguments of ``python -m serving.prompts``, and the fields of requests that they set."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from engines.support.cli import Parser, parse_size
from serving.errors import ServingError

__all__ = ["fields_of", "parse"]

_COUNTS = ("batch", "shard_size", "workers")
_AMOUNTS = ("cpus_per_worker", "gpus_per_worker")


def parse(arguments: Sequence[str], prog: str) -> Namespace:
    """The arguments by name; raises UserError for a mistake."""
    options = _parser(prog).parse_args(arguments)
    for name in (*_COUNTS, *_AMOUNTS):
        value, least = getattr(options, name), 1 if name in _COUNTS else 0
        if value is not None and not least <= value <= 10**6:
            raise ServingError(f"--{name.replace('_', '-')} {value:g}: give a number from {least} to {10**6}")
    if options.workers is None and any(getattr(options, name) is not None for name in (*_AMOUNTS, "ray_address")):
        raise ServingError("--cpus-per-worker, --gpus-per-worker and --ray-address are for workers; give --workers N beside them")
    return options


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Make a picture for each line of a file: a prompt, or in a .jsonl file an object with fields of "
        "runtime.Request. A picture that is there already, made from the same line by the same bundle, is not made again.",
    )
    add = parser.add_argument
    parser.add_version()
    add("file", type=Path, help="the prompts: a text file, or .jsonl; empty lines are skipped")
    add("--bundle", help="a bundle's folder, or an address to fetch one from (default: the one in ./bundles that was built last)")
    add("--engine", default="onnxruntime", help="what runs the segments (default: %(default)s)")
    target = parser.add_mutually_exclusive_group()
    target.add_argument("-o", "--out", type=Path, metavar="DIR", help="folder for PNG files named by line (default: pictures)")
    target.add_argument("--shards", type=Path, metavar="DIR", help="folder for .tar files in webdataset's form instead")
    add("--shard-size", type=int, default=1000, help="lines in each shard (default: %(default)s)")
    add("--batch", type=int, default=8, help="pictures made at once, where engine and memory allow it (default: %(default)s)")
    add("--stop-at-error", action="store_true", help="stop at the first line of which no picture can be made")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    add("--workers", type=int, metavar="N", help="run N processes with Ray Data, on one machine or a cluster")
    add("--cpus-per-worker", type=float, metavar="N", help="cores of each worker (default: 1)")
    add("--gpus-per-worker", type=float, metavar="N", help="GPUs of each worker, or parts of one (default: 0)")
    add("--ray-address", metavar="ADDRESS", help="address of a running cluster, or `auto` (default: a new one, here)")
    _add_fields(parser)
    return parser


def _add_fields(parser: Parser) -> None:
    group = parser.add_argument_group("for lines that do not say otherwise")
    add = group.add_argument
    add("--plan", default="full", help="a preset or a .json file (default: %(default)s)")
    add("--scheduler", default="dpm++", help="ddim, pndm, dpm++, euler, heun, or another of diffusers (default: %(default)s)")
    add("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    add("--guidance", type=float, help="classifier-free guidance scale (default: the bundle's)")
    add("--negative", default="", help="what pictures should not show")
    add("--size", help="HEIGHTxWIDTH in pixels (default: the bundle's first size)")
    add("--seed", type=int, default=0, help="seed of line 1; that of line N is N - 1 more (default: %(default)s)")


def fields_of(options: Namespace) -> dict[str, Any]:
    """The fields of a request that hold where a line says nothing else; the seed is that of line 1."""
    height, width = (None, None) if options.size is None else parse_size(options.size)
    return {
        "negative_prompt": options.negative,
        "plan": options.plan,
        "scheduler": options.scheduler,
        "steps": options.steps,
        "guidance_scale": options.guidance,
        "height": height,
        "width": width,
        "seed": options.seed,
    }
