"""A visitor's call among all others of the service: its steps as they are done, previews, and how it is stopped."""

import queue
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from runtime import Generation, Pipeline, Request, StepRecord
from serving.queueing.service import Service
from serving.queueing.ticket import Ticket

__all__ = ["Calls", "Cancelled", "Made", "StepDone", "in_turns", "run"]


_APART = 0.5
"""Seconds between two previews: of pictures that are made in less, nobody would see them, and they would be in their way."""


_TURNS, _SHORT = 3, 2.0
"""How often two calls that take less than so many seconds together are made again to be compared."""
_LOOK = 0.1
"""Seconds after which a call that waits is looked at: whether it was cancelled, or is late."""


class Cancelled(Exception):
    """The visitor stopped the call, or left."""


@dataclass(frozen=True)
class StepDone:
    """A step that was done, with a preview at every so many; ``rate`` is of steps per second, those of previews left out."""

    record: StepRecord
    rate: float | None
    preview: Image.Image | None = None


@dataclass(frozen=True)
class Made:
    """The end of a call, and the seconds that it took without its previews."""

    generation: Generation
    seconds: float


class Calls:
    """Which visitor's call is to stop. Each has one at most: another takes the place of the first."""

    def __init__(self) -> None:
        self._stops: dict[str, threading.Event] = {}
        self._lock = threading.Lock()

    def begin(self, visitor: str) -> None:
        """A call is to come, and may be cancelled from now on."""
        with self._lock:
            if before := self._stops.get(visitor):
                before.set()
            self._stops[visitor] = threading.Event()

    def cancel(self, visitor: str) -> None:
        """Stop a visitor's call, also one that waits for its turn; nothing where there is none."""
        with self._lock:
            if stop := self._stops.get(visitor):
                stop.set()

    def forget(self, visitor: str) -> None:
        """The visitor has left: stop the call, and keep nothing of it."""
        with self._lock:
            if stop := self._stops.pop(visitor, None):
                stop.set()

    @contextmanager
    def running(self, visitor: str) -> Iterator[threading.Event]:
        """A visitor's call while it runs; the event says that it is to stop, which it is at the end in any case."""
        with self._lock:
            stop = self._stops.setdefault(visitor, threading.Event())
        try:
            yield stop
        finally:
            stop.set()
            with self._lock:
                if self._stops.get(visitor) is stop:
                    del self._stops[visitor]


def run(
    service: Service, model: str, request: Request, stop: threading.Event, every: int = 0, apart: float = _APART
) -> Iterator[StepDone | Made]:
    """Every step of a call when it has been done, and at last what it made. It waits its turn among all that the service makes.

    Args:
        service: makes it.
        model: with which bundle.
        request: what is made.
        stop: the call ends after the step that runs when this is set.
        every: a preview is decoded after every so many steps; 0 for none.
        apart: seconds between previews at least, and before the first.

    Raises:
        Cancelled: it was stopped.
        UserError: as ``Service.submit`` and ``Pipeline.generate``, and whatever goes wrong there.
    """
    steps = _Steps(service.pipelines[model], every, apart)
    _check(stop)
    ticket = service.submit(model, request, steps.after)
    ticket.future.add_done_callback(lambda _: steps.news.put(None))
    try:
        while (item := _next(ticket, steps.news, stop)) is not None:
            yield item
        _check(stop)
        made = ticket.future.result().alone
        assert made is not None, "a call whose steps are told runs alone"
        yield Made(made, made.seconds - steps.previews)
    finally:
        ticket.future.cancel()


def _check(stop: threading.Event) -> None:
    if stop.is_set():
        raise Cancelled


def _next(ticket: Ticket, news: "queue.SimpleQueue[StepDone | None]", stop: threading.Event) -> StepDone | None:
    """The next step, or None when the call has ended."""
    while True:
        _check(stop)
        with suppress(queue.Empty):
            return news.get(timeout=_LOOK)
        ticket.expire()


class _Steps:
    """Takes the steps of a call, in the thread that makes it, and decodes previews there."""

    def __init__(self, pipeline: Pipeline, every: int, apart: float) -> None:
        self.news: queue.SimpleQueue[StepDone | None] = queue.SimpleQueue()
        self.previews = 0.0
        """Seconds that they took."""
        self._pipeline, self._every, self._apart = pipeline, every, apart
        self._first: float | None = None
        self._last = 0.0

    def after(self, record: StepRecord, latents: Tensor) -> None:
        """A step was done."""
        now = time.monotonic() - self.previews
        if self._first is None:
            self._first, self._last = now, time.monotonic()
        rate = record.index / (now - self._first) if now > self._first else None
        self.news.put(StepDone(record, rate, self._preview(record, latents)))

    def _preview(self, record: StepRecord, latents: Tensor) -> Image.Image | None:
        started = time.monotonic()
        if not self._every or (record.index + 1) % self._every or started - self._last < self._apart:
            return None
        preview = self._pipeline.decode(latents)[0]
        self._last = time.monotonic()
        self.previews += self._last - started
        return preview


def in_turns(
    service: Service, model: str, requests: tuple[Request, Request], made: tuple[Made, Made], stop: threading.Event
) -> tuple[Made, Made]:
    """Two calls, each the quickest of itself and some more, in turns, with nobody looking; calls that take long stay as they are.

    Steps that take as long as the page's own work are slowed by it: where small pictures are compared, that is most of what
    would be measured.

    Raises:
        Cancelled, UserError: as ``run``.
    """
    best = list(made)
    for _ in range(_TURNS if sum(each.seconds for each in made) < _SHORT else 0):
        for number, request in enumerate(requests):
            *_, again = run(service, model, request, stop)
            assert isinstance(again, Made), "a call ends with what it made"
            best[number] = min(best[number], again, key=lambda each: each.seconds)
    return best[0], best[1]
