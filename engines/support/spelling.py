"""The name that a user may have meant by one that there is not."""

from collections.abc import Iterable
from difflib import get_close_matches

__all__ = ["did_you_mean"]


def did_you_mean(given: str, known: Iterable[str]) -> str:
    """``did you mean X? ``, to be put before the list of what is allowed; nothing where no name is near."""
    names = {name.lower(): name for name in known}
    near = get_close_matches(given.lower()[:100], names, 1, 0.7)
    return f"did you mean {names[near[0]]}? " if near else ""
