"""Mistakes that whoever starts or calls a service can make. The commands print these as one line and exit with code 2."""

from engines.errors import UserError

__all__ = ["ServingError"]


class ServingError(UserError):
    """A service that cannot be started as it was asked for."""
