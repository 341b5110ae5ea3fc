"""``unet-heirloom COMMAND``, also ``python -m unet_heirloom COMMAND``: every command of the packages under one name."""

import sys
from collections.abc import Callable, Sequence
from importlib import import_module
from typing import NamedTuple, NoReturn

from unet_heirloom import __version__

__all__ = ["COMMANDS", "script"]

_PROGRAM = "unet-heirloom"


class Command(NamedTuple):
    """A command: its purpose in words; the module whose ``main`` it is; and how that is called with the command's arguments."""

    summary: str
    module: str
    run: Callable[[Callable[..., None], list[str]], None]


def _as(*before: str, after: tuple[str, ...] = (), prog: str = _PROGRAM) -> Callable[[Callable[..., None], list[str]], None]:
    """Call a package's ``main`` with words before and behind the arguments, which calls itself ``prog`` in messages."""
    return lambda main, arguments: main([*before, *arguments, *after], prog=prog)


COMMANDS = {
    "build": Command("make a bundle out of a checkpoint", "exporter.__main__", _as("build")),
    "verify": Command("compare a bundle with the torch model", "exporter.__main__", _as("verify")),
    "inspect": Command("show what is in a bundle", "exporter.__main__", _as("inspect")),
    "run": Command("generate pictures from a prompt", "runtime.__main__", _as(prog=f"{_PROGRAM} run")),
    "plans": Command("list the plans and what they cost", "runtime.__main__", _as("plans", prog=f"{_PROGRAM} run")),
    "explain": Command(
        "show what a plan does at each step", "runtime.__main__", _as(after=("--explain",), prog=f"{_PROGRAM} explain")
    ),
    "serve": Command("serve pictures over HTTP, and a page", "serving.__main__", _as(prog=f"{_PROGRAM} serve")),
    "prompts": Command("make a picture for each line of a file", "serving.prompts.__main__", _as(prog=f"{_PROGRAM} prompts")),
    "assemble": Command("make a smaller UNet out of a checkpoint's", "tuning.__main__", _as("assemble")),
    "distill": Command("teach a smaller UNet what its original does", "tuning.__main__", _as("distill")),
    "latents": Command("encode pictures once, for distillation", "tuning.__main__", _as("latents")),
    "rank": Command("measure what each removal saves and costs", "tuning.__main__", _as("rank")),
    "plan": Command("find the fastest plan for a likeness, or the nearest at a cost", "tuning.__main__", _as("plan")),
    "bench": Command("run a benchmark of the repository", "unet_heirloom.bench", lambda main, arguments: main(arguments)),
    "doctor": Command(
        "say what this machine has, and what to do next", "unet_heirloom.doctor", lambda main, arguments: main(arguments)
    ),
}


def _help() -> str:
    width = max(map(len, COMMANDS))
    rows = "\n".join(f"  {name:{width}}  {command.summary}" for name, command in COMMANDS.items())
    return f"usage: {_PROGRAM} COMMAND [...]\n\n{rows}\n\n`{_PROGRAM} COMMAND --help` lists a command's options."


def _unknown(name: str) -> NoReturn:
    from difflib import get_close_matches

    near = get_close_matches(name, COMMANDS, 1)
    meant = f"did you mean {near[0]}? " if near else ""
    print(f"error: unknown command {name!r:.60}; {meant}choose from: {', '.join(COMMANDS)}", file=sys.stderr)
    sys.exit(2)


def _run(command: Command, arguments: Sequence[str]) -> NoReturn:
    if command.module == "unet_heirloom.doctor":  # it has to work where nothing else does
        from unet_heirloom.doctor import main as doctor

        sys.exit(doctor(list(arguments)))
    try:
        from engines.support.cli import run_command
    except ImportError as error:  # the environment was not made: see engines.support.environment
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    run_command(lambda given: command.run(import_module(command.module).main, [*given]), arguments)


def script() -> NoReturn:
    """The console script: run the command that the first argument names."""
    name, *arguments = sys.argv[1:] or ["--help"]
    if name in {"--help", "-h", "help"}:
        print(_help())
        sys.exit(0)
    if name == "--version":
        print(f"{_PROGRAM} {__version__}")
        sys.exit(0)
    if name not in COMMANDS:
        _unknown(name)
    _run(COMMANDS[name], arguments)


if __name__ == "__main__":
    script()
