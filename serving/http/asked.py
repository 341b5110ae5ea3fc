"""A request's fields as ``runtime.Request``: those that can travel. Nothing in them is the name of a file."""

from collections.abc import Callable, Mapping
from dataclasses import MISSING, fields
from typing import Any, NamedTuple

from pydantic import TypeAdapter

from runtime import PlanError, Request, RequestError
from runtime.arguments.aliases import ALIASES, with_our_names
from runtime.plans.plan import Plan
from runtime.plans.presets import join_presets
from serving.http.pictures import decode_picture
from serving.limits import Limits

__all__ = ["DESCRIPTIONS", "TRAVELS", "Asked", "optional_text", "plan_from", "read_plan", "request_from", "schema_of"]

_STAYS = {"generator", "latents", "prompt_embeds", "negative_prompt_embeds", "output_type"}
"""Fields that cannot be sent: tensors and objects of a process, and the form in which it gets its pictures."""
TRAVELS = tuple(each.name for each in fields(Request) if each.name not in _STAYS)
"""The fields of a request that can be sent."""
_PICTURE = {"type": "string", "contentEncoding": "base64", "description": "a PNG, JPEG or WebP file in base64"}
DESCRIPTIONS = {
    "prompt": "what the picture shows; a list makes num_images of each",
    "negative_prompt": "what it should not show; one text, or one for each prompt",
    "steps": "denoising steps",
    "guidance_scale": "of classifier-free guidance; null for the model's own, 1 or less turns it off",
    "seed": "of the first picture, picture i has seed + i; or a list of each picture's; null draws one",
    "height": "in pixels; null for the image's own, or the model's first size",
    "width": "in pixels; null for the image's own, or the model's first size",
    "num_images": "pictures of each prompt",
    "scheduler": "ddim, pndm, dpm++, euler, heun, euler a, unipc or another",
    "plan": "presets joined by +, such as deepcache:3, or a plan as an object (docs/plans.md)",
    "image": "a picture to start from, in base64",
    "strength": "share of the steps that run on the image, above 0 to 1",
    "mask": "what to repaint of the image, in base64, white where to repaint",
    "allow_nonfinite": "whether numbers that are not finite are let pass",
    "guidance_rescale": "0 to 1, how far a guided prediction is brought towards the prompt's own deviation",
    "long_prompts": "chunks, or cut",
    "clip_skip": "layers that the text encoder leaves out, which the model must be built for",
}
"""The meaning of each field, for the page of the interface."""


class Asked(NamedTuple):
    """The name of a model, or None for the first one, and what is asked of it."""

    model: str | None
    request: Request


def request_from(given: Mapping[str, Any], limits: Limits) -> Request:
    """The request that fields make, by our names or diffusers'.

    Raises:
        RequestError, PlanError: as ``runtime.Request``; or a field that does not travel, or is no field.
    """
    options = with_our_names(given, TRAVELS, "/docs")
    for name in ("image", "mask"):
        if options.get(name) is not None:
            options[name] = decode_picture(name, options[name], limits)
    if "plan" in options:
        options["plan"] = read_plan(options["plan"])
    try:
        return Request(**{"prompt": None, **options})
    except RecursionError as error:
        raise RequestError("the request is nested too deeply to be read") from error


def read_plan(value: Any) -> Plan:
    """A plan from presets or an object; names of files are no presets, and nothing is opened."""
    try:
        plan = plan_from(value, lambda text: join_presets(text, "the plan itself as a JSON object"))
    except RecursionError as error:
        raise PlanError("the plan is nested too deeply to be read") from error
    return plan.model_copy(update={"found": None})  # what it was found for is warned of, once for each: theirs would pile up


def plan_from(value: Any, named: Callable[[str], Plan]) -> Plan:
    """A plan from an object of JSON, or from what ``named`` makes of a text; raises PlanError for anything else."""
    if isinstance(value, str):
        return named(value)
    if not isinstance(value, dict):
        raise PlanError(f"plan is a {type(value).__name__}; give presets such as 'block:3', or the plan as a JSON object")
    return Plan.from_data(value)


def optional_text(given: Mapping[str, Any], name: str) -> str | None:
    """A field that is text or missing; raises RequestError for another type."""
    value = given.get(name)
    if value is not None and not isinstance(value, str):
        raise RequestError(f"{name} is a {type(value).__name__}; give text")
    return value


def schema_of(more: Mapping[str, Any], names: tuple[str, ...] = TRAVELS) -> dict[str, Any]:
    """A JSON schema of fields of a request, with more that stand before them."""
    properties = {**more, **{name: _property(name) for name in names}}
    return {"type": "object", "required": ["prompt"], "properties": properties, "additionalProperties": False}


def _property(name: str) -> dict[str, Any]:
    field = next(each for each in fields(Request) if each.name == name)
    if name in {"image", "mask"}:
        schema: dict[str, Any] = dict(_PICTURE)
    elif name == "plan":
        schema = {"anyOf": [{"type": "string"}, {"type": "object"}]}
    else:
        kind: Any = field.type
        schema = TypeAdapter(kind).json_schema()
    if field.default is not MISSING:
        schema["default"] = field.default
    aliases = [alias for alias, ours in ALIASES.items() if ours == name]
    schema["description"] = DESCRIPTIONS[name] + "".join(f" (also {alias})" for alias in aliases)
    return schema
