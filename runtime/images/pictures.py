"""Pictures in and out: files and PIL images to tensors, and back."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor

from engines.bundle.shapes import size_fault
from engines.support.pictures import PictureError, open_picture, to_mask, to_rgb
from runtime.errors import RequestError

__all__ = ["Original", "Picture", "picture_psnr", "read_original", "to_pictures"]

Picture = Image.Image | str | Path
"""A PIL image of any mode, or the path of a file that PIL can read."""


@dataclass(frozen=True)
class Original:
    """The picture of image-to-image, in RGB, and with inpainting a mask in L of the same size, whose white is repainted."""

    image: Image.Image
    mask: Image.Image | None = None

    @property
    def size(self) -> tuple[int, int]:
        """Height and width in pixels."""
        return self.image.height, self.image.width

    def fitting_size(self, height: int | None, width: int | None, multiple: int) -> tuple[int, int]:
        """The height and width in pixels that are asked for, or else the picture's own.

        Raises:
            RequestError: the size is not a multiple of what the UNet's depth needs; the message names one that is.
        """
        own = height is None and width is None
        height, width = self.size[0] if height is None else height, self.size[1] if width is None else width
        if fault := size_fault((height, width), multiple):
            fits = [max(1, round(side / multiple)) * multiple for side in (height, width)]
            advice = f"; have it resized with height={fits[0]}, width={fits[1]} (--size {fits[0]}x{fits[1]})" if own else ""
            raise RequestError(f"{'image is' if own else 'size'} {fault}{advice}")
        return height, width

    def resized(self, height: int, width: int) -> "Original":
        """Resized to a size in pixels, with diffusers' filter (Lanczos)."""
        if (height, width) == self.size:
            return self
        resize = partial(Image.Image.resize, size=(width, height), resample=Image.Resampling.LANCZOS)
        return Original(resize(self.image), self.mask and resize(self.mask))

    def pixels(self) -> Tensor:
        """The picture (1, 3, height, width) in [-1, 1], float32."""
        return torch.from_numpy(np.array(self.image, np.float32) / 255).permute(2, 0, 1)[None] * 2 - 1

    def kept_in(self, pixels: Tensor) -> Tensor:
        """Pixels (images, 3, height, width) in [-1, 1] in which what the mask leaves out is the picture's own, to the level.

        Latents are coarser than pixels: without this, what is kept would change where the mask ends inside of a latent, and
        everywhere by what the VAE loses.
        """
        if self.mask is None:
            return pixels
        white = torch.from_numpy(np.array(self.mask) >= 128)
        return torch.where(white, pixels, self.pixels())

    def repainted(self, scale: int) -> Tensor | None:
        """The mask (1, 1, height / scale, width / scale) of zeros and ones, float32; None without inpainting.

        Each latent takes the upper left one of its ``scale`` x ``scale`` pixels, as in diffusers.
        """
        if self.mask is None:
            return None
        white = np.array(self.mask, np.float32) / 255 >= 0.5
        return torch.from_numpy(white.astype(np.float32))[None, None, ::scale, ::scale]


def read_original(image: Picture | None, mask: Picture | None) -> Original | None:
    """The picture and mask of a request, in modes RGB and L; None if it has neither.

    Raises:
        RequestError: a file cannot be read, has too many pixels or is not clear, or the two are of different sizes.
    """
    if image is None:
        return None
    found = Original(_read(image, "image", to_rgb), None if mask is None else _read(mask, "mask", to_mask))
    if found.mask is not None and found.mask.size != found.image.size:
        sizes = " and ".join(f"{picture.height}x{picture.width}" for picture in (found.mask, found.image))
        raise RequestError(f"mask and image are {sizes} (height x width); give a mask of the image's size")
    return found


def _read(picture: Picture, field: str, convert: Callable[[Image.Image], Image.Image]) -> Image.Image:
    try:
        return convert(open_picture(picture))
    except PictureError as error:
        named = field if isinstance(picture, Image.Image) else f"{field} {str(picture)!s:.200}"
        raise RequestError(f"{named} {error}") from error


def to_pictures(pixels: Tensor) -> list[Image.Image]:
    """PIL pictures from (images, 3, height, width) in [-1, 1], any float type and device; NaN is black."""
    rounded = ((pixels.float().cpu().nan_to_num(nan=-1.0) / 2 + 0.5).clamp(0, 1) * 255).round().to(torch.uint8)
    return [Image.fromarray(np.ascontiguousarray(picture)) for picture in rounded.permute(0, 2, 3, 1).numpy()]


def picture_psnr(one: Image.Image, other: Image.Image) -> float:
    """The peak signal-to-noise ratio of two pictures of one size in dB, in 8 bits; infinite where they are alike."""
    difference = np.asarray(one, np.float64) - np.asarray(other, np.float64)
    mean = float((difference**2).mean())
    return math.inf if mean == 0 else 10 * math.log10(255**2 / mean)
