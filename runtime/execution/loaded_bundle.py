"""The loaded segments of one UNet, its text encoder and its VAE, and what runs them."""

from collections.abc import Callable, Iterable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass
from functools import partial

from torch import Tensor

from engines import Bundle, Engine, Manifest, NeedsBuildError, Runner
from engines.bundle.manifest import Segment
from engines.errors import EngineMemoryError
from runtime.advice import rebuild_advice
from runtime.plans.subgraph import Subgraph, subgraph_for

__all__ = ["LoadedBundle", "advice_of", "load_runners"]


def advice_of(bundle: Bundle, engine: Engine) -> Callable[[], AbstractContextManager[None]]:
    """Makes contexts that add to an engine's error what mends it."""
    return partial(rebuild_advice, bundle, engine.name)


def load_runners(bundle: Bundle, engine: Engine, segments: Iterable[Segment]) -> dict[str, Runner]:
    """Runners by the names of their segments; raises BundleError or EngineError as ``Engine.load`` does, with advice."""
    with rebuild_advice(bundle, engine.name):
        return {segment.name: engine.load(bundle, segment) for segment in segments}


@dataclass(frozen=True)
class LoadedBundle:
    """A manifest and a runner for each of its segments. Holds no state of a call, so calls can share it."""

    manifest: Manifest
    runners: Mapping[str, Runner]
    advice: Callable[[], AbstractContextManager[None]] = nullcontext
    """Adds to a runner's error what mends it."""

    @classmethod
    def load(cls, bundle: Bundle, engine: Engine) -> "LoadedBundle":
        """Load every segment of a bundle; raises BundleError or EngineError as ``Engine.load`` does."""
        return cls(bundle.manifest, load_runners(bundle, engine, bundle.manifest.segments), advice_of(bundle, engine))

    def run(
        self,
        subgraph: Subgraph,
        given: Mapping[str, Tensor],
        made: dict[str, Tensor] | None = None,
        elsewhere: frozenset[str] = frozenset(),
    ) -> dict[str, Tensor]:
        """Run a subgraph on the ``given`` features; returns the wanted ones.

        What is given is never replaced. What is ``made`` already, and the features made here, are freed once nobody will read
        them any more. Which of the given features lie ``elsewhere`` at every step matters to recorded graphs only.
        """
        made = {} if made is None else made
        for segment, freed in zip(subgraph.segments, subgraph.frees, strict=True):
            self._run_one(segment, given, made)
            for name in freed:
                del made[name]
        return {name: given[name] if name in given else made[name] for name in subgraph.wanted}

    def run_all(
        self,
        segments: Iterable[Segment],
        given: Mapping[str, Tensor],
        made: dict[str, Tensor],
        elsewhere: frozenset[str] = frozenset(),
    ) -> None:
        """Run segments in order and add all that they make to ``made``. They read what is given, or else what was made."""
        for segment in segments:
            self._run_one(segment, given, made)

    def _run_one(self, segment: Segment, given: Mapping[str, Tensor], made: dict[str, Tensor]) -> None:
        inputs = {name: given[name] if name in given else made[name] for name in segment.inputs}
        try:
            made.update(self.runners[segment.name].run(inputs))
        except (NeedsBuildError, EngineMemoryError):  # found as late as this: engines are finished when they first run
            with self.advice():
                raise

    def compute(self, wanted: str, given: Mapping[str, Tensor]) -> Tensor:
        """One feature from the given ones, running only what it needs."""
        return self.run(subgraph_for(self.manifest, frozenset({wanted}), frozenset(given)), given)[wanted]
