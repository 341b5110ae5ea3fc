"""A call from its body to its answer: read, let wait, given up where the caller leaves, told."""

import asyncio
import time
from collections.abc import Callable, Mapping
from typing import TYPE_CHECKING, Any

from serving.http.asked import Asked
from serving.http.body import Bodies, parse_object, read_body
from serving.http.faults import GONE, answer
from serving.http.metrics import Metrics
from serving.limits import Limits
from serving.queueing.service import Service
from serving.queueing.ticket import Made, Ticket, waited_for

if TYPE_CHECKING:
    from starlette.requests import Request as HttpRequest
    from starlette.responses import Response

__all__ = ["Calls"]

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
        self._bodies = Bodies(service.limits)

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
        with self._bodies.room_for(http):
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

    def _submitted(self, body: bytes, read: Read) -> tuple[Asked, Ticket]:
        asked = read(parse_object(body), self.service.limits)
        return asked, self.service.submit(asked.model, asked.request)


async def _left(http: "HttpRequest") -> None:
    """Wait until the caller's connection is closed."""
    while (await http.receive())["type"] != "http.disconnect":
        pass
