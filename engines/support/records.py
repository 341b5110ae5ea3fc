"""The base of everything that is read from JSON, and one line for what is wrong with it."""

from pydantic import BaseModel, ConfigDict, ValidationError

__all__ = ["Record", "explain"]


class Record(BaseModel):
    """Frozen, and strict about names: a misspelt field is an error, not a default."""

    model_config = ConfigDict(frozen=True, extra="forbid")


def explain(error: ValidationError) -> str:
    """The first field that was refused, and why, in one line."""
    first = error.errors(include_url=False, include_context=False, include_input=False)[0]
    field = ".".join(str(part) for part in first["loc"])
    reason = " ".join(first["msg"].split())
    return f"{field}: {reason}" if field else reason
