"""``python -m tuning assemble | distill | latents | plan | rank``."""

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from engines.support.cli import Parser, quiet_libraries, resumable, run_command
from runtime.embedded import DEFAULT
from tuning.distillation.latents_command import add_arguments as add_latents_arguments
from tuning.distillation.options import DistillOptions
from tuning.distillation.options import add_arguments as add_distill_arguments
from tuning.planning.options import PlanOptions
from tuning.planning.options import add_arguments as add_plan_arguments

if TYPE_CHECKING:
    from tuning.loras.lora import Lora

_SOURCE = "emoji, mini, a diffusers folder (of a checkpoint or a UNet), a hub id, a .safetensors file, or random:CONFIG"
_VARIANT_FILES = "variant of the source's weight files to read, such as fp16 (default: those without)"


def _parser(prog: str = "python -m tuning") -> Parser:
    parser = Parser(prog=prog, description="Make UNets smaller, and find plans for them.")
    parser.add_version()
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    assemble = commands.add_parser("assemble", help="remove what a recipe names; every kept weight stays as it is")
    assemble.add_argument("--recipe", default="assembled", help="a recipe's name or its .json file (default: %(default)s)")
    assemble.add_argument("--source", default=DEFAULT, help=f"{_SOURCE} (default: %(default)s)")
    assemble.add_argument("--variant-files", help=_VARIANT_FILES)
    _add_loras(assemble)
    assemble.add_argument("--precision", default="fp16", help="fp16 or fp32 (default: %(default)s)")
    assemble.add_argument("--out", type=Path, required=True, help="the folder of the new UNet")
    rank = commands.add_parser("rank", help="measure the time and the error of each removal, and choose a recipe")
    rank.add_argument("--source", default=DEFAULT, help=f"the UNet whose errors count: {_SOURCE} (default: %(default)s)")
    rank.add_argument("--variant-files", help=_VARIANT_FILES)
    _add_loras(rank)
    rank.add_argument("--times", help="the UNet whose time counts, such as random:sd15 (default: the source's)")
    rank.add_argument("--speedup", type=float, default=1.35, help="how fast the chosen recipe has to be (default: %(default)s)")
    rank.add_argument("--latents", type=int, default=0, help="side of the latents for timing (default: the UNet's, at most 32)")
    rank.add_argument("--rows", type=int, default=2, help="rows of the batch for timing; 2 (default) is a picture with guidance")
    rank.add_argument("--rounds", type=int, default=5, help="rounds of timing (default: %(default)s)")
    rank.add_argument("--prompts", type=int, default=16, help="trajectories for the errors (default: %(default)s)")
    rank.add_argument("--steps", type=int, default=8, help="denoising steps of each trajectory (default: %(default)s)")
    rank.add_argument("--guidance", type=float, default=3.0, help="guidance scale of each trajectory (default: %(default)s)")
    rank.add_argument(
        "--device", choices=("cpu", "cuda"), help="where to measure (default: the NVIDIA GPU that torch sees, or cpu)"
    )
    rank.add_argument("--name", default="ranked", help="name of the recipe, and of its file in --out (default: %(default)s)")
    rank.add_argument("--out", type=Path, default=Path("runs/rank"), help="folder for the results (default: %(default)s)")
    add_distill_arguments(commands.add_parser("distill", help="teach a smaller UNet to predict what its original does"))
    add_latents_arguments(commands.add_parser("latents", help="encode pictures once, for many passes of distillation"))
    add_plan_arguments(commands.add_parser("plan", help="find the plan whose pictures are nearest to those of full, at a cost"))
    return parser


def _add_loras(parser: Parser) -> None:
    parser.add_argument(
        "--lora", action="append", default=[], metavar="FILE[:SCALE]", help="a LoRA to fuse into the UNet first; may be repeated"
    )
    parser.refuse("--vae", "no VAE is read here; leave it out, and give it to build, or to distill and latents")


def main(arguments: Sequence[str], prog: str = "python -m tuning") -> None:
    """Run one command, which is called ``prog`` in messages; raises UserError for a user's mistake."""
    options = _parser(prog).parse_args(arguments)
    from rich.console import Console  # none of what the work takes is waited for by --help

    quiet_libraries()
    console = Console()
    given = {key: value for key, value in vars(options).items() if key != "command"}
    if options.command == "assemble":
        from tuning.assemble_command import assemble_command

        assemble_command(
            options.source, options.recipe, options.out, options.precision, console, options.variant_files, _loras(options.lora)
        )
    elif options.command == "distill":
        from tuning.distillation.command import run

        with resumable():
            run(DistillOptions.of(given))
    elif options.command == "latents":
        from tuning.distillation.latents_command import LatentsOptions
        from tuning.distillation.latents_command import run as encode

        encode(LatentsOptions(**given))
    elif options.command == "plan":
        from tuning.planning.command import plan_command

        with resumable():
            plan_command(PlanOptions(**{**given, "bundle": tuple(given["bundle"])}), console)
    else:
        from tuning.ranking.command import RankOptions, rank_command

        rank_command(
            RankOptions(**{key: value for key, value in given.items() if key != "lora"}, loras=_loras(options.lora)), console
        )


def _loras(texts: Sequence[str]) -> "tuple[Lora, ...]":
    from tuning.loras.lora import Lora

    return tuple(Lora.parse(text) for text in texts)


if __name__ == "__main__":
    run_command(main)
