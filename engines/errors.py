"""Mistakes that a user can make with a bundle or an engine. The commands print them as one line and exit with code 2."""

__all__ = ["BundleError", "EngineError", "EngineMemoryError", "NeedsBuildError", "UserError", "in_one_line"]

_HEAD, _TAIL = 2500, 1000


class UserError(ValueError):
    """A mistake that the user can mend: says what was got, what is allowed and what to do next.

    In one line that can be printed, whatever names of files and values are in it.
    """

    def __str__(self) -> str:
        return in_one_line(super().__str__())

    @property
    def line(self) -> str:
        """The message and the advice that was added to it as notes, in one line."""
        return in_one_line("; ".join([str(self), *getattr(self, "__notes__", [])]))


class BundleError(UserError):
    """A bundle is missing, damaged, or of a version that this program does not read."""


class EngineError(UserError):
    """An engine is unknown, not installed, not in the bundle, or cannot run what was asked of it."""


class NeedsBuildError(EngineError):
    """A bundle has no engine that runs here, and another build can make one."""

    def __init__(self, message: str, *, up_to_date: bool = False) -> None:
        super().__init__(message)
        self.up_to_date = up_to_date
        """Whether a build would take the engine that does not run for one that does, and keep it."""


class EngineMemoryError(EngineError):
    """An engine does not fit into what memory the device has left."""


def in_one_line(text: str) -> str:
    """A message without line breaks and half characters, and without the middle of what is longer than a screen."""
    line = " ".join(text.splitlines()).encode("utf-8", "backslashreplace").decode("utf-8")
    return line if len(line) <= _HEAD + _TAIL else f"{line[:_HEAD]} ... {line[-_TAIL:]}"
