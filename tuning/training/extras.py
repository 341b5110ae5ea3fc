"""Packages that only training needs: whether they are there, and how to get them."""

import importlib.util

from tuning.errors import TuningError

__all__ = ["INSTALL", "need"]

INSTALL = 'pip install --constraint constraints.txt --editable ".[train]"'
"""Run in the repository; the extra is in pyproject.toml."""


def need(package: str, what: str) -> None:
    """Raises TuningError where a package of the extra `train` is missing; `what` says what needs it."""
    if importlib.util.find_spec(package) is None:
        raise TuningError(f"{what} needs {package}; install it, in this repository's folder, with: {INSTALL}")
