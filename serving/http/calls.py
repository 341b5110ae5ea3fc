"""A call from its body to its answer: read, let wait, given up where the caller leaves, told."""

import asyncio
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any

from serving.errors import BusyError
from serving.http.asked import Asked
from serving.http.body import parse_object, read_body
from serving.http.faults import GONE, answer
from serving.http.metrics import Metrics
from serving.limits import Limits
from serving.queueing.service import Service
from serving.queueing.ticket import Made, Ticket, waited_for

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

__all__ = ["Calls"]

_BODIES = 8
"""The largest bodies that may be in memory at once."""
Read = Callable[[Mapping[str, Any], Limits], Asked]
Tell = Callable[[Asked, str, Made], dict[str, Any]]


class _Gone(Exception):
    """The caller has left."""


class Calls:
    """Answers calls of a service.

    Args:
        service: which makes the pictures.
        metrics: are told of every call.
        hidden: what stands in answers instead of texts that are not for callers.
    """

    def __init__(self, service: Service, metrics: Metrics, hidden: Mapping[str, str]) -> None:
        self.service, self.metrics, self._hidden = service, metrics, hidden
        self._reading = 0

    async def answer(self, http: "HttpRequest", endpoint: str, read: Read, tell: Tell) -> "Response":
        """The answer to a call, whatever becomes of it.

        Args:
            http: the call.
            endpoint: its name among the metrics.
            read: what is asked for, from the fields of the body.
            tell: the answer's fields.
        """
        from starlette.responses import Response

        started = time.perf_counter()
        try:
            response: Response = await self._made(http, read, tell)
        except _Gone:
            response = Response(status_code=GONE)
        except Exception as error:
            response = answer(error, self._hidden)
        self.metrics.request(endpoint, response.status_code, time.perf_counter() - started)
        return response

    async def _made(self, http: "HttpRequest", read: Read, tell: Tell) -> "Response":
        from starlette.requests import ClientDisconnect
        from starlette.responses import JSONResponse

        self.service.check_accepting()
        with self._memory_for(http):
            try:
                body = await read_body(http, self.service.limits)
            except ClientDisconnect as error:
                raise _Gone from error
            asked, ticket = await asyncio.to_thread(self._submitted, body, read)
        gone = asyncio.ensure_future(_left(http))
        try:
            made = await waited_for(ticket, gone)
        finally:
            gone.cancel()
        if made is None:
            raise _Gone
        model = self.service.worker(asked.model).model
        return await asyncio.to_thread(lambda: JSONResponse(tell(asked, model, made)))

    @contextmanager
    def _memory_for(self, http: "HttpRequest") -> Iterator[None]:
        """Inside, a body may be read: all of them together take no more than some of the largest ones would.

        Raises:
            BusyError: there are too many now.
        """
        most = self.service.limits.body
        told = http.headers.get("content-length", "")
        size = min(int(told[:20]), most) if told.isdecimal() else most
        if self._reading + size > _BODIES * most:
            raise BusyError("many large requests are being read; ask again in 1 s", 1)
        self._reading += size
        try:
            yield
        finally:
            self._reading -= size

    def _submitted(self, body: bytes, read: Read) -> tuple[Asked, Ticket]:
        asked = read(parse_object(body), self.service.limits)
        return asked, self.service.submit(asked.model, asked.request)


async def _left(http: "HttpRequest") -> None:
    """Wait until the caller's connection is closed."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
