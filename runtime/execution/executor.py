"""Runs a schedule's steps on loaded segments. What runs is decided by ``demand``; what is inherited is kept here.

A step starts from the noise prediction and asks backwards. What later steps inherit is kept as the engine wrote it, without a
copy; what nobody will read any more is freed at once.
"""

import weakref
from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import dataclass, field, replace

from torch import Tensor

from engines.bundle.names import NOISE, SAMPLE, TEXT, TIMESTEP
from runtime.execution.deferred_comparison import DeferredComparison
from runtime.execution.device_events import Timer
from runtime.execution.graph_cache import CudaGraphCache, GraphedNetwork
from runtime.execution.loaded_bundle import LoadedBundle
from runtime.execution.swapping import Swapper
from runtime.plans.key_steps import Threshold
from runtime.plans.schedule import Schedule, Step

__all__ = ["Executor", "LoadedBundle", "StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """A model evaluation: the segments that it ran and the features that it inherited.

    ``ran`` names the segments that ran, in order; ``inherited`` the features that they took from earlier steps. On a GPU the host
    goes ahead of the device: reading ``seconds`` waits until the step has been done there. Where the device cannot hold all UNets
    at once, ``swap_seconds`` is what it took to put this one in the place of another before the step.
    """

    index: int
    timestep: float
    unet: str
    kind: str
    ran: tuple[str, ...]
    inherited: tuple[str, ...]
    timer: Timer = field(repr=False, compare=False)
    swap_seconds: float = field(default=0.0, compare=False)

    @property
    def seconds(self) -> float:
        """The time that the step took, from when the device had done what came before it."""
        return self.timer.seconds


@dataclass(frozen=True)
class _Start:
    """A step that is resolved, and the segments that ran for it before it was."""

    step: Step
    made: dict[str, Tensor] = field(default_factory=dict)
    ran: tuple[str, ...] = ()
    cached_inputs: frozenset[str] = frozenset()


class Executor:
    """The state of one call: its schedule, and the features inherited from its earlier steps.

    Args:
        networks: loaded segments of each UNet, by the names that the schedule uses.
        schedule: a plan laid out for this call, which was checked with ``check_runs``.
        graphs: recordings of the UNets' steps, which this call has until its last step or ``close``. Where another call has them,
            steps run piece by piece.
        swapper: sees to it that a step's UNet is on the device; without one, all are.
    """

    def __init__(
        self,
        networks: Mapping[str, LoadedBundle],
        schedule: Schedule,
        graphs: CudaGraphCache | None = None,
        swapper: Swapper | None = None,
    ) -> None:
        self._networks, self._schedule, self._swapper = networks, schedule, swapper
        self._cache: dict[str, Tensor] = {}
        self._graphs = graphs if graphs is not None and graphs.take() else None
        self._release = weakref.finalize(self, self._graphs.release) if self._graphs else lambda: None

    def close(self) -> None:
        """Let another call have the graphs; nothing of this one may follow. A call that comes to its end needs no closing."""
        self._graphs = None
        self._release()

    def step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        """Predict the noise (or velocity) of one step.

        Args:
            index: number of the model evaluation, counted by the caller from 0. Steps must be taken in order.
            sample: (rows, channels, height, width), scaled for the model.
            timestep: (1,), float32.
            text: (rows, tokens, width).

        Returns:
            The prediction, shaped as ``sample``, and what was done for it.

        Raises:
            BundleError, EngineError: the UNet has to be loaded again and cannot be.
        """
        unet = self._schedule.unet(index)
        with self._swapper.pinned(unet) if self._swapper else nullcontext(0.0) as swap_seconds:
            prediction, record = self._step(index, sample, timestep, text)
        return prediction, replace(record, swap_seconds=swap_seconds)

    def _step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        timer = Timer(sample.device)
        given = {SAMPLE: sample, TIMESTEP: timestep, TEXT: text}
        threshold = self._schedule.pending_threshold(index)
        start = _Start(self._schedule.resolve(index)) if threshold is None else self._probe(index, threshold, given)
        step, made = start.step, start.made
        network, subgraph = self._network(step.unet), self._schedule.subgraph(step, frozenset(made))
        # What this step refreshes is freed first, so that old and new are never held together.
        for name in step.keep.intersection(self._cache):
            del self._cache[name]
        result = network.run(subgraph, self._with_cached(given, subgraph.cached_inputs), made)
        later = self._schedule.read_later(index)
        self._cache |= {name: result[name] for name in step.keep}
        self._cache = {name: tensor for name, tensor in self._cache.items() if name in later}
        timer.stop()
        if index == self._schedule.steps - 1:
            self.close()
        record = StepRecord(
            index=index,
            timestep=self._schedule.timesteps[index],
            unet=step.unet,
            kind="key" if step.key else "inherit",
            ran=(*start.ran, *subgraph.segment_names),
            inherited=tuple(sorted(start.cached_inputs | subgraph.cached_inputs)),
            timer=timer,
        )
        return result[NOISE], record

    def _probe(self, index: int, threshold: Threshold, given: Mapping[str, Tensor]) -> _Start:
        """Compute an adaptive rule's feature and compare it with the last key step's; the step continues from it.

        While the answer is on its way from the device, what runs whatever it is has been started.
        """
        name, schedule = threshold.feature, self._schedule
        network, probe = self._network(schedule.unet(index)), schedule.probe(index, threshold)
        made: dict[str, Tensor] = {}
        network.run_all(probe.segments, self._with_cached(given, probe.cached_inputs), made)
        change = DeferredComparison(self._cache[name], made[name], threshold.above)
        less, more = schedule.resolve(index, changed=False), schedule.resolve(index, changed=True)
        ahead = schedule.common_prefix(index, frozenset(made))
        cached = more.inherited.intersection(name for segment in ahead for name in segment.inputs)
        network.run_all(ahead, self._with_cached(given, cached), made)
        ran = tuple(segment.name for segment in (*probe.segments, *ahead))
        return _Start(more if change else less, made, ran, probe.cached_inputs | cached)

    def _network(self, unet: str) -> LoadedBundle | GraphedNetwork:
        network = self._networks[unet]
        return self._graphs.of(unet, network) if self._graphs else network

    def _with_cached(self, given: Mapping[str, Tensor], names: frozenset[str]) -> dict[str, Tensor]:
        return {**given, **{name: self._cache[name] for name in names}}
