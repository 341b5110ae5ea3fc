"""The body of a request: bounded in bytes and time, and read as a JSON object, or refused."""

import asyncio
import json
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, NoReturn

from serving.errors import BodyError, BusyError
from serving.limits import Limits

if TYPE_CHECKING:
    from starlette.requests import Request

__all__ = ["Bodies", "parse_object", "read_body"]

_MOST_SHOWN = 100
_BODIES = 8
"""The largest bodies that may be in memory at once."""


class Bodies:
    """The bodies that are in memory: all of them together take no more than some of the largest ones would."""

    def __init__(self, limits: Limits) -> None:
        self._most, self._bytes = limits.body, 0

    @contextmanager
    def room_for(self, http: "Request") -> Iterator[None]:
        """Inside, a request's body may be in memory; raises BusyError where there are too many now."""
        told = http.headers.get("content-length", "")
        size = min(int(told[:20]), self._most) if told.isdecimal() else self._most
        if self._bytes + size > _BODIES * self._most:
            raise BusyError("many large requests are being read; ask again in 1 s", 1)
        self._bytes += size
        try:
            yield
        finally:
            self._bytes -= size


async def read_body(http: "Request", limits: Limits) -> bytes:
    """The bytes of a body that says it is JSON: a page of another site cannot send such a one without being asked first.

    Raises:
        BodyError: another type, too many bytes, or too slow.
    """
    kind = http.headers.get("content-type", "").partition(";")[0].strip().lower()
    if kind != "application/json":
        raise BodyError(f"content type {kind[:_MOST_SHOWN]!r}; send JSON, as application/json", 415)
    told = http.headers.get("content-length", "")
    if told.isdecimal() and int(told[:20]) > limits.body:
        raise _too_large(limits)
    found = bytearray()
    try:
        async with asyncio.timeout(limits.body_seconds):
            async for part in http.stream():
                found += part
                if len(found) > limits.body:
                    raise _too_large(limits)
    except TimeoutError as error:
        raise BodyError(f"the request did not arrive within {limits.body_seconds:g} s; send it at once", 408) from error
    return bytes(found)


def _too_large(limits: Limits) -> BodyError:
    return BodyError(f"the request has more than {limits.body} bytes; send less, such as smaller pictures", 413)


def parse_object(body: bytes) -> dict[str, Any]:
    """The JSON object in a body; raises BodyError for anything else."""
    try:
        found = json.loads(body.decode("utf-8"), parse_constant=_refuse)
    except (ValueError, RecursionError) as error:
        raise BodyError("the request is no JSON that can be read; send an object with a prompt", 400) from error
    if not isinstance(found, dict):
        raise BodyError(f"the request is a JSON {type(found).__name__}; send an object with a prompt", 400)
    return found


def _refuse(name: str) -> NoReturn:
    raise ValueError(f"{name} is not in JSON")
