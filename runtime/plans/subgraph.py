"""The segments that the steps of one kind run, with what they take from the cache and what they free, laid out once."""

from collections.abc import Collection, Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property

from engines.bundle.manifest import Manifest, Segment
from engines.bundle.names import TEXT
from runtime.plans.demand import demand

__all__ = ["Subgraph", "common_prefix", "read_by", "subgraph_for"]


@dataclass(frozen=True)
class Subgraph:
    """The segments to run, in order, and what becomes of features meanwhile."""

    segments: tuple[Segment, ...]
    wanted: frozenset[str]
    """The features that have to be there at the end."""
    cached_inputs: frozenset[str]
    """The inherited features that are really read: those to take from the cache."""
    frees: tuple[tuple[str, ...], ...]
    """For each segment, the features of this step that nobody will read after it."""

    @cached_property
    def segment_names(self) -> tuple[str, ...]:
        """Names of the segments."""
        return tuple(segment.name for segment in self.segments)

    @cached_property
    def inputs(self) -> tuple[str, ...]:
        """The features that are not made here: those that segments read, and those that are wanted as they are."""
        made = {name for segment in self.segments for name in segment.outputs}
        return tuple(dict.fromkeys((*read_by(self.segments, self.cached_inputs), *sorted(self.wanted - made))))


def subgraph_for(
    manifest: Manifest,
    wanted: frozenset[str],
    given: frozenset[str] = frozenset({TEXT}),
    inherited: frozenset[str] = frozenset(),
    made: frozenset[str] = frozenset(),
) -> Subgraph:
    """The segments to run to have the ``wanted`` features.

    Args:
        manifest: whose segments run.
        wanted: names of features.
        given: features that need not be computed because the caller has it; graph inputs need not be listed.
        inherited: features that come from an earlier step.
        made: features that this step has made already, to be freed once they are read.
    """
    segments = tuple(demand(manifest.segments, wanted, given | inherited | made))
    read = {name for segment in segments for name in segment.inputs} | wanted
    last = {name: number for number, segment in enumerate(segments) for name in segment.inputs}
    frees: list[list[str]] = [[] for _ in segments]
    makers = dict.fromkeys(made, 0) | {name: number for number, segment in enumerate(segments) for name in segment.outputs}
    for name, maker in makers.items():
        if segments and name not in wanted:
            frees[last.get(name, maker)].append(name)
    return Subgraph(segments, wanted, inherited.intersection(read), tuple(map(tuple, frees)))


def common_prefix(one: Subgraph, other: Subgraph, apart: frozenset[str]) -> tuple[Segment, ...]:
    """The segments that both start with, up to the first that only one runs or that reads what is ``apart`` between them."""

    def alike() -> Iterator[Segment]:
        for segment, twin in zip(one.segments, other.segments, strict=False):
            if segment.name != twin.name or apart.intersection(segment.inputs):
                return
            yield segment

    return tuple(alike())


def read_by(segments: Iterable[Segment], given: Collection[str]) -> tuple[str, ...]:
    """The features that segments read which none of them made before, or which are ``given`` all the same; each once."""
    made: set[str] = set()
    read: dict[str, None] = {}
    for segment in segments:
        read |= dict.fromkeys(name for name in segment.inputs if name in given or name not in made)
        made.update(segment.outputs)
    return tuple(read)
