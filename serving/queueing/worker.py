"""The queue of one bundle and the thread that makes its pictures."""

import logging
import math
import threading
import time
from collections import deque
from collections.abc import Sequence
from typing import NamedTuple, Protocol

from torch import Tensor

from runtime import Generation, Pipeline, StepRecord
from serving.errors import BusyError, StoppingError
from serving.limits import Limits
from serving.queueing.ticket import Ticket

__all__ = ["STOPPING", "Watch", "Worker"]

_LOG = logging.getLogger(__name__)
STOPPING = "this service is being stopped; ask again in a while"
_OLD = 0.8
"""The share that earlier batches have in the seconds that a picture is said to take."""


class Watch(Protocol):
    """Is told of every batch that was made."""

    def batch(self, model: str, generation: Generation) -> None:
        """A batch of a model is done."""


class _Part(NamedTuple):
    """Pictures of a ticket that a batch makes: so many from ``first`` on."""

    ticket: Ticket
    first: int
    pictures: int


class _Stopped(Exception):
    """Nobody waits for what is being made."""


class Worker(threading.Thread):
    """Makes the pictures of one bundle, one batch after another; the first request that waits says of which kind.

    Args:
        name: of the model.
        pipeline: what makes them.
        limits: how many may wait and be made at once, and for how long others are waited for.
        watch: is told of every batch.
    """

    def __init__(self, name: str, pipeline: Pipeline, limits: Limits, watch: Watch | None = None) -> None:
        super().__init__(name=f"pictures of {name}", daemon=True)
        self.model, self.pipeline, self._limits, self._watch = name, pipeline, limits, watch
        self._changed = threading.Condition()
        self._waiting: deque[Ticket] = deque()
        self._running: tuple[Ticket, ...] = ()
        self._coming = 0
        self._stopping = self._ends = False
        self._seconds = 1.0

    @property
    def waiting(self) -> int:
        """Pictures that no batch has taken."""
        with self._changed:
            return sum(ticket.waiting for ticket in self._waiting if not ticket.is_over)

    @property
    def is_idle(self) -> bool:
        """Whether it has nothing to do and nothing is on its way to it."""
        with self._changed:
            return not (self._waiting or self._running or self._coming)

    def expect(self) -> None:
        """A request is being read that will be put or given up.

        Raises:
            StoppingError: none is taken any more.
            BusyError: too many wait.
        """
        with self._changed:
            if self._stopping:
                raise StoppingError(STOPPING)
            self._check_room(1)
            self._coming += 1

    def give_up(self) -> None:
        """A request that was expected does not come."""
        with self._changed:
            self._coming -= 1

    def put(self, ticket: Ticket) -> None:
        """Let a request that was expected wait; where nothing else waits, it may have more pictures than there is room for.

        Raises:
            BusyError, StoppingError: as ``expect``.
        """
        with self._changed:
            self._coming -= 1
            if self._ends:
                raise StoppingError(STOPPING)
            if self._waiting:
                self._check_room(ticket.waiting)
            self._waiting.append(ticket)
            self._changed.notify_all()

    def _check_room(self, count: int) -> None:
        waiting = self._coming + self.waiting
        if waiting + count > self._limits.queue:
            seconds = max(1, math.ceil(waiting * self._seconds))
            raise BusyError(f"{waiting} pictures are waiting, and no more can; ask again in {seconds} s", seconds)

    def stop_accepting(self) -> None:
        """Refuse what comes from now on; what was taken is finished."""
        with self._changed:
            self._stopping = True

    def end(self) -> None:
        """Refuse what waits, stop what runs after its step, and end the thread."""
        with self._changed:
            self._stopping = self._ends = True
            for ticket in (*self._waiting, *self._running):
                ticket.fail(StoppingError("this service was stopped before the request was finished; ask again in a while"))
            self._changed.notify_all()

    def run(self) -> None:
        """Make batches until the end."""
        while parts := self._next():
            try:
                self._make(parts)
            except Exception as error:  # the thread goes on: others wait
                _LOG.exception("a batch of %s could not be handed out", self.model)
                for part in parts:
                    part.ticket.fail(error)
            with self._changed:
                self._running = ()
            parts.clear()  # pictures are not kept until the next batch

    def _next(self) -> list[_Part]:
        """The pictures of the next batch, as soon as it is full or its first has waited long enough; none at the end."""
        with self._changed:
            while True:
                self._forget_those_that_are_over()
                if self._ends:
                    return []
                if not self._waiting:
                    self._changed.wait()
                    continue
                parts = self._gathered()
                first = self._waiting[0]
                full = first.kind is None or sum(part.pictures for part in parts) >= first.kind.most
                left = first.arrived + self._limits.batch_wait - time.monotonic()
                if full or left <= 0:
                    return self._taken(parts)
                self._changed.wait(left)

    def _forget_those_that_are_over(self) -> None:
        for ticket in self._waiting:
            ticket.expire()
        self._waiting = deque(ticket for ticket in self._waiting if not ticket.is_over)

    def _gathered(self) -> list[_Part]:
        """The pictures of the first request's kind, in the order in which they came, up to what is made at once."""
        first = self._waiting[0]
        if first.kind is None:
            return [_Part(first, 0, first.waiting)]
        parts, room = [], first.kind.most
        for ticket in self._waiting:
            if room and ticket.kind == first.kind:
                parts.append(_Part(ticket, ticket.taken, min(room, ticket.waiting)))
                room -= parts[-1].pictures
        return parts

    def _taken(self, parts: list[_Part]) -> list[_Part]:
        for ticket, _, count in parts:
            ticket.begin()
            ticket.taken += count
        self._waiting = deque(ticket for ticket in self._waiting if ticket.waiting)
        self._running = tuple(part.ticket for part in parts)
        return parts

    def _make(self, parts: Sequence[_Part]) -> None:
        """Make a batch. Where it fails, each request is tried alone: one's fault is not the others'."""
        tickets = [part.ticket for part in parts if not part.ticket.is_over]

        def after_step(record: StepRecord, latents: Tensor) -> None:
            if all(ticket.is_over for ticket in tickets):
                raise _Stopped  # nobody waits
            for ticket in tickets:
                if ticket.step is not None:
                    ticket.step(record, latents)

        if not tickets:
            return
        try:
            generation = self._generate(parts, after_step)
        except _Stopped:
            for ticket in tickets:
                ticket.expire()
            return
        except Exception as error:
            if len(parts) > 1:
                _LOG.warning("a batch of %d requests failed (%s); each is made alone", len(parts), type(error).__name__)
                for part in parts:
                    self._make([part])
            else:
                tickets[0].fail(error)
            return
        self._hand_out(parts, generation)

    def _generate(self, parts: Sequence[_Part], callback: object) -> Generation:
        ticket = parts[0].ticket
        if ticket.kind is None:
            return self.pipeline.generate(ticket.request, callback=callback)
        singles = [single for part in parts for single in part.ticket.singles[part.first : part.first + part.pictures]]
        return self.pipeline.generate(ticket.kind.request_for(singles), callback=callback)

    def _hand_out(self, parts: Sequence[_Part], generation: Generation) -> None:
        each = generation.seconds / len(generation.images)
        self._seconds = _OLD * self._seconds + (1 - _OLD) * each
        if self._watch is not None:
            self._watch.batch(self.model, generation)
        at = 0
        for ticket, first, count in parts:
            ticket.add(first, count, generation, at)
            at += count
