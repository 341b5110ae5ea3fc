"""Packages that only some things need: whether they are there, and the one hint how to get them."""

from importlib import util

from engines.errors import UserError
from engines.support.environment import install_command

__all__ = ["need"]


def need(package: str, what: str, extra: str = "plots", error: type[UserError] = UserError) -> None:
    """Raise an error of the kind given where a package is missing; ``what`` says what needs it, ``extra`` what installs it."""
    if util.find_spec(package) is None:
        place = ", in this repository's folder," if "--editable" in install_command() else ""
        raise error(f"{what} needs {package}; install it{place} with: {install_command(extra)}")
