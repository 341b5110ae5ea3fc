"""The error in the final latents from a single gap between key steps, all other steps being computed."""

from collections.abc import Callable
from contextlib import closing
from copy import deepcopy
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from runtime.execution.denoising import denoise
from runtime.execution.executor import Executor, StepRecord
from runtime.images.initial_latents import InitialState, from_noise, generators_of
from runtime.plans.plan import Plan
from runtime.plans.presets import find_plan
from runtime.prepared import Prepared, latent_shape
from runtime.request import Request
from tuning.planning.evaluation import Pictures, typical_error

__all__ = ["Trajectories"]


@dataclass(frozen=True)
class _Moment:
    """A trajectory before a step: latents, the scheduler's own state, and its random numbers' state."""

    latents: Tensor
    scheduler: Any
    generators: list[Tensor]


class _From(Executor):
    """Runs a schedule from a later step on, which must be a key step of every rule."""

    def __init__(self, executor: Executor, first: int) -> None:
        self._whole, self._first = executor, first

    def step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        """As ``Executor.step``, for an index that is counted from the first step that runs."""
        return self._whole.step(self._first + index, sample, timestep, text)

    def close(self) -> None:
        """As ``Executor.close``."""
        self._whole.close()


class Trajectories:
    """The trajectories of ``full``, which can be resumed from every step under another plan.

    Args:
        pictures: whose trajectories.
        tick: called after every step of ``full``.
    """

    def __init__(self, pictures: Pictures, tick: Callable[[], None] = lambda: None) -> None:
        self._pictures, self._pipeline = pictures, pictures.pipeline
        self._runs = [self._full(request, tick) for request in pictures.requests]

    def error(self, plan: Plan, first: int) -> float:
        """The typical error of the final latents to those of ``full``, where a plan is followed from a step on."""
        calls = zip(self._pictures.requests, self._runs, strict=True)
        latents = [self._latents(request, moments[first], plan, first) for request, (moments, _) in calls]
        return typical_error(torch.cat(latents), torch.cat([target for _, target in self._runs]))

    def _full(self, request: Request, tick: Callable[[], None]) -> tuple[list[_Moment], Tensor]:
        prepared = self._pipeline.prepare(replace(request, plan=find_plan("full")))
        generators = generators_of(request.picture_seeds)
        shape = latent_shape(self._pipeline.manifest, prepared.height, prepared.width)
        start = from_noise(prepared.scheduler, shape, generators, self._pipeline.engine.device)
        moments = [_moment(start.latents, prepared.scheduler, generators)]

        def note(record: StepRecord, latents: Tensor) -> None:
            moments.append(_moment(latents, prepared.scheduler, generators))
            tick()

        latents = self._denoise(prepared, request, start, 0, note)
        return moments, latents

    def _latents(self, request: Request, moment: _Moment, plan: Plan, first: int) -> Tensor:
        prepared = replace(self._pipeline.prepare(replace(request, plan=plan)), scheduler=deepcopy(moment.scheduler))
        generators = [torch.Generator().set_state(state) for state in moment.generators]
        start = InitialState(moment.latents, prepared.timesteps[first:], generators)
        return self._denoise(prepared, request, start, first)

    def _denoise(self, prepared: Prepared, request: Request, start: InitialState, first: int, note: Any = None) -> Tensor:
        pipeline = self._pipeline
        executor = _From(pipeline.executor(prepared.schedule), first)
        with pipeline.streams.one(), pipeline.swapper.exclusive(), closing(executor):
            latents, _ = denoise(executor, prepared, _text(request, prepared), start, pipeline.engine.device, note)
            return latents.cpu()


def _moment(latents: Tensor, scheduler: Any, generators: list[torch.Generator]) -> _Moment:
    return _Moment(latents, deepcopy(scheduler), [generator.get_state() for generator in generators])


def _text(request: Request, prepared: Prepared) -> Tensor:
    """Text features of a UNet call."""
    text, negative = request.prompt_embeds, request.negative_prompt_embeds
    assert text is not None
    assert negative is not None
    return torch.cat([negative.expand(len(text), -1, -1), text]) if prepared.guided else text
