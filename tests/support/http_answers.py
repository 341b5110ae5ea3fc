"""What tests send to the HTTP service, and how they read its answers."""

from __future__ import annotations

import base64
import io
from typing import Any

from PIL import Image

__all__ = ["KEY", "NATIVE", "OPENAI", "encoded", "error_of", "opened"]

OPENAI, NATIVE = "/v1/images/generations", "/generate"
KEY = "a-key-of-24-characters-x"


def encoded(image: Image.Image, form: str = "PNG") -> str:
    file = io.BytesIO()
    image.save(file, format=form)
    return base64.b64encode(file.getvalue()).decode()


def opened(text: str) -> Any:
    """A picture from an answer, with the texts in its file."""
    return Image.open(io.BytesIO(base64.b64decode(text)))


def error_of(response: Any, status: int) -> str:
    """The message of an error in OpenAI's form, which is one line."""
    assert response.status_code == status, response.text
    error = response.json()["error"]
    assert set(error) == {"message", "type", "param", "code"}
    assert len(error["message"].splitlines()) == 1
    return error["message"]
