"""``python -m tuning assemble | rank``."""

from collections.abc import Sequence
from pathlib import Path

from rich.console import Console

from engines.command import Parser, run_command

_SOURCE = "mini, a diffusers folder (of a checkpoint or a UNet), a hub id, or random:CONFIG"


def _parser() -> Parser:
    parser = Parser(prog="python -m tuning", description="Make UNets smaller.")
    commands = parser.add_subparsers(dest="command", required=True, parser_class=Parser)
    assemble = commands.add_parser("assemble", help="leave out what a recipe names; every kept weight stays as it is")
    assemble.add_argument("--recipe", default="assembled", help="a recipe's name or its .json file (default: %(default)s)")
    assemble.add_argument("--source", default="mini", help=f"{_SOURCE} (default: %(default)s)")
    assemble.add_argument("--precision", default="fp16", help="fp16 or fp32 (default: %(default)s)")
    assemble.add_argument("--out", type=Path, required=True, help="the folder of the new UNet")
    return parser


def _quiet_libraries() -> None:
    """Keep the model libraries' notes and bars out of the commands' output; errors still come through."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for logging in (diffusers_logging, transformers_logging):
        logging.set_verbosity_error()
        logging.disable_progress_bar()


def main(arguments: Sequence[str]) -> None:
    """Run one command; raises UserError for a user's mistake."""
    options = _parser().parse_args(arguments)
    _quiet_libraries()
    console = Console()
    if options.command == "assemble":
        from tuning.assemble_command import assemble_command

        assemble_command(options.source, options.recipe, options.out, options.precision, console)


if __name__ == "__main__":
    run_command(main)
