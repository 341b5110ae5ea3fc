"""The result of a call of ``generate``: pictures with all that they were made from."""

import io
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import IO, Any

from PIL import Image
from PIL.PngImagePlugin import PngInfo
from torch import Tensor

from engines import Manifest
from engines.support.files import atomic_file
from engines.support.version import our_version
from runtime.errors import RequestError
from runtime.execution.executor import StepRecord
from runtime.plans.plan import Plan
from runtime.request import Request

__all__ = ["Generation", "numbered", "save_png", "write_png"]


@dataclass(frozen=True)
class Generation:
    """The result of one call: pictures, final latents (images, channels, height, width), and what ran at every step.

    ``images`` are PIL pictures, or with another ``output_type`` what diffusers' pipelines give for it. ``seeds`` has that of each
    picture, and none where generators or latents were given.
    """

    images: list[Image.Image]
    latents: Tensor
    steps: list[StepRecord]
    seconds: float
    plan: Plan
    seeds: tuple[int, ...] = ()
    request: Request | None = field(default=None, repr=False)
    manifest: Manifest | None = field(default=None, repr=False)
    guidance_scale: float | None = None
    unread: tuple[str, ...] = ()
    """Of each prompt that was too long, the words that were not read."""

    @property
    def image(self) -> Image.Image:
        """The first picture."""
        return self.images[0]

    @property
    def _are_pictures(self) -> bool:
        return self.request is None or self.request.output_type == "pil"

    def made_from(self, number: int = 0) -> dict[str, Any]:
        """All that one of the pictures was made from, by name; arguments that were not given are left out."""
        request, manifest = self.request, self.manifest
        told: dict[str, Any] = {"plan": self.plan.name, "version": f"unet-heirloom {our_version()}"}
        if self.seeds:
            told["seed"] = self.seeds[number]
        if request is not None:
            told |= {"steps": request.steps, "scheduler": request.scheduler, "guidance_scale": self.guidance_scale}
            if request.prompts:
                told["prompt"] = request.prompts[number // request.num_images]
                negative = request.negative_prompts[0 if len(request.negative_prompts) == 1 else number // request.num_images]
                told["negative_prompt"] = negative
            if request.image is not None:
                told["strength"] = request.strength
        if manifest is not None:
            told |= {"source": manifest.source, "variant": manifest.variant, "bundle": manifest.key, "vae": manifest.vae}
            told["loras"] = " ".join(lora.option for lora in manifest.loras)
            told["clip_skip"] = manifest.clip_skip or None
        return {name: value for name, value in told.items() if value not in {None, ""}}

    def metadata(self, number: int = 0) -> dict[str, str]:
        """``made_from`` as text, which the picture's PNG file carries."""
        return {name: str(value) for name, value in self.made_from(number).items()}

    def save(self, path: str | Path) -> list[Path]:
        """Write all pictures as PNG files that carry their ``metadata``, several as ``NAME-00.png`` and so on; returns the paths.

        Each is written whole or not at all.

        Raises:
            RequestError: the pictures are no PIL pictures, or the name does not end in .png.
        """
        path = Path(path)
        if path.suffix.lower() != ".png":
            raise RequestError(f"cannot write {path!s:.200}: give the name of a .png file")
        if not self._are_pictures:
            raise RequestError("the pictures of this call are no PIL pictures; leave output_type out to have such")
        paths = numbered(path, len(self.images))
        for number, (each, image) in enumerate(zip(paths, self.images, strict=True)):
            write_png(each, image, self.metadata(number))
        return paths

    def __repr__(self) -> str:
        height, width = (side * (self.manifest.vae_scale if self.manifest else 1) for side in self.latents.shape[-2:])
        count = len(self.latents)
        parts = [f"{count} picture{'s' * (count > 1)} of {width}x{height}"]
        if self.seeds:
            parts.append(f"seed {self.seeds[0]}" if count == 1 else f"seeds {self.seeds[0]} to {self.seeds[-1]}")
        if self.request is not None:
            parts.append(f"{self.request.steps} steps of {self.request.scheduler}")
        return f"<Generation: {', '.join([*parts, f'plan {self.plan.name}', f'{self.seconds:.2f} s'])}>"

    def _repr_png_(self) -> bytes | None:
        """All pictures beside each other, for notebooks."""
        if not self._are_pictures:
            return None
        pictures = self.images
        sheet = Image.new("RGB", (sum(image.width for image in pictures), max(image.height for image in pictures)))
        left = 0
        for image in pictures:
            sheet.paste(image, (left, 0))
            left += image.width
        written = io.BytesIO()
        sheet.save(written, format="PNG")
        return written.getvalue()


def write_png(path: Path, image: Image.Image, told: Mapping[str, Any]) -> None:
    """Write a picture, whole or not at all, as a PNG file that carries texts by name."""
    with atomic_file(path) as temporary:
        save_png(temporary, image, told)


def save_png(target: Path | IO[bytes], image: Image.Image, told: Mapping[str, Any]) -> None:
    """Write a picture as a PNG file that carries texts by name."""
    text = PngInfo()
    for name, value in told.items():
        text.add_itxt(name, str(value))
    image.save(target, format="PNG", pnginfo=text)


def numbered(path: Path, count: int) -> list[Path]:
    """The paths of so many pictures: the one given, or numbered ones that sort as they are counted."""
    if count == 1:
        return [path]
    digits = max(2, len(str(count - 1)))
    return [path.with_name(f"{path.stem}-{number:0{digits}}{path.suffix}") for number in range(count)]
