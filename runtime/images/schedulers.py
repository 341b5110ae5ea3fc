"""Noise schedulers by name. They come from diffusers; the bundle has their configuration.

diffusers' pipelines correct a scheduler's configuration when they are loaded. The corrections depend on the task and on the
scheduler that was chosen, so a bundle keeps the configuration as its source has it, and they are made here for every call.
"""

import inspect
import json
from importlib import import_module
from pathlib import Path
from typing import TYPE_CHECKING, Any

from engines import BundleError
from engines.lazy import postponed
from engines.support.spelling import did_you_mean
from runtime.errors import RequestError

if TYPE_CHECKING:  # names of schedulers are asked for by commands that draw nothing
    import torch
    from torch import Tensor

    from runtime.images.prediction_spaces import PredictionSpaces

__all__ = [
    "SCHEDULERS",
    "advance",
    "check_scheduler",
    "make_scheduler",
    "read_prediction_type",
    "read_spaces",
    "read_train_steps",
    "step_options",
    "usual_name",
]

SCHEDULERS = {
    "ddim": "DDIMScheduler",
    "pndm": "PNDMScheduler",
    "dpm++": "DPMSolverMultistepScheduler",
    "euler": "EulerDiscreteScheduler",
    "heun": "HeunDiscreteScheduler",
}
_OTHERS = {
    "ddim parallel": "DDIMParallelScheduler",
    "ddpm": "DDPMScheduler",
    "ddpm parallel": "DDPMParallelScheduler",
    "deis": "DEISMultistepScheduler",
    "dpm++ single": "DPMSolverSinglestepScheduler",
    "dpm2": "KDPM2DiscreteScheduler",
    "dpm2 a": "KDPM2AncestralDiscreteScheduler",
    "euler a": "EulerAncestralDiscreteScheduler",
    "lcm": "LCMScheduler",
    "lms": "LMSDiscreteScheduler",
    "sa": "SASolverScheduler",
    "tcd": "TCDScheduler",
    "unipc": "UniPCMultistepScheduler",
}
"""More that diffusers' pipelines for Stable Diffusion take. Not DPMSolverSDEScheduler: its noise has a seed of its own."""

_USUAL_NAMES = {kind: name for name, kind in (*SCHEDULERS.items(), *_OTHERS.items())}
_NAMES = {**SCHEDULERS, **_OTHERS, **{kind: kind for kind in [*SCHEDULERS.values(), *_OTHERS.values()]}}

_MOST_TRAIN_STEPS = 100_000
_STUMBLES = (IndexError, KeyError, ValueError, TypeError, AttributeError, NotImplementedError, ArithmeticError)


def check_scheduler(name: str) -> None:
    """Raise RequestError unless there is a scheduler of that name."""
    if name in _NAMES:
        return
    if name.isidentifier() and name.endswith("Scheduler") and hasattr(import_module("diffusers"), name):
        raise RequestError(
            f"scheduler {name} is for other models than Stable Diffusion, or draws noise that no seed gives again; "
            f"choose from: {', '.join([*SCHEDULERS, *_OTHERS])}"
        )
    raise RequestError(
        f"unknown scheduler {name!r:.60}; {did_you_mean(name, _NAMES)}choose from: {', '.join(SCHEDULERS)}, "
        f"{', '.join(_OTHERS)}, or a class name of diffusers, such as {_OTHERS['euler a']}"
    )


def usual_name(name: str) -> str:
    """The short name of a scheduler that is called by it or by its class in diffusers; the name itself where it is neither."""
    return _USUAL_NAMES.get(name, name)


