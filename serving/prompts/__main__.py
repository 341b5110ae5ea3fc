"""``python -m serving.prompts FILE``, also ``unet-heirloom prompts``."""

import sys
from collections.abc import Sequence

from engines.support.cli import resumable, run_command, starting
from serving.prompts.arguments import parse

__all__ = ["main"]


def main(arguments: Sequence[str], prog: str = "python -m serving.prompts") -> None:
    """Run the command, which is called ``prog`` in messages; raises UserError for a user's mistake."""
    options = parse(arguments, prog)
    with starting():
        from serving.prompts.run import run  # what that takes is not waited for by --help

    with resumable():
        not_made = run(options)
    if not_made:
        sys.exit(1)


if __name__ == "__main__":
    run_command(main)
