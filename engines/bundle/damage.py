"""The errors of a bundle that another build would mend, with the advice to build it again."""

from pathlib import Path
from shlex import quote

from engines.errors import BundleError

__all__ = ["damaged", "of_another_version"]


def damaged(folder: Path, what: str) -> BundleError:
    """The error of a bundle that another build would mend, with the advice to build it.

    Args:
        folder: the bundle.
        what: what is wrong with it, such as "front.onnx is missing".
    """
    return _with_build(BundleError(f"bundle {folder} is damaged: {what}"), folder)


def of_another_version(folder: Path, found: str, read: int) -> BundleError:
    """The error of a bundle whose manifest has a version that this program does not read."""
    return _with_build(BundleError(f"bundle {folder} has manifest version {found}, this program reads {read}"), folder)


def _with_build(error: BundleError, folder: Path) -> BundleError:
    out = quote(str(folder))
    error.add_note(f"rebuild it with: python -m exporter build --force --out {out} and the options that it was built with")
    return error
