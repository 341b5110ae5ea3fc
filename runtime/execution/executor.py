"""Runs a schedule's steps on loaded segments. What runs is decided by ``demand``; what is inherited is kept here.

A step starts from the noise prediction and asks backwards. What later steps inherit is kept as the engine wrote it, without a
copy; what nobody will read any more is freed at once.
"""

import weakref
from collections.abc import Mapping
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from engines.bundle.names import NOISE, SAMPLE, TEXT, TIMESTEP
from runtime.execution.deferred_comparison import DeferredComparison
from runtime.execution.device_events import Timer
from runtime.execution.feature_cache import FeatureCache, prompt_half
from runtime.execution.graph_cache import CudaGraphCache, GraphedNetwork
from runtime.execution.loaded_bundle import LoadedBundle
from runtime.execution.swapping import Swapper
from runtime.images.prediction_spaces import PredictionSpaces
from runtime.plans.key_steps import Threshold
from runtime.plans.schedule import Schedule, Step

__all__ = ["Executor", "LoadedBundle", "StepRecord"]


@dataclass(frozen=True)
class StepRecord:
    """A model evaluation: the segments that it ran and the features that it inherited.

    ``ran`` names the segments that ran, in order; ``inherited`` the features that they took from earlier steps. On a GPU the host
    goes ahead of the device: reading ``seconds`` waits until the step has been done there. Where the device cannot hold all UNets
    at once, ``swap_seconds`` is what it took to swap this one in for another before the step.
    """

    index: int
    timestep: float
    unet: str
    kind: str
    ran: tuple[str, ...]
    inherited: tuple[str, ...]
    half: bool = field(default=False, kw_only=True)
    """Whether only the half of guidance that is the prompt's was evaluated."""
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
            steps run segment by segment.
        swapper: sees to it that a step's UNet is on the device; without one, all are.
        spaces: turns predictions into noise or pictures; for plans that carry these from step to step.
    """

    def __init__(
        self,
        networks: Mapping[str, LoadedBundle],
        schedule: Schedule,
        graphs: CudaGraphCache | None = None,
        swapper: Swapper | None = None,
        spaces: PredictionSpaces | None = None,
    ) -> None:
        self._networks, self._schedule, self._swapper, self._spaces = networks, schedule, swapper, spaces
        self._graphs = graphs if graphs is not None and graphs.take() else None
        self._release = weakref.finalize(self, self._graphs.release) if self._graphs else lambda: None
        self._cache = FeatureCache(schedule, overwritten=self._graphs is not None)
        self._difference: Tensor | None = None
        """Of the last step with both halves of guidance: the noise for the prompt less that for the negative prompt."""

    def close(self) -> None:
        """Let another call have the graphs; nothing of this one may follow. A call that comes to its end needs no closing."""
        self._graphs = None
        self._release()

    def step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        """Predict the noise (or velocity) of one step.

        Args:
            index: number of the model evaluation, counted by the caller from 0. Steps must be taken in order.
            sample: (rows, channels, height, width), scaled for the model. With guidance, negative prompts' rows come first.
            timestep: (1,), float32.
            text: (rows, tokens, width).

        Returns:
            The prediction, shaped as ``sample``, and what was done for it.

        Raises:
            BundleError, EngineError: the UNet has to be loaded again and cannot be.
        """
        if self._swapper is None:
            return self._step(index, sample, timestep, text)
        with self._swapper.pinned(self._schedule.unet(index)) as swap_seconds:
            prediction, record = self._step(index, sample, timestep, text)
        return prediction, replace(record, swap_seconds=swap_seconds)

    def _step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        timer = Timer(sample.device)
        half = self._schedule.resolve(index).half
        given = {SAMPLE: sample, TIMESTEP: timestep, TEXT: text}
        if half:
            given |= {SAMPLE: prompt_half(sample), TEXT: prompt_half(text)}
        threshold = self._schedule.pending_threshold(index)
        start = _Start(self._schedule.resolve(index)) if threshold is None else self._probe(index, threshold, given)
        step, made = start.step, start.made
        subgraph = self._schedule.subgraph(step, frozenset(made))
        self._cache.make_room(step)
        inherited, elsewhere = self._inherited(step, subgraph.cached_inputs)
        result = self._network(step.unet).run(subgraph, given | inherited, made, elsewhere)
        prediction = self._prediction(step, sample, result)
        for name in step.keep:
            self._keep(step, name, result[name], sample)
        self._cache.end(index)
        timer.stop()
        if index == self._schedule.steps - 1:
            self.close()
        record = StepRecord(
            index=index,
            timestep=self._schedule.timesteps[index],
            unet=step.unet,
            kind=step.kind,
            ran=(*start.ran, *subgraph.segment_names),
            inherited=tuple(sorted(start.cached_inputs | subgraph.cached_inputs)),
            half=step.half,
            timer=timer,
        )
        return prediction, record

    def _probe(self, index: int, threshold: Threshold, given: Mapping[str, Tensor]) -> _Start:
        """Compute an adaptive rule's feature and compare it with the last key step's; the step continues from it.

        While the answer is on its way from the device, what runs whatever it is has been started.
        """
        name, schedule = threshold.feature, self._schedule
        network, probe = self._network(schedule.unet(index)), schedule.probe(index, threshold)
        less, more = schedule.resolve(index, changed=False), schedule.resolve(index, changed=True)
        made: dict[str, Tensor] = {}
        inherited, elsewhere = self._inherited(more, probe.cached_inputs)
        network.run_all(probe.segments, {**given, **inherited}, made, elsewhere)
        before, half = self._cache.last(name, schedule.is_half(more, name))
        now = prompt_half(made[name]) if half and not schedule.is_half(more, name) else made[name]
        change = DeferredComparison(before, now, threshold.above)
        ahead = schedule.common_prefix(index, frozenset(made))
        cached = more.inherited.intersection(name for segment in ahead for name in segment.inputs)
        inherited, elsewhere = self._inherited(more, cached)
        network.run_all(ahead, {**given, **inherited}, made, elsewhere)
        ran = tuple(segment.name for segment in (*probe.segments, *ahead))
        return _Start(more if change else less, made, ran, probe.cached_inputs | cached)

    def _network(self, unet: str) -> LoadedBundle | GraphedNetwork:
        network = self._networks[unet]
        return self._graphs.of(unet, network) if self._graphs else network

    def _inherited(self, step: Step, names: frozenset[str]) -> tuple[dict[str, Tensor], frozenset[str]]:
        """Features that a step takes from the cache, and those of them that lie elsewhere at every step."""
        read = {name: self._cache.read(step, name) for name in names}
        elsewhere = frozenset(name for name, (_, new) in read.items() if new)
        return {name: tensor for name, (tensor, _) in read.items()}, elsewhere

    def _prediction(self, step: Step, sample: Tensor, result: Mapping[str, Tensor]) -> Tensor:
        """The prediction for all rows. A carried one is turned back into what the model predicts; a missing half is filled in."""
        prediction = result[NOISE]
        if NOISE in step.inherited:
            rows = prompt_half(sample) if self._schedule.guided else sample
            prediction = self._in_space(step, prediction, rows, back=True)
        guidance = self._schedule.plan.guidance
        if guidance is None or not self._schedule.guided:
            return prediction
        assert self._spaces is not None
        scale = self._spaces.noise_scale(self._schedule.timesteps[step.index])
        if step.half or NOISE in step.inherited:
            assert self._difference is not None
            return torch.cat([prediction - guidance.scale / scale * self._difference, prediction])
        self._difference = scale * (prompt_half(prediction) - prediction[: len(prediction) // 2])
        return prediction

    def _keep(self, step: Step, name: str, tensor: Tensor, sample: Tensor) -> None:
        if name != NOISE:
            self._cache.write(step, name, tensor)
            return
        if self._schedule.guided:
            sample = prompt_half(sample)
            tensor = tensor if step.half else prompt_half(tensor)
        self._cache.write(step, name, self._in_space(step, tensor, sample), own=True)

    def _in_space(self, step: Step, prediction: Tensor, sample: Tensor, back: bool = False) -> Tensor:
        """A prediction in the space in which its rule carries it; with ``back``, a carried one in the model's own space."""
        predict = self._schedule.predict(step.unet, NOISE)
        if predict is None or predict.space == "raw":
            return prediction
        assert self._spaces is not None
        turn = self._spaces.back if back else self._spaces.to
        return turn(predict.space, prediction, sample, self._schedule.timesteps[step.index])
