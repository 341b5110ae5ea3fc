"""What a user can get wrong with a plan or a request. The commands print these as one line and exit with code 2."""

from engines.errors import UserError

__all__ = ["PlanError", "RequestError"]


class PlanError(UserError):
    """A plan that cannot be read, or that this bundle cannot run."""


class RequestError(UserError):
    """A request for an image that cannot be met: prompt, size, steps, scheduler."""
