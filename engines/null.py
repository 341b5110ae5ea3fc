"""The null engine: the shapes of a bundle and a log of what ran, no arithmetic and no files.

Every schedule and cache test can run on it, with no GPU and no weights (the idea is tinygrad's null device).
"""

from collections.abc import Mapping

import torch

from engines.base import DTYPES, Engine, Runner
from engines.bundle.folder import Bundle
from engines.bundle.manifest import Feature, Segment

__all__ = ["Null"]


class Null(Engine):
    """Runs any segment by making zeros; ``calls`` holds the names of the segments that ran, in order."""

    name = "null"
    compiles = False

    def __init__(self) -> None:
        self.calls: list[str] = []

    def version(self) -> str:
        """Always "0": there is no program behind it."""
        return "0"

    def load(self, bundle: Bundle, segment: Segment) -> Runner:
        """A runner for the segment; reads no file, so the bundle's folder may be empty."""
        return _NullRunner(segment, bundle.manifest.features, self.calls)


class _NullRunner(Runner):
    def __init__(self, segment: Segment, features: Mapping[str, Feature], calls: list[str]) -> None:
        super().__init__(segment, features)
        self._calls = calls

    def _run_impl(self, inputs: dict[str, torch.Tensor], sizes: dict[str, int]) -> dict[str, torch.Tensor]:
        shapes = self.output_shapes(sizes)
        self._calls.append(self.segment.name)
        return {name: torch.zeros(shape, dtype=DTYPES[self.features[name].dtype]) for name, shape in shapes.items()}
