"""``python -m runtime PROMPT`` and ``python -m runtime plans``."""

from collections.abc import Sequence
from importlib import import_module

from engines.support.cli import run_command, starting
from runtime.command.arguments import file_of_prompts, parse

__all__ = ["main"]


def main(arguments: Sequence[str], prog: str = "python -m runtime") -> None:
    """Run the command, which is called ``prog`` in messages; raises UserError for a user's mistake."""
    prompts = file_of_prompts(arguments)
    if prompts is not None:  # a command that stands above this package: it is called by its name, as a user would
        import_module("serving.prompts.__main__").main(prompts)
        return
    options = parse(arguments, prog)
    with starting():
        from runtime.command.run import run  # what that takes is not waited for by --help

    run(options)


if __name__ == "__main__":
    run_command(main)
