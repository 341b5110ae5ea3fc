"""The one exception of this package for what a user can cause; commands print it as one line and exit with 2."""

from engines.errors import UserError

__all__ = ["TuningError"]


class TuningError(UserError):
    """A user's mistake: the message says what was got, what is allowed and what to do next."""
