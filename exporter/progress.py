"""What a build tells of its progress."""

from collections.abc import Callable
from typing import NamedTuple

__all__ = ["Progress", "Step"]


class Step(NamedTuple):
    """What is being done: steps done, steps in all (None where that is not known yet), of which segment, and what comes next."""

    done: int
    total: int | None
    segment: str
    phase: str

    def __str__(self) -> str:
        return f"{self.segment}: {self.phase}" if self.segment else self.phase


Progress = Callable[[Step], None]