def make_scheduler(name: str, folder: Path, steps: int, inpainting: bool = False) -> Any:
    """A fresh scheduler, as diffusers' pipeline for the task has it after loading, with its timesteps set.

    Args:
        name: ddim, pndm, dpm++, euler, heun or another, or a class name of diffusers.
        folder: holds ``scheduler_config.json``.
        steps: denoising steps. The model is evaluated ``len(scheduler.timesteps)`` times: once a step, for pndm once more,
            for heun twice for all but the last.
        inpainting: whether it is for diffusers' pipeline for inpainting, which corrects more.

    Raises:
        RequestError: unknown name, or a number of steps that the scheduler cannot take.
        BundleError: the configuration cannot be read, or is not one for this scheduler.
    """
    import torch

    check_scheduler(name)
    kind = _NAMES[name]
    with torch.device("cpu"):
        scheduler = _load(kind, folder)
        _check_variance(scheduler, folder)
        _correct(scheduler, inpainting)
        _set_timesteps(scheduler, steps, folder)
    return scheduler


def _check_variance(scheduler: Any, folder: Path) -> None:
    """Raise BundleError where a scheduler would take a part of each prediction for a variance, which this UNet does not predict.

    Those that do take a ``variance_type`` and an ``algorithm_type``, and do so where noise is predicted; others leave a
    prediction of the latents' channels as it is.
    """
    kind, taken = scheduler.config.get("variance_type"), inspect.signature(type(scheduler).__init__).parameters
    splits = {"variance_type", "algorithm_type"} <= taken.keys() and scheduler.config.prediction_type == "epsilon"
    if splits and kind in ("learned", "learned_range"):
        path = folder / "scheduler_config.json"
        raise BundleError(f"{path} has variance_type {kind!r}, and this UNet predicts none; expected null, or another scheduler")


def read_train_steps(folder: Path) -> int:
    """The timesteps of the whole noise schedule, 1000 where the configuration does not say; raises BundleError."""
    path = folder / "scheduler_config.json"
    try:
        config = json.loads(path.read_text("utf-8"))
        count = config.get("num_train_timesteps", 1000)
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise BundleError(f"{path} cannot be read as a scheduler's configuration: {_line(error)}") from error
    if type(count) is not int or not 2 <= count <= _MOST_TRAIN_STEPS:
        raise BundleError(f"{path} has num_train_timesteps = {count!r:.60}; expected one from 2 to {_MOST_TRAIN_STEPS}")
    return count


def read_prediction_type(folder: Path) -> str:
    """The model's prediction type, in diffusers' words: ``epsilon``, ``v_prediction`` or ``sample``; raises BundleError."""
    return _read_predictions(folder)[1]


def read_spaces(folder: Path) -> "PredictionSpaces":
    """The conversions of the model's predictions to noise and picture at each timestep; raises BundleError."""
    from runtime.images.prediction_spaces import PredictionSpaces

    return PredictionSpaces(*_read_predictions(folder))


def _read_predictions(folder: Path) -> "tuple[Tensor, str]":
    """The share of the picture in the sample at each timestep (alphas_cumprod), and what the model predicts."""
    from runtime.images.prediction_spaces import PREDICTION_TYPES

    scheduler = _load("DDIMScheduler", folder)
    kind = scheduler.config.prediction_type
    if kind not in PREDICTION_TYPES:
        path = folder / "scheduler_config.json"
        raise BundleError(f"{path} has prediction_type {kind!r:.60}; expected {', '.join(PREDICTION_TYPES)}")
    return scheduler.alphas_cumprod, kind


def _load(kind: str, folder: Path) -> Any:
    """A scheduler with the configuration in a folder.

    A folder written for another scheduler does not say that PNDM should leave out its nine Runge-Kutta evaluations, as in Stable
    Diffusion's own configuration; without them it can take fewer than four steps.
    """
    read_train_steps(folder)
    try:
        config = json.loads((folder / "scheduler_config.json").read_text("utf-8"))
        if kind == "PNDMScheduler" and config.get("_class_name") != kind:
            config.setdefault("skip_prk_steps", True)
        return _configured(_class(kind), config)
    except Exception as error:  # a configuration may come from anybody, and schedulers check little of it
        raise BundleError(
            f"{folder / 'scheduler_config.json'} cannot be read as the configuration of {kind}: {_line(error)}"
        ) from error


