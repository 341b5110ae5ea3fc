"""A call in a thread of its own: its steps as they are done, previews, and how it is stopped."""

import queue
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass

from PIL import Image
from torch import Tensor

from runtime import Generation, Pipeline, Request, StepRecord

__all__ = ["Calls", "Cancelled", "Made", "StepDone", "in_turns", "run"]


_APART = 0.5
"""Seconds between two previews: of pictures that are made in less, nobody would see them, and they would be in their way."""


_TURNS, _SHORT = 3, 2.0
"""How often two calls that take less than so many seconds together are made again to be compared."""


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
    pipeline: Pipeline, request: Request, stop: threading.Event, every: int = 0, apart: float = _APART
) -> Iterator[StepDone | Made]:
    """Every step of a call when it has been done, and at last what it made.

    Args:
        pipeline: makes it.
        request: what is made.
        stop: the call ends after the step that runs when this is set.
        every: a preview is decoded after every so many steps; 0 for none.
        apart: seconds between previews at least, and before the first.

    Raises:
        Cancelled: it was stopped.
        UserError: as ``Pipeline.generate``, and whatever goes wrong there.
    """
    news: queue.SimpleQueue[StepDone | Made | BaseException] = queue.SimpleQueue()
    left = threading.Event()

    def stops() -> bool:
        return stop.is_set() or left.is_set()

    worker = threading.Thread(target=_work, args=(pipeline, request, stops, (every, apart), news), name="page-call", daemon=True)
    worker.start()
    try:
        while not isinstance(item := news.get(), BaseException):
            yield item
            if isinstance(item, Made):
                return
        raise item
    finally:
        left.set()
        worker.join()


def in_turns(
    pipeline: Pipeline, requests: tuple[Request, Request], made: tuple[Made, Made], stop: threading.Event
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
            *_, again = run(pipeline, request, stop)
            assert isinstance(again, Made), "a call ends with what it made"
            best[number] = min(best[number], again, key=lambda each: each.seconds)
    return best[0], best[1]


def _work(
    pipeline: Pipeline,
    request: Request,
    stops: Callable[[], bool],
    when: tuple[int, float],
    news: "queue.SimpleQueue[StepDone | Made | BaseException]",
) -> None:
    (every, apart), previews, first, last = when, 0.0, 0.0, time.monotonic()

    def after(record: StepRecord, latents: Tensor) -> None:
        nonlocal previews, first, last
        if stops():
            raise Cancelled
        now = time.monotonic() - previews
        first = first or now
        rate = record.index / (now - first) if now > first else None
        preview = None
        if every and (record.index + 1) % every == 0 and (started := time.monotonic()) - last >= apart:
            preview = pipeline.decode(latents)[0]
            last = time.monotonic()
            previews += last - started
        news.put(StepDone(record, rate, preview))

    try:
        if stops():
            raise Cancelled
        made = pipeline.generate(request, callback=after)
        if stops():
            raise Cancelled
        news.put(Made(made, made.seconds - previews))
    except BaseException as error:
        news.put(error)
