"""A line of a file of prompts as a request, and what tells it from others."""

import hashlib
import json
import re
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from engines.errors import UserError
from engines.support.files import check_regular
from runtime import Request, RequestError, find_plan
from runtime.arguments.aliases import with_our_names
from serving.errors import ServingError
from serving.http.asked import TRAVELS, plan_from

__all__ = ["JSON_SUFFIXES", "Asked", "Line", "count_lines", "in_words", "read_line", "read_lines"]

JSON_SUFFIXES = {".jsonl", ".ndjson"}
_PICTURES = ("image", "mask")
_NO_TEXT = re.compile(r"[\x00-\x08\x0a-\x1f\x7f-\x9f]")
"""Control characters. They stand where a file is UTF-16 or has other line ends, and two prompts would be taken for one."""
_MOST_PICTURES = 10_000
"""Of a line."""


class Line(NamedTuple):
    """A line as it stands in the file, and its number, from 1."""

    number: int
    text: bytes


class Asked(NamedTuple):
    """A line's request. ``fingerprint`` is the same for what makes the same pictures with the same bundle, and for no other."""

    number: int
    request: Request
    fingerprint: str


def read_lines(path: Path) -> Iterator[Line]:
    """All lines of a file but empty ones, one after another; raises ServingError where it cannot be read."""
    try:
        check_regular(path)
        with path.open("rb") as file:
            for number, text in enumerate(file, 1):
                if text.strip():
                    yield Line(number, text)
    except OSError as error:
        raise ServingError(f"{path!s:.200} cannot be read ({error.strerror}); give a file of prompts") from error


def count_lines(path: Path) -> int:
    """How many lines are not empty; raises ServingError where there is none."""
    found = sum(1 for _ in read_lines(path))
    if not found:
        raise ServingError(f"{path!s:.200} has no prompts; write one in each line")
    return found


def read_line(line: Line, *, as_json: bool, defaults: Mapping[str, Any], folder: Path, bundle: str) -> Asked:
    """The request of a line.

    Args:
        line: a prompt, or an object with fields of ``runtime.Request``, whose ``image`` and ``mask`` are files.
        as_json: which of these it is.
        defaults: fields that hold where the line says nothing else; the seed is that of line 1.
        folder: which the line's files are looked for in.
        bundle: the bundle's own key.

    Raises:
        RequestError, PlanError: no request can be made of the line.
    """
    try:
        text = line.text.decode("utf-8").strip().removeprefix("\ufeff")
    except UnicodeDecodeError as error:
        raise RequestError("the line is no text in UTF-8") from error
    given = with_our_names(_object(text), TRAVELS) if as_json else {"prompt": _checked(text)}
    if not isinstance(given.get("prompt"), str):
        raise RequestError("the line has no prompt; give one as text")
    fields = {**defaults, "seed": defaults["seed"] + line.number - 1, **given}
    for name in _PICTURES:
        if fields.get(name) is not None:
            fields[name] = _file(name, fields[name], folder)
    fields["plan"] = plan_from(fields["plan"], find_plan)
    try:
        request = Request(**fields)
        fingerprint = _fingerprint(fields, bundle)
    except RecursionError as error:
        raise RequestError("the line is nested too deeply to be read") from error
    if request.images > _MOST_PICTURES:
        raise RequestError(f"num_images = {request.images}; a line makes {_MOST_PICTURES} at most: write more lines")
    return Asked(line.number, request, fingerprint)


def _checked(text: str) -> str:
    if found := _NO_TEXT.search(text):
        raise RequestError(
            f"the line has the control character {found[0]!r} in it; save the file as UTF-8 with a prompt in each line"
        )
    return text


def _object(text: str) -> dict[str, Any]:
    try:
        found = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise RequestError("the line is no JSON; write an object with a prompt in each line") from error
    if not isinstance(found, dict):
        raise RequestError(f"the line is a JSON {type(found).__name__}; write an object with a prompt in each line")
    return found


def _file(name: str, value: Any, folder: Path) -> Path:
    if not isinstance(value, str) or "\0" in value:
        raise RequestError(f"{name} is a {type(value).__name__}; give the name of a file")
    return folder / value


def _fingerprint(fields: Mapping[str, Any], bundle: str) -> str:
    """Of all fields as they were given: a seed that is drawn anew each time stays null."""
    plain = {name: value for name, value in fields.items() if value is not None}
    plain["plan"] = fields["plan"].model_dump(mode="json")
    for name in _PICTURES:
        if name in plain:
            plain[name] = _digest(name, plain[name])
    told = json.dumps([bundle, plain], sort_keys=True)
    return hashlib.sha256(told.encode("utf-8", "surrogatepass")).hexdigest()[:32]


def _digest(name: str, path: Path) -> str:
    try:
        check_regular(path)
        with path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()
    except OSError as error:
        raise RequestError(f"{name}: {path!s:.200} cannot be read ({error.strerror})") from error


def in_words(number: int, error: UserError) -> str:
    """The message for a line of which no picture was made."""
    return f"line {number}: {error.line}"
