"""The loaded segments of one UNet, its text encoder and its VAE, and what runs them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from torch import Tensor

from engines import Bundle, Engine, Manifest, Runner
from engines.bundle.manifest import Segment
from runtime.plans.subgraph import Subgraph, subgraph_for

__all__ = ["LoadedBundle"]


@dataclass(frozen=True)
class LoadedBundle:
    """A manifest and a runner for each of its segments. Holds no state of a call, so calls can share it."""

    manifest: Manifest
    runners: Mapping[str, Runner]

    @classmethod
    def load(cls, bundle: Bundle, engine: Engine) -> "LoadedBundle":
        """Load every segment of a bundle; raises BundleError or EngineError as ``Engine.load`` does."""
        runners = {segment.name: engine.load(bundle, segment) for segment in bundle.manifest.segments}
        return cls(bundle.manifest, runners)

    def run(self, subgraph: Subgraph, given: Mapping[str, Tensor], made: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Run a subgraph on the ``given`` features; returns the wanted ones.

        What is given is never replaced. What is ``made`` already is let go, as are the features that are made here, when nobody
        will read it any more.
        """
        made = {} if made is None else made
        for segment, freed in zip(subgraph.segments, subgraph.frees, strict=True):
            self.run_all([segment], given, made)
            for name in freed:
                del made[name]
        return {name: given[name] if name in given else made[name] for name in subgraph.wanted}

    def run_all(self, segments: Iterable[Segment], given: Mapping[str, Tensor], made: dict[str, Tensor]) -> None:
        """Run segments in order and add all that they make to ``made``. They read what is given, or else what was made."""
        for segment in segments:
            inputs = {name: given[name] if name in given else made[name] for name in segment.inputs}
            made.update(self.runners[segment.name].run(inputs))

    def compute(self, wanted: str, given: Mapping[str, Tensor]) -> Tensor:
        """One feature from the given ones, running only what it needs."""
        return self.run(subgraph_for(self.manifest, frozenset({wanted}), frozenset(given)), given)[wanted]
