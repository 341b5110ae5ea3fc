"""The models that come with the project: the names of their sources, and a prompt of each, to show what it draws."""

__all__ = ["EXAMPLES"]

EXAMPLES = {"mini": "a red star on a blue background", "emoji": "anchor, twitter style"}
"""The first is the default source."""
