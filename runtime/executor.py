"""Runs a schedule's steps on loaded segments. What runs is decided by ``demand``; what is inherited is kept here.

A step starts from the noise prediction and asks backwards. What later steps inherit is kept as the engine wrote it, without a
copy; what nobody will read any more is let go at once.
"""

import time
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass

from torch import Tensor

from engines import Bundle, Engine, Manifest, Runner
from engines.manifest import Segment
from runtime.demand import demand
from runtime.modes import Threshold
from runtime.plan import NOISE
from runtime.schedule import TEXT, Schedule, reads

__all__ = ["Executor", "Network", "StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """What one model evaluation did.

    ``ran`` names the segments that ran, in order; ``inherited`` the features that they took from earlier steps.
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

    def run(self, segments: Sequence[Segment], features: Mapping[str, Tensor], wanted: Collection[str]) -> dict[str, Tensor]:
        """Run segments in order on the given features; returns the wanted ones. What is given is never replaced."""
        last_read = {name: segment.name for segment in segments for name in segment.inputs}
        made: dict[str, Tensor] = {}
        for segment in segments:
            inputs = {name: features[name] if name in features else made[name] for name in segment.inputs}
            made.update(self.runners[segment.name].run(inputs))
            del inputs
            for name in [name for name in made if name not in wanted and last_read.get(name, segment.name) == segment.name]:
                del made[name]
        return {name: features[name] if name in features else made[name] for name in wanted}

    def compute(self, wanted: str, features: Mapping[str, Tensor]) -> Tensor:
        """One feature from the given ones, running only what it needs."""
        return self.run(demand(self.manifest.segments, [wanted], features), features, [wanted])[wanted]

    def synchronize(self) -> None:
        """Wait for all that was started."""
        for runner in self.runners.values():
            runner.synchronize()


class Executor:
    """The state of one call: its schedule, and the features inherited from its earlier steps.

    Args:
        networks: loaded segments of each UNet, by the names that the schedule uses.
        schedule: a plan laid out for this call, whose cuts were checked with ``check_runs``.
    """

    def __init__(self, networks: Mapping[str, Network], schedule: Schedule) -> None:
        self._networks, self._schedule = networks, schedule
        self._cache: dict[str, Tensor] = {}
        self._probe: dict[str, Tensor] = {}

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
        given = {"sample": sample, "timestep": timestep, TEXT: text}
        step = self._schedule.decide(index, lambda threshold: self._changed(threshold, self._schedule.unet(index), given))
        network = self._networks[step.unet]
        taken = reads(network.manifest, step.inherited, step.keep)
        # What this step refreshes is let go first, so that old and new are never held together.
        self._cache = {name: tensor for name, tensor in self._cache.items() if name not in step.keep}
        given |= self._probe | {name: self._cache[name] for name in taken}
        segments = demand(network.manifest.segments, step.wanted, step.inherited | {TEXT, *self._probe})
        made = network.run(segments, given, step.wanted)
        self._cache |= {name: made[name] for name in step.keep}
        self._cache = {name: tensor for name, tensor in self._cache.items() if name in self._schedule.read_later(index)}
        self._probe = {}
        network.synchronize()
        record = StepRecord(
            index=index,
            timestep=float(timestep[0]),
            unet=step.unet,
            kind="key" if step.key else "inherit",
            ran=tuple(segment.name for segment in segments),
            inherited=tuple(sorted(taken)),
            seconds=time.perf_counter() - started,
        )
        return made[NOISE], record

    def _changed(self, threshold: Threshold, unet: str, given: Mapping[str, Tensor]) -> bool:
        """Compute an adaptive rule's feature and compare it with the last key step's. The step goes on from it."""
        name = threshold.feature
        self._probe = {name: self._networks[unet].compute(name, given)}
        before, now = self._cache[name], self._probe[name]
        return bool((now - before).norm() > threshold.above * before.norm())
