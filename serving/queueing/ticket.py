"""A request that waits for its pictures, and what it gets."""

import asyncio
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import Future, InvalidStateError
from contextlib import suppress
from dataclasses import dataclass, replace
from typing import Any

from PIL import Image

from runtime import Generation, Plan, Request, StepRecord
from runtime.pipeline import Callback
from serving.errors import LateError

__all__ = ["Kind", "Made", "Single", "Ticket", "singles", "waited_for"]


@dataclass(frozen=True)
class Single:
    """One picture to be made: all in which pictures of one batch may differ."""

    prompt: str
    negative_prompt: str
    seed: int


@dataclass(frozen=True)
class Kind:
    """The values that pictures must share to be made at once, so that each is the one that it would be alone.

    ``common`` is a request with the sizes and guidance that hold, and with prompts and seeds that mean nothing. ``tokens`` are
    those of its text features: a longer prompt beside it would lengthen them. ``most`` pictures of it are made at once.
    """

    common: Request
    tokens: int
    most: int

    def request_for(self, singles: Sequence[Single]) -> Request:
        """The one request for several pictures."""
        return replace(
            self.common,
            prompt=[each.prompt for each in singles],
            negative_prompt=[each.negative_prompt for each in singles],
            seed=[each.seed for each in singles],
        )


@dataclass(frozen=True)
class Made:
    """The answer to a request: its pictures and, where they were made in several batches, the steps of the first of these."""

    images: tuple[Image.Image, ...]
    made_from: tuple[Mapping[str, Any], ...]
    """Of each picture, what ``Generation.made_from`` tells."""
    seeds: tuple[int, ...]
    steps: tuple[StepRecord, ...]
    plan: Plan
    guidance_scale: float
    unread: tuple[str, ...]
    seconds: float
    """That the batches took which its pictures were in."""
    waited: float
    """Seconds until the first of them began."""
    batches: tuple[int, ...]
    """Pictures in each of them, those of others included."""
    alone: Generation | None
    """The call, of a request that shares no batch."""


class Ticket:
    """A request in the queue. Whoever waits for ``future`` gives it up by cancelling it.

    Args:
        request: fitted to the limits of the service and to the bundle.
        kind: what it shares batches with; None for a request that runs alone.
        seconds: after which nobody waits for it any more.
        step: is told of every step of a request that runs alone.
    """

    def __init__(self, request: Request, kind: Kind | None, seconds: float, step: Callback | None = None) -> None:
        self.request, self.kind, self.step = request, kind, step
        self.singles = singles(request) if kind else ()
        self.future: Future[Made] = Future()
        self.arrived = time.monotonic()
        self._until = self.arrived + seconds
        self.taken = 0
        """Pictures that a batch has taken; the rest wait."""
        self._began: float | None = None
        self._images: list[tuple[Image.Image, Mapping[str, Any]] | None] = [None] * request.images
        self._generations: list[tuple[Generation, int]] = []

    @property
    def waiting(self) -> int:
        """Pictures that no batch has taken."""
        return self.request.images - self.taken

    @property
    def is_over(self) -> bool:
        """Whether nobody waits for it: it is answered, given up or late."""
        return self.future.done() or not self.seconds_left

    @property
    def seconds_left(self) -> float:
        """Until it is late."""
        return max(0.0, self._until - time.monotonic())

    def expire(self) -> None:
        """Answer it with an error where its time is over."""
        if not self.seconds_left:
            self.fail(LateError("the pictures were not finished in the time that a request may take; ask for less, or later"))

    def begin(self) -> None:
        """Its first pictures are being made."""
        self._began = self._began or time.monotonic()

    def add(self, first: int, count: int, generation: Generation, at: int) -> None:
        """Take pictures that are made; the last ones answer the request.

        Args:
            first: of them, its number among the ticket's pictures.
            count: how many.
            generation: which they are in, beside others'.
            at: the place of the first there.
        """
        for number in range(count):
            self._images[first + number] = generation.images[at + number], generation.made_from(at + number)
        self._generations.append((replace(generation, images=[]), len(generation.images)))
        made = [each for each in self._images if each is not None]
        if len(made) == len(self._images):
            self._answer(made)

    def _answer(self, pictures: Sequence[tuple[Image.Image, Mapping[str, Any]]]) -> None:
        first = self._generations[0][0]
        made = Made(
            images=tuple(image for image, _ in pictures),
            made_from=tuple(told for _, told in pictures),
            seeds=self.request.seeds,
            steps=tuple(first.steps),
            plan=first.plan,
            guidance_scale=first.guidance_scale or 0.0,
            unread=first.unread,
            seconds=sum(generation.seconds for generation, _ in self._generations),
            waited=(self._began or self.arrived) - self.arrived,
            batches=tuple(count for _, count in self._generations),
            alone=replace(first, images=[image for image, _ in pictures]) if self.kind is None else None,
        )
        with suppress(InvalidStateError):  # given up in this very moment
            self.future.set_result(made)

    def fail(self, error: BaseException) -> None:
        """Answer it with an error."""
        with suppress(InvalidStateError):
            self.future.set_exception(error)


def singles(request: Request) -> tuple[Single, ...]:
    """The pictures of a request, in its order: those of a prompt follow each other."""
    negatives = request.negative_prompts
    negatives = negatives * len(request.prompts) if len(negatives) == 1 else negatives
    count = request.num_images
    return tuple(
        Single(request.prompts[number // count], negatives[number // count], seed)
        for number, seed in enumerate(request.picture_seeds)
    )


async def waited_for(ticket: Ticket, gone: "asyncio.Future[None] | None" = None) -> Made | None:
    """The pictures of a ticket, which is given up where this is cancelled.

    Args:
        ticket: in the queue.
        gone: is done when nobody waits for them any more; the ticket is then given up, and there is nothing.

    Raises:
        LateError: its time is over before.
    """
    made = asyncio.wrap_future(ticket.future)
    either: set[asyncio.Future[Any]] = {made} if gone is None else {made, gone}
    try:
        while not made.done() and ticket.seconds_left:
            await asyncio.wait(either, timeout=ticket.seconds_left, return_when=asyncio.FIRST_COMPLETED)
            if gone is not None and gone.done() and not made.done():
                return None
        ticket.expire()
        return await made
    finally:
        made.cancel()  # and with it the ticket's own, so that nothing more is made for it
