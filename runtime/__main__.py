"""``python -m runtime PROMPT`` and ``python -m runtime plans``."""

from collections.abc import Sequence

from engines.support.cli import run_command, starting
from runtime.command.arguments import parse

__all__ = ["main"]


def main(arguments: Sequence[str], prog: str = "python -m runtime") -> None:
    """Run the command, which is called ``prog`` in messages; raises UserError for a user's mistake."""
    options = parse(arguments, prog)
    with starting():
        from runtime.command.run import run  # what that takes is not waited for by --help

    run(options)


if __name__ == "__main__":
    run_command(main)
