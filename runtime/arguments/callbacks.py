"""Functions that a call runs after its steps: ours, and diffusers' ``callback_on_step_end``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from runtime.errors import RequestError

__all__ = ["StepEnd", "checked_callback", "diffusers_callback"]

StepEnd = Callable[[int, Tensor, dict[str, Any]], dict[str, Any]]
"""Takes the number of a step, its timestep and ``{"latents": ...}``, and returns what is to be gone on with."""

_TAKES = {
    "callback": "a StepRecord and the latents",
    "callback_on_step_end": "the pipeline, the step's number, the timestep and a dict, which it returns",
}


def checked_callback(name: str, callback: Any) -> Any:
    """A callback as it was given; raises RequestError for what cannot be called."""
    if callback is not None and not callable(callback):
        raise RequestError(f"{name} is a {type(callback).__name__}; give a function of {_TAKES[name]}")
    return callback


def diffusers_callback(pipeline: Any, callback: Any, inputs: Any) -> StepEnd | None:
    """diffusers' ``callback_on_step_end``, which is given the pipeline and changes the latents if it returns others.

    Raises:
        RequestError: no function, or other tensors than the latents are asked for; later, where it returns no dict.
    """
    checked = checked_callback("callback_on_step_end", callback)
    if inputs is not None and list(inputs) not in ([], ["latents"]):
        raise RequestError(f"callback_on_step_end_tensor_inputs = {inputs!r:.60}; only ['latents'] can be had")
    if checked is None:
        return None

    def step_end(index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        returned = checked(pipeline, index, timestep, tensors)
        if not isinstance(returned, dict):
            raise RequestError(
                f"callback_on_step_end returned a {type(returned).__name__}; return the dict that it was given, changed or not"
            )
        return returned

    return step_end
