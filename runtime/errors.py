"""Mistakes that a user can make with a plan or a request. The commands print these as one line and exit with code 2."""

from engines.errors import UserError

__all__ = ["NonFiniteError", "PartitionError", "PlanError", "RequestError", "SiblingError"]


class PlanError(UserError):
    """A plan that cannot be read, or that this bundle cannot run."""


class PartitionError(PlanError):
    """A plan that the segments of a UNet cannot run, and that a bundle partitioned for it could."""

    def __init__(self, message: str, unet: str) -> None:
        super().__init__(message)
        self.unet = unet
        """Name of the UNet whose bundle would have to be partitioned for the plan."""


class SiblingError(PlanError):
    """A plan that switches to a UNet of which there is no bundle."""

    def __init__(self, message: str, variant: str) -> None:
        super().__init__(message)
        self.variant = variant


class NonFiniteError(UserError):
    """Numbers became infinite or NaN on the way to a picture, as where they overflow in half precision."""


class RequestError(UserError):
    """A request for an image that cannot be met: prompt, size, steps, scheduler."""
