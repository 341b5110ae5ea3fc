"""Packages that only training needs: whether they are there, and how to get them."""

from engines.support import extras
from tuning.errors import TuningError

__all__ = ["need"]

_OF_PLOTS = {"matplotlib", "scipy"}


def need(package: str, what: str) -> None:
    """Raises TuningError where a package of the extras `train` or `plots` is missing; `what` says what needs it."""
    extras.need(package, what, "plots" if package in _OF_PLOTS else "train", TuningError)
