"""The denoising loop: a scheduler's steps, each with a prediction of the UNet, with or without guidance."""

from collections.abc import Callable

import torch
from torch import Tensor

from runtime.arguments.callbacks import StepEnd
from runtime.execution.executor import Executor, StepRecord
from runtime.images.initial_latents import InitialState
from runtime.images.schedulers import advance, step_options
from runtime.prepared import Prepared

__all__ = ["Callback", "denoise"]

Callback = Callable[[StepRecord, Tensor], None]
"""Called after every model evaluation with its record and the latents (images, channels, height, width).

On a GPU the evaluation has only been started: what reads the latents or the record's seconds waits for it."""


def denoise(
    executor: Executor,
    prepared: Prepared,
    text: Tensor,
    start: InitialState,
    device: torch.device,
    callback: Callback | None = None,
    step_end: StepEnd | None = None,
) -> tuple[Tensor, list[StepRecord]]:
    """Final latents (images, channels, height, width), and the record of every step.

    The step index is counted here: schedulers may visit a timestep twice.

    Args:
        executor: runs the UNet by the request's plan.
        prepared: the request, with its scheduler.
        text: text features of a UNet call (rows, tokens, width); with guidance the negative rows come first.
        start: the first latents, and what inpainting keeps.
        device: where the UNet runs.
        callback: called after every step; what it raises ends the loop.
        step_end: called after every step, before ``callback``; the next step begins with the latents that it returns.

    Raises:
        RequestError: the scheduler stumbles over its configuration.
    """
    scheduler, scale = prepared.scheduler, prepared.guidance_scale
    records, latents, options = [], start.latents, step_options(scheduler, start.generators)
    # The scheduler looks things up by timestep on the host; the UNet's copies are made here, for each would be waited for.
    when = start.timesteps.to(device, torch.float32)
    for index, timestep in enumerate(start.timesteps):
        scaled = scheduler.scale_model_input(latents, timestep)
        sample = torch.cat([scaled, scaled]) if prepared.guided else scaled
        prediction, record = executor.step(index, sample, when[index : index + 1], text)
        if prepared.guided:
            negative, positive = prediction.chunk(2)
            prediction = negative + scale * (positive - negative)
            if prepared.request.guidance_rescale:
                prediction = _rescaled(prediction, positive, prepared.request.guidance_rescale)
        latents = advance(scheduler, prediction, timestep, latents, options)
        if start.repaint is not None:
            latents = start.repaint.blend(latents, index)
        records.append(record)
        if step_end is not None:
            latents = step_end(index, timestep, {"latents": latents})["latents"]
        if callback is not None:
            callback(record, latents)
    return latents, records


def _rescaled(prediction: Tensor, positive: Tensor, share: float) -> Tensor:
    """A guided prediction brought towards the deviation of that for the prompt alone (Lin et al., arXiv 2305.08891, 3.4)."""
    dimensions = list(range(1, positive.ndim))
    brought = prediction * (positive.std(dimensions, keepdim=True) / prediction.std(dimensions, keepdim=True))
    return share * brought + (1 - share) * prediction
