"""Pictures as text: base64 in and out. Pictures come in the request itself; no name of a file or address is followed."""

import base64
import binascii
import io
from collections.abc import Mapping
from typing import Any

from PIL import Image, ImageOps

from runtime import RequestError
from runtime.generation import save_png
from serving.limits import Limits

__all__ = ["decode_picture", "encode_picture"]

_FORMATS = {"PNG": b"\x89PNG\r\n\x1a\n", "JPEG": b"\xff\xd8\xff", "WEBP": b"RIFF"}
"""The formats that are read, by their first bytes. Pillow knows many more, and starts programs for some of them."""
_GIVE = "give a PNG, JPEG or WebP file in base64"


def decode_picture(name: str, value: Any, limits: Limits) -> Image.Image:
    """A picture from base64, with or without ``data:image/png;base64,`` before it; its pixels are read.

    Raises:
        RequestError: it is none, or has more bytes or pixels than the limits allow.
    """
    if not isinstance(value, str):
        raise RequestError(f"{name} is a {type(value).__name__}; {_GIVE}")
    head, _, rest = value[:100].partition(";base64,")
    text = value[len(head) + len(";base64,") :] if rest and head.startswith("data:image/") else value
    if len(text) > -(-limits.picture_bytes // 3) * 4:
        raise RequestError(f"{name} has more than {limits.picture_bytes} bytes; give a smaller file")
    try:
        data = base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise RequestError(f"{name} is no base64; {_GIVE} (names of files and addresses are not read)") from error
    if not data.startswith(tuple(_FORMATS.values())):
        raise RequestError(f"{name} is no picture; {_GIVE}")
    return _read(name, data, limits)


def _read(name: str, data: bytes, limits: Limits) -> Image.Image:
    try:
        found = Image.open(io.BytesIO(data), formats=tuple(_FORMATS))
        if found.width * found.height > limits.picture_pixels:
            most = f"this service reads pictures of {limits.picture_pixels} pixels at most"
            raise RequestError(f"{name} is {found.height}x{found.width}; {most}")
        turned = ImageOps.exif_transpose(found)
        turned.load()
    except RequestError:
        raise
    except Exception as error:  # Pillow's plugins raise whatever a damaged file makes them stumble over
        raise RequestError(f"{name} is a damaged picture; {_GIVE}") from error
    return turned


def encode_picture(image: Image.Image, told: Mapping[str, Any]) -> str:
    """A picture as a PNG file in base64, with texts by name in it."""
    written = io.BytesIO()
    save_png(written, image, told)
    return base64.b64encode(written.getvalue()).decode("ascii")
