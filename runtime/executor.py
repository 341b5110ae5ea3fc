"""Runs a schedule's steps on loaded segments. What runs is decided by ``demand``; what is inherited is kept here.

A step starts from the noise prediction and asks backwards. What later steps inherit is kept as the engine wrote it, without a
copy; what nobody will read any more is let go at once.
"""

import time
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

from torch import Tensor

from engines import Bundle, Engine, Manifest, Runner
from engines.manifest import Segment
from runtime.change import Change
from runtime.modes import Threshold
from runtime.plan import NOISE
from runtime.schedule import Schedule, Step
from runtime.work import TEXT, Work, lay_out, run_either_way

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

    def run(self, work: Work, given: Mapping[str, Tensor], made: dict[str, Tensor] | None = None) -> dict[str, Tensor]:
        """Do the work on the ``given`` features; returns the wanted ones.

        What is given is never replaced. What is ``made`` already is let go, as are the features that are made here, when nobody
        will read it any more.
        """
        made = {} if made is None else made
        for segment, spent in zip(work.segments, work.spent, strict=True):
            self.run_all([segment], given, made)
            for name in spent:
                del made[name]
        return {name: given[name] if name in given else made[name] for name in work.wanted}

    def run_all(self, segments: Iterable[Segment], given: Mapping[str, Tensor], made: dict[str, Tensor]) -> None:
        """Run segments in order and add all that they make to ``made``. They read what is given, or else what was made."""
        for segment in segments:
            inputs = {name: given[name] if name in given else made[name] for name in segment.inputs}
            made.update(self.runners[segment.name].run(inputs))

    def compute(self, wanted: str, given: Mapping[str, Tensor]) -> Tensor:
        """One feature from the given ones, running only what it needs."""
        return self.run(lay_out(self.manifest, frozenset({wanted}), frozenset(given)), given)[wanted]

    def synchronize(self) -> None:
        """Wait for all that was started."""
        for runner in self.runners.values():
            runner.synchronize()


@dataclass(frozen=True)
class _Start:
    """A step that is decided, and what has been done for it before it was."""

    step: Step
    made: dict[str, Tensor] = field(default_factory=dict)
    ran: tuple[str, ...] = ()
    taken: frozenset[str] = frozenset()


class Executor:
    """The state of one call: its schedule, and the features inherited from its earlier steps.

    Args:
        networks: loaded segments of each UNet, by the names that the schedule uses.
        schedule: a plan laid out for this call, whose cuts were checked with ``check_runs``.
    """

    def __init__(self, networks: Mapping[str, Network], schedule: Schedule) -> None:
        self._networks, self._schedule = networks, schedule
        self._cache: dict[str, Tensor] = {}

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
        threshold = self._schedule.asked(index)
        start = _Start(self._schedule.decide(index)) if threshold is None else self._find_out(index, threshold, given)
        step, made = start.step, start.made
        network, work = self._networks[step.unet], self._schedule.work(step, frozenset(made))
        # What this step refreshes is let go first, so that old and new are never held together.
        for name in step.keep.intersection(self._cache):
            del self._cache[name]
        result = network.run(work, self._with_cached(given, work.taken), made)
        later = self._schedule.read_later(index)
        self._cache |= {name: result[name] for name in step.keep}
        self._cache = {name: tensor for name, tensor in self._cache.items() if name in later}
        network.synchronize()
        record = StepRecord(
            index=index,
            timestep=self._schedule.timesteps[index],
            unet=step.unet,
            kind="key" if step.key else "inherit",
            ran=(*start.ran, *work.ran),
            inherited=tuple(sorted(start.taken | work.taken)),
            seconds=time.perf_counter() - started,
        )
        return result[NOISE], record

    def _find_out(self, index: int, threshold: Threshold, given: Mapping[str, Tensor]) -> _Start:
        """Compute an adaptive rule's feature and compare it with the last key step's; the step goes on from it.

        While the answer is on its way from the device, what runs whatever it is has been started.
        """
        name, schedule = threshold.feature, self._schedule
        network, probing = self._networks[schedule.unet(index)], schedule.probing(index, threshold)
        made: dict[str, Tensor] = {}
        network.run_all(probing.segments, self._with_cached(given, probing.taken), made)
        change = Change(self._cache[name], made[name], threshold.above)
        less, more = schedule.decide(index, changed=False), schedule.decide(index, changed=True)
        one, other = (schedule.work(step, frozenset(made)) for step in (less, more))
        ahead = run_either_way(one, other, less.inherited - more.inherited)
        taken = more.inherited.intersection(name for segment in ahead for name in segment.inputs)
        network.run_all(ahead, self._with_cached(given, taken), made)
        ran = tuple(segment.name for segment in (*probing.segments, *ahead))
        return _Start(more if change else less, made, ran, probing.taken | taken)

    def _with_cached(self, given: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        return {**given, **{name: self._cache[name] for name in names}}
