"""``POST /v1/images/generations``: pictures in the form of OpenAI's image API, which many clients speak.

Beside OpenAI's fields it takes ours: ``negative_prompt``, ``steps``, ``guidance_scale``, ``seed``, ``scheduler``, ``plan``. Sizes
are WIDTHxHEIGHT there, as nowhere else in this project.
"""

import time
from collections.abc import Mapping
from typing import Any

from engines.support.cli import parse_size
from engines.support.spelling import did_you_mean
from runtime import RequestError
from serving.http.asked import Asked, optional_text, request_from, schema_of
from serving.http.native import pictures_of
from serving.limits import Limits
from serving.queueing.ticket import Made

__all__ = ["SCHEMA", "read", "tell"]

_OURS = ("negative_prompt", "steps", "guidance_scale", "seed", "scheduler", "plan")
_UNREAD = {"user", "safety_identifier", "quality", "style", "moderation", "output_compression"}
"""Taken and not used: there is one quality, and nobody's name is needed."""
_ONLY: dict[str, tuple[object, ...]] = {
    "response_format": ("b64_json",),
    "output_format": ("png",),
    "background": ("auto", "opaque"),
    "stream": (False,),
    "partial_images": (0,),
}
"""Fields of which only these values can be had."""
_SIZE = {"type": "string", "default": "auto", "description": "WIDTHxHEIGHT in pixels; auto for the model's first size"}
SCHEMA = schema_of(
    {
        "model": {"type": "string", "description": "one of GET /v1/models; the first one without it"},
        "prompt": {"type": "string"},
        "n": {"type": "integer", "default": 1, "minimum": 1, "description": "pictures; each has a seed of its own"},
        "size": _SIZE,
        **{name: {"enum": list(values), "default": values[0]} for name, values in _ONLY.items()},
        **{name: {"description": "taken and not used"} for name in sorted(_UNREAD)},
    },
    _OURS,
)
SCHEMA["properties"]["seed"]["default"] = None


def read(given: Mapping[str, Any], limits: Limits) -> Asked:
    """The request that fields make; raises RequestError and PlanError for what cannot be made."""
    for name in given:
        if name not in SCHEMA["properties"]:
            raise RequestError(f"unknown parameter {name!r:.60}; {did_you_mean(name, SCHEMA['properties'])}/docs lists them")
    for name, values in _ONLY.items():
        value = given.get(name)
        if value is not None and not any(type(value) is type(one) and value == one for one in values):
            allowed = ", ".join(map(repr, values))
            raise RequestError(f"{name} = {value!r:.60}; this service gives {allowed} alone")
    if not isinstance(given.get("prompt"), str):
        raise RequestError("prompt is missing or no text; give one text (lists go to /generate)")
    height, width = _size(optional_text(given, "size"))
    fields = {name: given[name] for name in ("prompt", *_OURS) if given.get(name) is not None}
    count = given.get("n")
    options = {**fields, "height": height, "width": width, "seed": given.get("seed")}
    return Asked(optional_text(given, "model"), request_from({**options, "num_images": 1 if count is None else count}, limits))


def _size(text: str | None) -> tuple[int | None, int | None]:
    """Height and width of ``512x768``, which is 768 high."""
    if text is None or text == "auto":
        return None, None
    try:
        width, height = parse_size(text)
    except ValueError as error:
        raise RequestError(f"size {text!r:.60} is no size; write WIDTHxHEIGHT in pixels, such as 512x768, or auto") from error
    return height, width


def tell(asked: Asked, model: str, made: Made) -> dict[str, Any]:
    """The answer, with the seed of each picture beside it."""
    first = made.images[0]
    data = [{"b64_json": text, "seed": seed} for text, seed in zip(pictures_of(made), made.seeds, strict=True)]
    return {"created": int(time.time()), "data": data, "output_format": "png", "size": f"{first.width}x{first.height}"}
