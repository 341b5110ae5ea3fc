"""The models that come with the project: the names of their sources, and a prompt of each, to show what it draws."""

__all__ = ["DEFAULT", "EXAMPLES"]

EXAMPLES = {"emoji": "anchor, twitter style", "mini": "a red star on a blue background"}
DEFAULT = "emoji"
"""The source where none is named; `mini`, which is smaller, is for tests."""
