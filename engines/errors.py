"""What a user can get wrong with a bundle or an engine. The commands print these as one line and exit with code 2."""

__all__ = ["BundleError", "EngineError", "EngineMemoryError", "UserError"]


class UserError(ValueError):
    """A mistake that the user can mend: says what was got, what is allowed and what to do next."""


class BundleError(UserError):
    """A bundle is missing, damaged, or of a version that this program does not read."""


class EngineError(UserError):
    """An engine is unknown, not installed, not in the bundle, or cannot run what was asked of it."""


class EngineMemoryError(EngineError):
    """An engine does not fit into what memory the device has left."""
