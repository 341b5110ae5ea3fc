"""A request fitted to a bundle: sizes and guidance filled in, and checked against what bundle and engine take."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from torch import Tensor

from engines import Bundle, Engine, Manifest
from engines.bundle.names import TEXT
from engines.bundle.shapes import size_fault
from runtime.advice import with_clip_skip
from runtime.arguments.values import shown
from runtime.errors import RequestError
from runtime.images.pictures import Original
from runtime.plans.notes import Call
from runtime.plans.schedule import Schedule
from runtime.request import Request
from runtime.text.chunks import described_tokens

__all__ = ["Prepared", "check_clip_skip", "check_shape", "check_tensors", "latent_shape"]


@dataclass(frozen=True)
class Prepared:
    """All that a call needs before anything runs.

    ``sizes`` are those in features' shapes (``sizes_of``). ``scheduler`` has its timesteps set and was told where it begins;
    ``timesteps`` are those that run; ``schedule`` is the plan laid out over them; ``original`` is the picture that image-to-image
    starts from, at the size of the call.
    """

    request: Request
    height: int
    width: int
    guidance_scale: float
    sizes: Mapping[str, int]
    scheduler: Any
    timesteps: Tensor
    schedule: Schedule
    original: Original | None

    @property
    def guided(self) -> bool:
        """Whether there is classifier-free guidance, which doubles the rows of a UNet call."""
        return self.guidance_scale > 1

    @property
    def call(self) -> Call:
        """What the plan is used for, as ``plan_notes`` asks."""
        return Call(self.request.scheduler, self.request.steps, self.guidance_scale, self.guided)


def sizes_of(manifest: Manifest, images: int, height: int, width: int, guidance_scale: float) -> dict[str, int]:
    """Values of ``batch``, ``images``, ``height`` and ``width`` (of latents) in the shapes of features; text is one chunk."""
    _, rows, columns = latent_shape(manifest, height, width)
    return {"batch": images * (2 if guidance_scale > 1 else 1), "images": images, "height": rows, "width": columns}


def latent_shape(manifest: Manifest, height: int, width: int) -> tuple[int, int, int]:
    """Channels, height and width of the latents of a picture of that size in pixels."""
    return manifest.latent_channels, height // manifest.vae_scale, width // manifest.vae_scale


def check_shape(manifest: Manifest, engine: Engine, images: int, height: int, width: int, guidance_scale: float) -> None:
    """Raise RequestError unless number, size and guidance are such as this bundle and engine take."""
    if fault := size_fault((height, width), manifest.size_multiple):
        raise RequestError(f"size {fault}")
    if engine.has_profile and manifest.static:
        _check_static(manifest, engine.name, images, height, width, guidance_scale)
    elif engine.has_profile:
        _check_profile(manifest, engine.name, images, height, width)


def check_clip_skip(bundle: Bundle, engine: str, request: Request) -> None:
    """Raise RequestError unless the bundle's text encoder leaves out as many layers as are asked for, where it is to encode."""
    manifest, asked = bundle.manifest, request.clip_skip
    given = request.prompt_embeds is not None and request.negative_prompt_embeds is not None
    if asked is None or asked == manifest.clip_skip or given:
        return
    raise RequestError(
        f"clip_skip = {shown(asked)}, and the text encoder of {bundle.folder} was built for {manifest.clip_skip}; leave it out, "
        f"or build another bundle: {with_clip_skip(bundle, asked, engine)}"
    )


def check_tensors(manifest: Manifest, request: Request, tokens: tuple[int, int | None]) -> None:
    """Raise RequestError unless the latents and text features that were given have the shape of this bundle's.

    Args:
        manifest: of the bundle.
        request: what was given.
        tokens: the fewest and the most that text features may have (``tokens_taken``).
    """
    latents = request.latents
    if latents is not None and tuple(latents.shape[:2]) != (request.images, manifest.latent_channels):
        named = f"{request.images}, {manifest.latent_channels}, height, width"
        raise RequestError(f"latents has shape {tuple(latents.shape)}; this bundle takes ({named})")
    (least, most), width = tokens, manifest.features[TEXT].shape[-1]
    for name in ("prompt_embeds", "negative_prompt_embeds"):
        given = getattr(request, name)
        if given is not None and (given.shape[2] != width or given.shape[1] < least or given.shape[1] > (most or given.shape[1])):
            named = f"prompts, {described_tokens(least, most)}, {width}"
            raise RequestError(f"{name} has shape {tuple(given.shape)}; this bundle takes ({named})")


def _check_profile(manifest: Manifest, engine: str, images: int, height: int, width: int) -> None:
    heights, widths = zip(*manifest.sizes, strict=True)
    inside = min(heights) <= height <= max(heights) and min(widths) <= width <= max(widths)
    if not inside or images > manifest.max_images:
        built = ", ".join(f"{size[0]}x{size[1]}" for size in manifest.sizes)
        raise RequestError(
            f"{images} image(s) of {height}x{width}: the {engine} engines of this bundle were built for up to "
            f"{manifest.max_images} image(s) of {built}; build others with --sizes and --batch"
        )


def _check_static(manifest: Manifest, engine: str, images: int, height: int, width: int, guidance_scale: float) -> None:
    built = manifest.max_images, *manifest.sizes[0]
    if (images, height, width) != built or guidance_scale <= 1:
        raise RequestError(
            f"{images} image(s) of {height}x{width} with guidance {guidance_scale:g}: the {engine} engines of this "
            f"bundle are static, for exactly {built[0]} image(s) of {built[1]}x{built[2]} with guidance above 1; "
            "ask for that, or build others with --sizes and --batch, for several without --static"
        )
