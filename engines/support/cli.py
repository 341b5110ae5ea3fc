"""The form of all commands: one line for a user's mistake, exit code 2; an unexpected fault keeps its traceback."""

import argparse
import errno
import gc
import logging
import signal
import sys
import threading
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import NoReturn

from engines.errors import UserError, in_one_line
from engines.support.version import our_version

__all__ = [
    "Parser",
    "interrupts_held",
    "parse_size",
    "print_warnings",
    "quiet_libraries",
    "quiet_logs",
    "resumable",
    "run_command",
    "starting",
]

_FULL = {errno.ENOSPC, errno.EDQUOT}
_BROKEN = {errno.EFBIG, errno.EIO}
"""Error numbers of writing to a disk that takes no file so large, or is damaged or gone; such errors name no file."""

_MOST_SHOWN = 300
"""Characters of an argument that a message shows."""

_KEPT = "nothing half-written was kept"
_RESUMES = "the same command resumes from what was finished"


class _Refusal(argparse.Action):
    """An option that another command takes, and this one refuses."""

    def __call__(
        self, parser: argparse.ArgumentParser, namespace: argparse.Namespace, values: object, option: str | None = None
    ) -> NoReturn:
        raise UserError(f"{option}: {self.const}")


class Parser(argparse.ArgumentParser):
    """An argument parser whose complaint is one line."""

    def add_version(self) -> None:
        """Take ``--version``, which prints this project's."""
        self.add_argument("--version", action="version", version=f"unet-heirloom {our_version()}")

    def refuse(self, option: str, why: str) -> None:
        """Refuse an option that users may expect here, and say ``why``, and what to do instead; --help does not name it."""
        self.add_argument(
            option,
            action=_Refusal,
            nargs="?",
            const=why,
            dest=argparse.SUPPRESS,
            default=argparse.SUPPRESS,
            help=argparse.SUPPRESS,
        )

    def parse_args(  # type: ignore[override]
        self, args: Sequence[str] | None = None, namespace: argparse.Namespace | None = None
    ) -> argparse.Namespace:
        """As argparse's, which takes ``--name=--`` for a list of nothing."""
        for given in sys.argv[1:] if args is None else args:
            if given.startswith("--") and given.endswith("=--"):
                self.error(f"argument {given.removesuffix('=--')}: expected one argument")
        return super().parse_args(args, namespace)

    def error(self, message: str) -> NoReturn:
        """Raise UserError instead of printing the usage."""
        shown = " ".join(message.split())
        shown = shown if len(shown) <= _MOST_SHOWN else f"{shown[:_MOST_SHOWN]}..."
        raise UserError(f"{shown}; see: {self.prog} --help")


def parse_size(text: str) -> tuple[int, int]:
    """Height and width in pixels from ``512x768`` or ``512``.

    Raises:
        UserError: the text is no size.
    """
    sides = text.lower().split("x")
    if len(sides) == 1:
        sides *= 2
    if len(sides) != 2 or not all(side.isdecimal() and len(side) <= 12 for side in sides):
        raise UserError(f"size {text!r:.60} is no picture size; write HEIGHTxWIDTH in pixels, such as 512x768")
    return int(sides[0]), int(sides[1])


def print_warnings() -> None:
    """Have a command print each warning as one line of its own."""
    warnings.showwarning = lambda message, *rest, **others: print(f"warning: {message}", file=sys.stderr)


def quiet_libraries() -> None:
    """Keep the model libraries' notes and bars out of a command's output; errors still come through."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    for library in (diffusers_logging, transformers_logging):
        library.set_verbosity_error()
        library.disable_progress_bar()


@contextmanager
def quiet_logs() -> Iterator[None]:
    """Inside, nothing below an error is logged by anyone: for libraries that raise what matters."""
    before = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        yield
    finally:
        logging.disable(before)


@contextmanager
def starting() -> Iterator[None]:
    """For a command that imports its libraries inside: no garbage is looked for among what they make, which stays."""
    collects = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()


@contextmanager
def interrupts_held() -> Iterator[Callable[[], None]]:
    """Inside, the first Ctrl-C is a KeyboardInterrupt where the function that this gives is called, and nowhere else.

    For work that shares locks with other threads. Raised between any two instructions, it can leave a lock held for ever that
    another thread then waits for: one of imports, of futures, of conditions. A second Ctrl-C is raised at once.
    """
    came = False

    def hold(*_: object) -> None:
        nonlocal came
        came = True
        signal.signal(signal.SIGINT, before)

    def check() -> None:
        if came:
            raise KeyboardInterrupt

    here = threading.current_thread() is threading.main_thread()
    if not here or signal.getsignal(signal.SIGINT) is not signal.default_int_handler:  # nothing is raised, or others see to it
        yield check
        return
    before = signal.signal(signal.SIGINT, hold)
    try:
        yield check
        check()
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def resumable() -> Iterator[None]:
    """Say of work that is stopped inside, by the user or the system, that the same command resumes it."""
    try:
        yield
    except (KeyboardInterrupt, OSError) as error:
        error.add_note(_RESUMES)
        raise


def run_command(main: Callable[[Sequence[str]], None], arguments: Sequence[str] | None = None) -> NoReturn:
    """Run a command's main function on the arguments given, or else the process', and exit.

    Exit codes: 0, 1 where the command itself says so, 2 for a user's mistake, a full disk or a path that cannot be written,
    130 when interrupted.
    """
    try:
        main(sys.argv[1:] if arguments is None else arguments)
        gc.freeze()  # the process ends: nothing is looked for in what its libraries made
    except UserError as error:
        print(f"error: {error.line}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:
        if error.errno in _FULL:
            message = f"the disk is full ({error}); {_kept(error)}; make space first"
        elif error.errno in _BROKEN and error.filename is None:
            message = f"a file cannot be written any further ({error}); {_kept(error)}; choose a path on another disk"
        elif error.errno is not None and error.filename is not None:  # a file or folder is at fault, not this program
            message = f"{error.filename} cannot be read or written ({error.strerror}); choose another path"
        else:
            raise
        print(f"error: {in_one_line(message)}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        print(f"interrupted; {_kept(error)}", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def _kept(error: BaseException) -> str:
    return "; ".join([_KEPT, *getattr(error, "__notes__", [])])
