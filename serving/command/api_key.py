"""The key of a service: from a file or the environment, never from the command line, which other users can read."""

import ipaddress
import os
from pathlib import Path

from serving.errors import ServingError

__all__ = ["VARIABLE", "is_loopback", "read_key"]

VARIABLE = "UNET_HEIRLOOM_API_KEY"
_FEWEST, _MOST = 16, 1000


def read_key(file: Path | None) -> str | None:
    """The key in a file's first line, or in the environment; None where there is neither.

    Raises:
        ServingError: the file cannot be read, both are given, or the key is too short to be one.
    """
    from_environment = os.environ.get(VARIABLE)
    if file is None:
        return None if from_environment is None else _checked(from_environment, VARIABLE)
    if from_environment is not None:
        raise ServingError(f"--api-key-file and {VARIABLE} are both given; give one")
    try:
        with file.expanduser().open("rb") as opened:
            text = opened.readline(_MOST + 2).decode("utf-8")
    except (OSError, ValueError) as error:
        raise ServingError(f"--api-key-file {str(file)!r:.200} cannot be read ({error}); give a file with the key") from error
    return _checked(text, f"--api-key-file {str(file)!r:.200}")


def _checked(text: str, where: str) -> str:
    key = text.strip()
    if not (key.isascii() and key.isprintable() and " " not in key) or not _FEWEST <= len(key) <= _MOST:
        raise ServingError(
            f"{where} holds no key: {_FEWEST} to {_MOST} letters, digits and signs without spaces; make one with: "
            "python -c 'import secrets; print(secrets.token_urlsafe(32))'"
        )
    return key


def is_loopback(host: str) -> bool:
    """Whether an address is of this machine alone."""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost"
