"""This project's version, as its metadata has it: pyproject.toml is the one place where it is written."""

from importlib.metadata import PackageNotFoundError, version

__all__ = ["our_version"]


def our_version() -> str:
    """The version of what is installed; ``unknown`` where the code is run from a folder that was never installed."""
    try:
        return version("unet-heirloom")
    except PackageNotFoundError:
        return "unknown"
