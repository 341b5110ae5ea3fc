"""Mistakes that a user can make when building. The commands print them as one line and exit with code 2."""

from engines.errors import UserError

__all__ = ["BuildError", "SourceError"]


class BuildError(UserError):
    """A build, verification or inspection that cannot be done as asked."""


class SourceError(UserError):
    """Weights that cannot be found, read or handled."""
