"""The base of everything that is read from JSON, and one line for what is wrong with it."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field, ValidationError

__all__ = ["Name", "Record", "explain", "one_line"]

_CONTROL = r"\x00-\x1f\x7f-\x9f\u{2028}\u{2029}"

Name = Annotated[str, Field(max_length=200, pattern=f"^[^{_CONTROL}]*$")]
"""Text that fits on a line of a message or a table."""


class Record(BaseModel):
    """Frozen, and strict about names: a misspelt field is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def explain(error: ValidationError) -> str:
    """The first field that was refused, and why, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    return one_line(f"{field}: {first['msg']}" if field else first["msg"])


def one_line(text: object, longest: int = 400) -> str:
    """A text as messages show it: of one line, whatever names are in it, and of no more characters than ``longest``."""
    shown = "".join(letter if letter.isprintable() else " " for letter in " ".join(str(text).split()))
    return shown if len(shown) <= longest else f"{shown[:longest]}..."
