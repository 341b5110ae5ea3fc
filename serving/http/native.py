"""``POST /generate``: all of ``runtime.Request`` that can travel, and all that is known of the result."""

from collections.abc import Mapping
from typing import Any

from serving.http.asked import Asked, optional_text, request_from, schema_of
from serving.http.pictures import encode_picture
from serving.limits import Limits
from serving.queueing.ticket import Made

__all__ = ["SCHEMA", "read", "tell"]

SCHEMA = schema_of({"model": {"type": "string", "description": "one of GET /v1/models; the first one without it"}})
"""Of the request, made from the fields of ``runtime.Request``."""
_OURS = {"source", "vae", "loras"}
"""Told of pictures by ``Generation.made_from``, and not sent: they may name files of the machine that built the bundle."""


def read(given: Mapping[str, Any], limits: Limits) -> Asked:
    """The request that fields make; raises RequestError and PlanError for what cannot be made."""
    fields = {name: value for name, value in given.items() if name != "model"}
    return Asked(optional_text(given, "model"), request_from(fields, limits))


def tell(asked: Asked, model: str, made: Made) -> dict[str, Any]:
    """The answer: pictures as PNG files in base64, and what ran for them."""
    first = made.images[0]
    return {
        "model": model,
        "images": pictures_of(made),
        "seeds": list(made.seeds),
        "height": first.height,
        "width": first.width,
        "scheduler": asked.request.scheduler,
        "guidance_scale": made.guidance_scale,
        "plan": made.plan.name,
        "steps": [
            {
                "index": record.index,
                "timestep": record.timestep,
                "unet": record.unet,
                "kind": record.kind,
                "ran": list(record.ran),
                "inherited": list(record.inherited),
                "half": record.half,
                "seconds": round(record.seconds, 6),
            }
            for record in made.steps
        ],
        "seconds": round(made.seconds, 6),
        "waited_seconds": round(made.waited, 6),
        "batches": list(made.batches),
        "not_read": list(made.unread),
    }


def pictures_of(made: Made) -> list[str]:
    """The pictures in base64, with what they were made from in their files."""
    return [
        encode_picture(image, {name: value for name, value in told.items() if name not in _OURS})
        for image, told in zip(made.images, made.made_from, strict=True)
    ]
