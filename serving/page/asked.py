"""The controls that a visitor set, as a request. Whatever a browser sends is checked here or by ``Request``."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from PIL import Image

from engines import Manifest
from engines.support.cli import parse_size
from runtime import Plan, Request, RequestError

__all__ = ["MOST_STEPS", "Asked", "image_and_mask", "size_names"]

MOST_STEPS = 100
"""Of a call on the page."""
_MOST_TEXT = 2000
"""Characters of a prompt on the page."""


@dataclass(frozen=True)
class Asked:
    """The page's controls, as the browser has them; ``plan`` was found for its name already."""

    prompt: Any
    plan: Plan
    negative: Any = ""
    seed: Any = 0
    steps: Any = 20
    size: Any = None
    scheduler: Any = "dpm++"
    guidance: Any = None
    edited: Mapping[str, Any] | None = None
    strength: Any = 0.6
    preview: Any = 0
    compare: Any = False

    def request(self, manifest: Manifest) -> Request:
        """The request for a bundle; raises RequestError or PlanError for what cannot be had."""
        for name, text in (("prompt", self.prompt), ("negative prompt", self.negative)):
            if isinstance(text, str) and len(text) > _MOST_TEXT:
                raise RequestError(f"the {name} has {len(text)} characters; the page takes {_MOST_TEXT}")
        image, mask = image_and_mask(self.edited)
        height, width = _size(self.size, manifest)
        request = Request(
            self.prompt,
            self.negative,
            steps=self.steps,
            guidance_scale=self.guidance,
            seed=self.seed,
            height=height,
            width=width,
            scheduler=self.scheduler.strip() if isinstance(self.scheduler, str) else self.scheduler,
            plan=self.plan.model_copy(update={"found": None}),  # the page itself tells what it was found for
            image=image,
            mask=mask,
            strength=self.strength,
        )
        if request.images != 1:
            raise RequestError(f"{request.images} prompts; the page makes one picture at a time")
        if request.steps > MOST_STEPS:
            raise RequestError(f"steps = {request.steps}; the page takes {MOST_STEPS} at most")
        return request


def size_names(manifest: Manifest) -> list[str]:
    """The bundle's sizes, HEIGHTxWIDTH in pixels, its first one first."""
    return [f"{height}x{width}" for height, width in manifest.sizes]


def _size(name: Any, manifest: Manifest) -> tuple[int, int]:
    if name is None:
        return manifest.sizes[0]
    if name not in size_names(manifest):
        raise RequestError(f"size {name!r:.40}; this bundle's sizes are {', '.join(size_names(manifest))}")
    return parse_size(name)


def image_and_mask(edited: Mapping[str, Any] | None) -> tuple[Image.Image | None, Image.Image | None]:
    """The picture in the editor, in RGB, and what was painted over it as a mask (L, white where); None for what there is not.

    Raises:
        RequestError: something was painted on no picture.
    """
    background = None if edited is None else edited.get("background")
    layers = [] if edited is None else [layer.convert("RGBA") for layer in edited.get("layers") or ()]
    painted = [layer for layer in layers if np.asarray(layer.getchannel("A")).max(initial=0) >= 128]
    if background is None or np.asarray(background.convert("RGBA").getchannel("A")).max(initial=0) == 0:
        if painted:
            raise RequestError("something is painted where no picture is; open a picture first, and paint what is to change")
        return None, None
    if not painted:
        return background.convert("RGB"), None
    alpha = np.max([np.asarray(layer.resize(background.size).getchannel("A")) for layer in painted], axis=0)
    return background.convert("RGB"), Image.fromarray(np.where(alpha >= 128, 255, 0).astype(np.uint8), "L")
