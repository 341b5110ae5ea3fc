"""Mistakes that whoever starts or calls a service can make. The commands print these as one line and exit with code 2."""

from engines.errors import UserError

__all__ = ["BodyError", "BusyError", "KeyRefusedError", "LateError", "ServingError", "StoppingError", "UnknownModelError"]


class ServingError(UserError):
    """A service that cannot be started as it was asked for."""


class UnknownModelError(UserError):
    """A request names a model that is not served."""


class KeyRefusedError(UserError):
    """A request without the service's key."""


class BodyError(UserError):
    """A request's body that is not read."""

    def __init__(self, message: str, status: int) -> None:
        super().__init__(message)
        self.status = status
        """HTTP's number for why."""


class BusyError(UserError):
    """So many pictures are waiting that no more are taken."""

    def __init__(self, message: str, retry_after: int) -> None:
        super().__init__(message)
        self.retry_after = retry_after
        """Seconds after which there is likely to be room."""


class StoppingError(UserError):
    """The service is being stopped and takes no more requests."""


class LateError(UserError):
    """A request was not finished in the time that it may take."""
