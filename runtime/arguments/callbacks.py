"""Functions that a call runs after its steps: ours, and diffusers' ``callback_on_step_end``."""

from collections.abc import Callable
from typing import Any

from torch import Tensor

from runtime.errors import RequestError

__all__ = ["StepEnd", "checked_callback", "diffusers_callback"]

StepEnd = Callable[[int, Tensor, dict[str, Any]], dict[str, Any]]
"""Takes the number of a step, its timestep and ``{"latents": ...}``, and returns those with which the next step begins."""

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
    if inputs is not None and not (isinstance(inputs, list | tuple) and set(inputs) <= {"latents"}):
        raise RequestError(f"callback_on_step_end_tensor_inputs = {inputs!r:.60}; only ['latents'] can be had")
    if checked is None:
        return None

    def step_end(index: int, timestep: Tensor, tensors: dict[str, Any]) -> dict[str, Any]:
        returned = checked(pipeline, index, timestep, tensors)
        if not isinstance(returned, dict):
            raise RequestError(
                f"callback_on_step_end returned a {type(returned).__name__}; return the dict that it was given, changed or not"
            )
        return {"latents": _like(tensors["latents"], returned.get("latents", tensors["latents"]))}

    return step_end


def _like(given: Tensor, returned: Any) -> Tensor:
    """The latents that a callback returns, of the kind of those that it was given."""
    if not isinstance(returned, Tensor) or returned.shape != given.shape or not returned.is_floating_point():
        got = f"{returned.dtype} {tuple(returned.shape)}" if isinstance(returned, Tensor) else f"a {type(returned).__name__}"
        raise RequestError(
            f"callback_on_step_end returned latents of {got}; return floating ones of shape {tuple(given.shape)}, or none"
        )
    return returned.to(given)
