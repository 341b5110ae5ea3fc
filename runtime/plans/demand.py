"""The segments that have to run: a walk backwards from the features that are wanted.

This is the whole mechanism behind feature inheritance. A segment (or a unit) runs only if something that runs needs a feature
of its and that feature is not given; so skipping is never special code, it falls out of the demand.
"""

from collections.abc import Collection, Iterable, Sequence
from typing import Protocol, TypeVar

__all__ = ["Node", "demand"]


class Node(Protocol):
    """Anything that turns named features into named features."""

    @property
    def inputs(self) -> tuple[str, ...]:
        """Features it reads."""

    @property
    def outputs(self) -> tuple[str, ...]:
        """Features it makes."""


AnyNode = TypeVar("AnyNode", bound=Node)


def demand(nodes: Sequence[AnyNode], wanted: Iterable[str], given: Collection[str] = ()) -> list[AnyNode]:
    """The nodes that must run to have the ``wanted`` features when the ``given`` ones are there already.

    Args:
        nodes: all nodes, in an order in which they could run.
        wanted: names of the features asked for.
        given: names of features that need no computing (inherited ones). Graph inputs need not be listed.

    Returns:
        The nodes to run, in the given order.
    """
    needed = set(wanted).difference(given)
    running: list[AnyNode] = []
    for node in reversed(nodes):
        if needed.intersection(node.outputs):
            running.append(node)
            needed.update(feature for feature in node.inputs if feature not in given)
    return running[::-1]
