"""The arguments of ``python -m runtime``, and the request that they make."""

from argparse import Namespace
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.errors import UserError
from engines.support.cli import Parser, parse_size

if TYPE_CHECKING:
    from runtime.request import Request

__all__ = ["PLANS", "check_png", "file_of_prompts", "parse", "request_of"]

PLANS = "plans"
"""The word that is no prompt, but asks for the list of plans."""
_MEANT = {
    "plan": "`plans` lists the plans",
    "explain": "--explain shows what a plan does",
    "help": "--help lists the options",
    "doctor": "python -m unet_heirloom doctor says what this machine has",
    "build": "python -m exporter build makes a bundle",
}
"""Words that would be a strange picture, and are a likely mistake."""
_MOST_SEEDS = 10_000


def parse(arguments: Sequence[str], prog: str) -> Namespace:
    """The arguments by name; raises UserError for a mistake."""
    options = _parser(prog).parse_args(arguments)
    word = "" if options.prompt is None else options.prompt.strip().lower()
    if word in _MEANT and not options.explain:
        raise UserError(f"{word!r} as a prompt? {_MEANT[word]}; for a picture of it, say more of what it shows")
    if options.seeds is not None and options.seed is not None:
        raise UserError("--seed and --seeds are both given; give one")
    if options.seeds is not None and options.images != 1:
        raise UserError("--seeds makes a picture of each; leave --images out")
    return options


def file_of_prompts(arguments: Sequence[str]) -> list[str] | None:
    """The arguments for the command for files of prompts where ``--prompts`` names one; None where it does not."""
    parser = Parser(add_help=False, allow_abbrev=False)
    parser.add_argument("--prompts")
    found, others = parser.parse_known_args(arguments)
    return None if found.prompts is None else [*others, "--", found.prompts]


def _parser(prog: str) -> Parser:
    parser = Parser(
        prog=prog,
        description="Generate pictures from a prompt; `plans` as the prompt lists the plans and their costs.",
    )
    for option in ("--lora", "--vae"):
        parser.refuse(option, f"it is built into a bundle: give {option} to build, and here the bundle that it makes")
    add = parser.add_argument
    parser.add_version()
    add("prompt", nargs="?", help="what the picture shows, or the word `plans`")
    add("--prompts", metavar="FILE", help="make a picture for each line of a file, with the options of python -m serving.prompts")
    add("--negative", default="", help="what it should not show")
    add("--bundle", type=Path, help="a bundle's folder (default: the one in ./bundles that was built last)")
    add("--engine", default="onnxruntime", help="what runs the segments (default: %(default)s)")
    add("--plan", default="full", help="a preset or a .json file (default: %(default)s)")
    add("--scheduler", default="dpm++", help="ddim, pndm, dpm++, euler, heun, or another of diffusers (default: %(default)s)")
    add("--steps", type=int, default=20, help="denoising steps (default: %(default)s)")
    add("--guidance", type=float, help="classifier-free guidance scale (default: the bundle's, 7.5 or less)")
    add("--seed", help="seed of the first picture, or the word `random` (default: 0)")
    add("--seeds", help="seeds, with a picture for each of them, such as 1,5,7 or 1..4")
    add("--size", help="HEIGHTxWIDTH in pixels (default: the bundle's first size)")
    add("--image", type=Path, help="a picture to start from instead of noise")
    add("--strength", type=float, default=0.6, help="share of the steps that run on --image, above 0 to 1 (default: %(default)s)")
    add("--mask", type=Path, help="what to repaint of --image: a picture of its size, white where to repaint")
    add("--long-prompts", default="chunks", help="chunks to read all words of long prompts, or cut (default: %(default)s)")
    add("--clip-skip", type=int, help="layers that the text encoder leaves out, which the bundle must be built for")
    add("--images", type=int, default=1, help="number of pictures (default: %(default)s)")
    add("--compare", metavar="PLAN", help="make the same pictures with another plan, such as full, and say how they differ")
    add("--explain", action="store_true", help="print what the plan does and costs, step by step; make no picture")
    add("--card", help="with --explain: the least time that the plan could take on that GPU, such as rtx4090")
    add("--plot", type=Path, metavar="PNG", help="draw the plan, steps across and units down; make no picture")
    add(
        "--check",
        action="store_true",
        help="read every file of the bundle to see that it is whole, even files that have not changed since the last time",
    )
    add("--allow-nonfinite", action="store_true", help="write the picture, with a warning, where numbers became infinite or NaN")
    add("--every-step", action="store_true", help="list every step, not only the kinds of step")
    add("--json", action="store_true", help="print the result, or with --explain the plan, as JSON, and nothing else")
    add("--quiet", action="store_true", help="print nothing but warnings and errors")
    add("-o", "--out", type=Path, default=Path("out.png"), help="the PNG file to write (default: %(default)s)")
    return parser


def request_of(options: Namespace) -> "Request":
    """The request that the options make; a plan is explained without a prompt, too."""
    from runtime.request import Request

    height, width = (None, None) if options.size is None else parse_size(options.size)
    seeds = None if options.seeds is None else _seeds(options.seeds)
    return Request(
        prompt="any" if options.prompt is None else options.prompt,
        negative_prompt=options.negative,
        steps=options.steps,
        guidance_scale=options.guidance,
        seed=seeds or _seed(options.seed),
        height=height,
        width=width,
        num_images=len(seeds) if seeds else options.images,
        scheduler=options.scheduler,
        plan=options.plan,
        image=options.image,
        strength=options.strength,
        mask=options.mask,
        allow_nonfinite=options.allow_nonfinite,
        long_prompts=options.long_prompts,
        clip_skip=options.clip_skip,
    )


def _seed(text: str | None) -> int | None:
    if text is None:
        return 0
    if text == "random":
        return None
    return _number("--seed", text)


def _seeds(text: str) -> tuple[int, ...]:
    """The seeds of ``1,5,7`` or ``1..4``, ends included."""
    low, dots, high = text.partition("..")
    if not dots:
        return tuple(_number("--seeds", part) for part in text.split(","))
    first, last = _number("--seeds", low), _number("--seeds", high)
    if not first <= last < first + _MOST_SEEDS:
        raise UserError(f"--seeds {text!r:.60}: write the lower one first, and {_MOST_SEEDS} of them at most")
    return tuple(range(first, last + 1))


def _number(option: str, text: str) -> int:
    word = text.strip()
    if not word.removeprefix("-").isdecimal() or len(word) > 30:
        more = "1,5,7 or 1..4" if option == "--seeds" else "a whole number, or random"
        raise UserError(f"{option} {text!r:.60} is no seed; write {more}")
    return int(word)


def check_png(path: Path) -> None:
    """Raise UserError unless a picture can be written there, before anything is loaded for it."""
    advice = "give the name of a .png file in a folder that exists"
    _check_text(path)
    if path.suffix.lower() != ".png" or not path.parent.is_dir():
        raise UserError(f"cannot write {path!s:.200}: {advice}")
    if path.is_dir():
        raise UserError(f"cannot write {path!s:.200}: it is a folder; choose another path")
    temporary = path.with_name(f".{path.name}.part")
    try:
        temporary.touch()
        temporary.unlink()
    except OSError as error:
        raise UserError(f"cannot write {path!s:.200} ({error.strerror}): {advice} and can be written to") from error


def _check_text(path: Path) -> None:
    try:
        str(path).encode("utf-8")
    except UnicodeEncodeError as error:
        raise UserError(f"cannot write {str(path)!a:.200}: its name is no text in UTF-8; choose another") from error
