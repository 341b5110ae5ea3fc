"""Progress of a build: its steps, and an estimate of the time left."""

import time
from collections.abc import Callable, Mapping
from typing import NamedTuple

__all__ = ["Progress", "Step", "TimeLeft"]


class Step(NamedTuple):
    """The step that begins: steps done before it, steps in all (None where not known yet), its segment and its phase.

    ``seconds_left`` is an estimate for all that is still to be done, from now on; None while nothing is known.
    """

    done: int
    total: int | None
    segment: str
    phase: str
    seconds_left: float | None = None

    def __str__(self) -> str:
        return f"{self.segment}: {self.phase}" if self.segment else self.phase


Progress = Callable[[Step], None]


class TimeLeft:
    """Estimates the time left from the time that what is done took.

    Args:
        weights: how long each piece of work takes, by its name, in any unit.
        now: a clock, in seconds.
    """

    def __init__(self, weights: Mapping[str, float], now: Callable[[], float] = time.monotonic) -> None:
        self._now, self._left, self._done = now, dict(weights), 0.0
        self._started = self._last = now()

    def finish(self, name: str) -> None:
        """A piece of work is done; one that is not among them has taken no time."""
        if name in self._left:
            self._done += self._left.pop(name)
            self._last = self._now()

    def seconds(self) -> float | None:
        """From now on; None before the first piece of work is done."""
        if not self._left:
            return 0.0
        if not self._done:
            return None
        left = (self._last - self._started) / self._done * sum(self._left.values())
        return round(max(left - (self._now() - self._last), 0.0), 1)
