"""Pictures of many lines with one loaded bundle, those of a kind at once."""

import math
from collections.abc import Callable, Iterable
from concurrent.futures import FIRST_COMPLETED, Future, wait

from engines.errors import UserError
from engines.support.cli import interrupts_held
from runtime import Pipeline
from serving.limits import Limits
from serving.prompts.lines import Asked
from serving.queueing.kinds import admit
from serving.queueing.ticket import Made
from serving.queueing.worker import Worker

__all__ = ["make"]

_AHEAD = 16
"""Batches of pictures that wait, so that those of a kind find each other."""
_PATIENCE = 0.2
"""Seconds that a first batch waits until it is full; later ones find lines that wait."""
_LOOK = 0.2
"""Seconds after which it is looked whether somebody interrupts, and whether the worker lives."""
_ANY = 2**62
Done = Callable[[Asked, Made], None]
Failed = Callable[[int, UserError], None]


def make(pipeline: Pipeline, lines: Iterable[Asked], batch: int, done: Done, failed: Failed) -> None:
    """Make the pictures of lines, in any order.

    Args:
        pipeline: what makes them.
        lines: are taken as there is room.
        batch: pictures made at once, where engine and memory allow it.
        done: takes the pictures of a line.
        failed: is told of a line of which none can be made; what it raises ends all.
    """
    # Nobody else's requests are beside these: only the engine and memory bound them.
    limits = Limits(
        pixels=_ANY, images=_ANY, steps=_ANY, prompt=_ANY, queue=_ANY, seconds=math.inf, batch=batch, batch_wait=_PATIENCE
    )
    worker = Worker("prompts", pipeline, limits)
    waiting: dict[Future[Made], Asked] = {}
    with interrupts_held() as check:
        worker.start()
        try:
            for asked in lines:
                check()
                while sum(each.request.images for each in waiting.values()) >= _AHEAD * batch:
                    check()
                    _take(worker, waiting, done, failed)
                if future := _submitted(worker, asked, limits, failed):
                    waiting[future] = asked
            while waiting:
                check()
                _take(worker, waiting, done, failed)
        finally:
            worker.end()
            worker.join()


def _submitted(worker: Worker, asked: Asked, limits: Limits, failed: Failed) -> Future[Made] | None:
    worker.expect()
    try:
        ticket = admit(worker.pipeline, asked.request, limits)
    except BaseException as error:
        worker.give_up()
        if not isinstance(error, UserError):
            raise
        failed(asked.number, error)
        return None
    worker.put(ticket)
    return ticket.future


def _take(worker: Worker, waiting: dict[Future[Made], Asked], done: Done, failed: Failed) -> None:
    """Hand on those that are made, or wait a while until some are."""
    ready = wait(waiting, timeout=_LOOK, return_when=FIRST_COMPLETED).done
    if not ready and not worker.is_alive():
        raise RuntimeError("the thread that makes pictures has ended")
    for future in ready:
        asked = waiting.pop(future)
        error = future.exception()
        if error is None:
            done(asked, future.result())
        elif isinstance(error, UserError):
            failed(asked.number, error)
        else:
            raise error
