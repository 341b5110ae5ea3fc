"""What a single gap between key steps does to the final latents, all else being computed."""

from collections.abc import Callable, Iterator
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
from tuning.planning.pictures import Pictures

__all__ = ["LONGEST", "Trajectories", "gaps_of"]

LONGEST = 6
"""Steps from a key step to the next, at most."""


def gaps_of(steps: int) -> Iterator[tuple[int, int]]:
    """Key step and next key step of every gap in which some step inherits."""
    for key in range(steps):
        yield from ((key, following) for following in range(key + 2, min(steps, key + LONGEST) + 1))


@dataclass(frozen=True)
class _Moment:
    """A trajectory before a step: latents, the scheduler's own state, and its random numbers' state."""

    latents: Tensor
    scheduler: Any
    generators: list[Tensor]


class _From(Executor):
    """Runs a schedule from a later step on, which must be a key step of every rule."""

    first = 0

    def step(self, index: int, sample: Tensor, timestep: Tensor, text: Tensor) -> tuple[Tensor, StepRecord]:
        """As ``Executor.step``, for an index that is counted from ``first``."""
        return super().step(self.first + index, sample, timestep, text)


class Trajectories:
    """The trajectories of ``full``, which can be gone on with from every step under another plan.

    Args:
        pictures: whose trajectories.
        tick: called after every step of ``full``.
    """

    def __init__(self, pictures: Pictures, tick: Callable[[], None] = lambda: None) -> None:
        self._pictures, self._pipeline = pictures, pictures.pipeline
        self._runs = [self._full(request, tick) for request in pictures.requests]

    def error(self, plan: Plan, first: int) -> float:
        """Mean squared error of the final latents to those of ``full``, where a plan is followed from a step on."""
        squares = [
            self._error(request, *run, plan, first) for request, run in zip(self._pictures.requests, self._runs, strict=True)
        ]
        return float(torch.cat(squares).mean())

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

    def _error(self, request: Request, moments: list[_Moment], target: Tensor, plan: Plan, first: int) -> Tensor:
        moment = moments[first]
        prepared = replace(self._pipeline.prepare(replace(request, plan=plan)), scheduler=deepcopy(moment.scheduler))
        generators = [torch.Generator().set_state(state) for state in moment.generators]
        start = InitialState(moment.latents, prepared.timesteps[first:], generators)
        return (self._denoise(prepared, request, start, first) - target).square().mean((1, 2, 3))

    def _denoise(self, prepared: Prepared, request: Request, start: InitialState, first: int, note: Any = None) -> Tensor:
        pipeline = self._pipeline
        executor = _From(pipeline.networks, prepared.schedule, pipeline.graphs, pipeline.swapper)
        executor.first = first
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
