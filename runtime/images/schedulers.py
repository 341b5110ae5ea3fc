"""Noise schedulers by name. They come from diffusers; the bundle has their configuration."""

from importlib import import_module
from pathlib import Path
from typing import Any

from runtime.errors import RequestError

__all__ = ["SCHEDULERS", "check_scheduler", "make_scheduler"]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}

# Stable Diffusion's own PNDM configuration has this. Without it (a folder written for another scheduler) diffusers starts with
# nine Runge-Kutta evaluations more, and cannot take fewer than four steps.
_SETTINGS = {"pndm": {"skip_prk_steps": True}}


def check_scheduler(name: str) -> None:
    """Raise RequestError unless there is a scheduler of that name."""
    if name not in SCHEDULERS:
        raise RequestError(f"unknown scheduler {name!r:.60}; choose from: {', '.join(SCHEDULERS)}")


def make_scheduler(name: str, folder: Path, steps: int) -> Any:
    """A fresh scheduler with its timesteps set.

    Args:
        name: ddim, pndm, dpm++, euler or heun.
        folder: holds ``scheduler_config.json``.
        steps: denoising steps. The model is evaluated ``len(scheduler.timesteps)`` times: once a step, for pndm once more,
            for heun twice for all but the last.

    Raises:
        RequestError: unknown name, or a number of steps that the scheduler cannot take.
    """
    check_scheduler(name)
    scheduler = getattr(import_module("diffusers"), SCHEDULERS[name]).from_pretrained(folder, **_SETTINGS.get(name, {}))
    # Timesteps lie a whole number apart: with more steps than half of those trained they would leave out the noisiest half.
    most = scheduler.config.num_train_timesteps // 2
    if not 1 <= steps <= most:
        raise RequestError(f"steps = {steps}; choose from 1 to {most}")
    scheduler.set_timesteps(steps)
    return scheduler
