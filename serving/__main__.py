"""``python -m serving``, also ``unet-heirloom serve``."""

from collections.abc import Sequence

from engines.support.cli import run_command, starting
from serving.command.arguments import parse

__all__ = ["main"]


def main(arguments: Sequence[str], prog: str = "python -m serving") -> None:
    """Run the command, which is called ``prog`` in messages; raises UserError for a user's mistake."""
    options = parse(arguments, prog)
    with starting():
        from serving.command.run import run  # what that takes is not waited for by --help

    run(options)


if __name__ == "__main__":
    run_command(main)
