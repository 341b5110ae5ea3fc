"""uvicorn's server, stopped gracefully: what was taken is finished while new requests are refused, and then it ends."""

import logging
import socket
import time
from types import FrameType
from typing import TYPE_CHECKING

from serving.errors import ServingError
from serving.queueing.service import Service

if TYPE_CHECKING:
    import uvicorn
    from fastapi import FastAPI

__all__ = ["Stop", "bind", "make_server"]

_LOG = logging.getLogger(__name__)
_LAST_ANSWERS = 10
"""Seconds that answers may take to be sent when all pictures are made."""


def bind(host: str, port: int) -> socket.socket:
    """A socket with an address of this machine, which nobody is answered at yet; raises ServingError where it cannot be had."""
    try:
        family, kind, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM, flags=socket.AI_PASSIVE)[0]
        found = socket.socket(family, kind)
        found.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        found.bind(address)
    except (OSError, UnicodeError) as error:
        reason = getattr(error, "strerror", None) or error
        raise ServingError(f"{host!s:.100}:{port} cannot be listened at ({reason}); choose another --host or --port") from error
    return found


class Stop:
    """How a service stops. At the first signal it goes on answering, requests with 503, until what was taken is done.

    At a second signal, or after so many seconds, what runs is stopped after its step and answered with 503 as well.

    Args:
        service: to be stopped.
        seconds: for what was taken.
    """

    def __init__(self, service: Service, seconds: float) -> None:
        self._service, self._seconds = service, seconds
        self._until: float | None = None
        self._at_once = False

    def signal(self) -> None:
        """Somebody asks for it. This may interrupt whatever runs, so it takes no lock."""
        if self._until is None:
            self._until = time.monotonic() + self._seconds
        else:
            self._at_once = True

    def tick(self) -> bool:
        """Go on stopping, where it was asked for; whether all is done."""
        if self._until is None:
            return False
        if not self._service.is_stopping:
            _LOG.info("stopping: what was taken is finished; a second signal ends it after its step")
            self._service.stop_accepting()
        if self._at_once or time.monotonic() > self._until:
            self._service.end()
        return self._service.is_idle


def make_server(app: "FastAPI", stop_timeout: float = 60.0, quiet: bool = False) -> "uvicorn.Server":
    """A server that signals stop gracefully; it is run with the sockets that it is to listen at.

    Args:
        app: made by ``make_app``.
        stop_timeout: seconds for what was taken when a signal comes.
        quiet: whether requests are not logged.
    """
    import uvicorn

    stop = Stop(app.state.service, stop_timeout)

    class Server(uvicorn.Server):
        async def startup(self, sockets: list[socket.socket] | None = None) -> None:
            await super().startup(sockets)
            for each in sockets or ():
                host, port = each.getsockname()[:2]
                _LOG.info("listening at http://%s:%d (the interface: /docs)", f"[{host}]" if ":" in host else host, port)

        def handle_exit(self, sig: int, frame: FrameType | None) -> None:
            stop.signal()

        async def on_tick(self, counter: int) -> bool:
            self.should_exit = stop.tick() or self.should_exit
            return await super().on_tick(counter)

    settings = uvicorn.Config(
        app, log_config=None, access_log=not quiet, server_header=False, timeout_graceful_shutdown=_LAST_ANSWERS
    )
    return Server(settings)
