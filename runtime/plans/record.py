"""The base of everything that is read from a plan file."""

from typing import Annotated

from pydantic import BaseModel, ConfigDict, Field

__all__ = ["Name", "Record"]

_CONTROL = "\x00-\x1f\x7f-\x9f\u2028\u2029"

Name = Annotated[str, Field(max_length=200, pattern=f"^[^{_CONTROL}]*$")]
"""Text that fits on a line of a message or a table."""


class Record(BaseModel):
    """Frozen, and strict about names: a misspelt field is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")
