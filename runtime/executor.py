"""Runs a plan's steps on loaded segments. What runs is decided by ``demand``; what is inherited is kept here.

A step starts from the noise prediction and asks backwards. The first step is a key step; the features that later steps inherit
are kept as the engine wrote them, without a copy.
"""

import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from engines import Bundle, Engine, Manifest, Runner
from engines.manifest import Segment
from runtime.demand import demand
from runtime.plan import NOISE, Step

__all__ = ["Executor", "Network", "StepRecord"]

TEXT = "text_encoder"


@dataclass(frozen=True)
class StepRecord:
    """What one model evaluation did.

    ``ran`` names the segments that ran, in order; ``inherited`` the features that they took from the last key step.
    """

    index: int
    timestep: float
    unet: str
    kind: str
    ran: tuple[str, ...]
    inherited: tuple[str, ...]
    seconds: float


@dataclass(frozen=True)
class Network:
    """A manifest and a runner for each of its segments. Holds no state of a call, so calls can share it."""

    manifest: Manifest
    runners: Mapping[str, Runner]

    @classmethod
    def load(cls, bundle: Bundle, engine: Engine) -> "Network":
        """Load every segment of a bundle; raises BundleError or EngineError as ``Engine.load`` does."""
        runners = {segment.name: engine.load(bundle, segment) for segment in bundle.manifest.segments}
        return cls(bundle.manifest, runners)

    def run(self, segments: Sequence[Segment], features: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Run segments in order on the given features; returns what they made. What is given is never replaced."""
        made: dict[str, Tensor] = {}
        for segment in segments:
            inputs = {name: features[name] if name in features else made[name] for name in segment.inputs}
            made.update(self.runners[segment.name].run(inputs))
        return made

    def compute(self, wanted: str, features: Mapping[str, Tensor]) -> Tensor:
        """One feature from the given ones, running only what it needs."""
        return self.run(demand(self.manifest.segments, [wanted], features), features)[wanted]

    def synchronize(self) -> None:
        """Wait for all that was started."""
        for runner in self.runners.values():
            runner.synchronize()


class Executor:
    """The state of one call: a schedule, and the features inherited from its last key step.

    Args:
        network: loaded segments.
        schedule: from ``Plan.schedule``, checked with ``check_runs``.
    """

    def __init__(self, network: Network, schedule: Sequence[Step]) -> None:
        self._network = network
        self._schedule = tuple(schedule)
        self._cache: dict[str, Tensor] = {}
        self._running = {
            inherited: demand(network.manifest.segments, [NOISE], inherited | {TEXT})
            for inherited in {step.inherited for step in self._schedule}
        }
        self._reads = {inherited: self._read_from_cache(inherited) for inherited in self._running}
        self._keep = frozenset[str]().union(*self._reads.values())

    def _read_from_cache(self, inherited: frozenset[str]) -> frozenset[str]:
        read = {name for segment in self._running[inherited] for name in segment.inputs} | {NOISE}
        return inherited.intersection(read)

    def step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        """Predict the noise (or velocity) of one step.

        Args:
            index: number of the model evaluation, counted by the caller from 0. Steps must be taken in order.
            sample: (rows, channels, height, width), scaled for the model.
            timestep: (1,), float32.
            text: (rows, tokens, width).

        Returns:
            The prediction, shaped as ``sample``, and what was done for it.
        """
        started = time.perf_counter()
        step = self._schedule[index]
        segments, reads = self._running[step.inherited], self._reads[step.inherited]
        given = {"sample": sample, "timestep": timestep, TEXT: text} | {name: self._cache[name] for name in reads}
        made = self._network.run(segments, given)
        if step.key:
            self._cache = {name: made[name] for name in self._keep}
        self._network.synchronize()
        record = StepRecord(
            index=index,
            timestep=float(timestep[0]),
            unet=self._network.manifest.variant,
            kind="key" if step.key else "inherit",
            ran=tuple(segment.name for segment in segments),
            inherited=tuple(sorted(reads)),
            seconds=time.perf_counter() - started,
        )
        return given[NOISE] if NOISE in given else made[NOISE], record