def _class(kind: str) -> Any:
    """A scheduler's class, without what its module imports for a few of its settings (scipy) and for models (torch._dynamo)."""
    with postponed("torch._dynamo", "allow_in_graph"), postponed("scipy.stats"):
        return getattr(import_module("diffusers"), kind)


def _configured(kind: Any, config: dict[str, Any]) -> Any:
    """A scheduler as ``from_pretrained`` makes it, which imports all classes that the configuration could be for as well.

    What the class does not take is kept in the configuration, for another class.
    """
    unset = config.pop("_use_default_values", [])
    config = {name: value for name, value in config.items() if name not in unset}
    if not isinstance(config.get("_class_name", ""), str | list):
        raise ValueError("_class_name is no text")
    taken = inspect.signature(kind.__init__).parameters.keys() - {"self", "kwargs", *kind.ignore_for_config}
    chosen = {name: value for name, value in config.items() if name in taken and not name.startswith("_")}
    scheduler = kind(**chosen)
    hidden = {name: value for name, value in config.items() if name not in chosen}
    scheduler.register_to_config(**hidden | ({"_class_name": kind.__name__} if "_class_name" in hidden else {}))
    return scheduler


def _set_timesteps(scheduler: Any, steps: int, folder: Path) -> None:
    """Timesteps lie a whole number apart: with more steps than half of those trained they would leave out the noisiest half."""
    most = scheduler.config.num_train_timesteps // 2
    if not 1 <= steps <= most:
        raise RequestError(f"steps = {steps}; choose from 1 to {most}")
    try:
        scheduler.set_timesteps(steps)
        # Else the first step is looked up by its timestep, and the wrong one found where timesteps come twice.
        if hasattr(scheduler, "set_begin_index"):
            scheduler.set_begin_index(0)
    except Exception as error:  # as in _load
        raise RequestError(
            f"{type(scheduler).__name__} cannot take steps = {steps} as {folder} configures it: {_line(error)}"
        ) from error


def _line(error: Exception) -> str:
    return " ".join(str(error).split())[:300]


def _correct(scheduler: Any, inpainting: bool) -> None:
    """The corrections that diffusers 0.42 makes in ``StableDiffusion...Pipeline.__init__``.

    That for inpainting sets PNDM right and leaves ``clip_sample`` alone, the others do the reverse.
    """
    config = scheduler.config
    if config.get("steps_offset", 1) != 1:
        scheduler.register_to_config(steps_offset=1)
    if not inpainting and config.get("clip_sample", False) is True:
        scheduler.register_to_config(clip_sample=False)
    if inpainting and config.get("skip_prk_steps", True) is False:
        scheduler.register_to_config(skip_prk_steps=True)


def step_options(scheduler: Any, generators: "list[torch.Generator]") -> dict[str, Any]:
    """Arguments of ``scheduler.step``: all that it draws comes from the pictures' own generators, and eta is that of diffusers'
    pipelines, which is not every scheduler's own.
    """
    options = {"generator": generators, "eta": 0.0}
    return {name: value for name, value in options.items() if name in inspect.signature(scheduler.step).parameters}


def advance(scheduler: Any, prediction: "Tensor", timestep: "Tensor", latents: "Tensor", options: dict[str, Any]) -> "Tensor":
    """The latents after a step; raises RequestError where a scheduler stumbles over its own configuration."""
    try:
        following: Tensor = scheduler.step(prediction, timestep, latents, return_dict=False, **options)[0]
    except _STUMBLES as error:
        raise RequestError(
            f"{type(scheduler).__name__} fails at timestep {float(timestep):g} with its configuration: {_line(error)}; "
            "choose another scheduler or number of steps"
        ) from error
    return following
