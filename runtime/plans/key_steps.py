"""Sampling modes: at which steps a rule computes afresh. The first step of a rule's range is always a key step.

The paper (A-SDM, arXiv 2406.00210) inherits under several sampling modes and does not say which; these are DeepCache's two, and
this project's own.
"""

import math
import random
from typing import Annotated, Literal

from pydantic import Field

from engines.bundle.names import STEM
from engines.support.records import Name, Record

__all__ = ["MODES", "Back", "Explicit", "Front", "Mode", "Quadratic", "Random", "Threshold", "Uniform"]

_MOST_STEPS = 1_000_000
"""Of a schedule: far more than any scheduler takes, and few enough to be laid out at once."""

Every = Annotated[int, Field(ge=1, le=_MOST_STEPS)]
Power = Annotated[float, Field(ge=1, le=20)]


class Uniform(Record):
    """Key steps at 0, N, 2N, ..."""

    mode: Literal["uniform"] = "uniform"
    every: Every

    def keys(self, steps: int) -> set[int]:
        """Indices of the key steps of a range of ``steps`` steps."""
        return set(range(0, steps, self.every))


class Quadratic(Record):
    """DeepCache's non-uniform schedule (arXiv 2312.00858, section 3.4): key steps are dense around ``center``.

    One step in ``every`` is a key step, at ``center + x ** power`` with x evenly spaced; roots and powers keep their sign.
    """

    mode: Literal["quadratic"] = "quadratic"
    every: Every
    center: float = Field(default=0.3, ge=0, le=1)
    """As a share of the range."""
    power: Power = 1.4

    def keys(self, steps: int) -> set[int]:
        """Indices of the key steps of a range of ``steps`` steps."""
        count, center = math.ceil(steps / self.every), self.center * steps
        low, high = _signed_power(-center, 1 / self.power), _signed_power(steps - center, 1 / self.power)
        points = (low + (high - low) * i / count for i in range(count))
        return {0} | {min(steps - 1, max(0, int(_signed_power(x, self.power) + center + 1e-9))) for x in points}


class Front(Record):
    """One step in ``every`` is a key step; they are dense early."""

    mode: Literal["front"] = "front"
    every: Every
    power: Power = 2.0

    def keys(self, steps: int) -> set[int]:
        """Indices of the key steps of a range of ``steps`` steps."""
        return _fill([steps * share**self.power for share in _shares(steps, self.every)], steps)


class Back(Record):
    """One step in ``every`` is a key step; they are dense late."""

    mode: Literal["back"] = "back"
    every: Every
    power: Power = 2.0

    def keys(self, steps: int) -> set[int]:
        """Indices of the key steps of a range of ``steps`` steps."""
        late = {steps - key for key in _fill([steps * share**self.power for share in _shares(steps, self.every)], steps)}
        return {0} | {key for key in late if key < steps}


class Explicit(Record):
    """Key steps as listed; with ``of``, for a schedule of that many steps, and scaled to any other."""

    mode: Literal["explicit"] = "explicit"
    steps: tuple[Annotated[int, Field(ge=0, lt=_MOST_STEPS)], ...] = Field(max_length=10_000)
    of: Every | None = None

    def keys(self, steps: int) -> set[int]:
        """Indices of the key steps of a range of ``steps`` steps.

        Raises:
            ValueError: a listed step is beyond the range, or beyond ``of``.
        """
        count = steps if self.of is None else self.of
        if self.steps and max(self.steps) >= count:
            reason = f"only {steps} steps run" if self.of is None else f"they are listed for {self.of} (of)"
            raise ValueError(f"steps names step {max(self.steps)}, but {reason}: choose from 0 to {count - 1}")
        return {key * steps // count for key in self.steps}


class Random(Record):
    """One step in ``every`` is a key step, drawn with ``seed``: a control for the others."""

    mode: Literal["random"] = "random"
    every: Every
    seed: int = Field(default=0, ge=-(2**63), lt=2**63)

    def keys(self, steps: int) -> set[int]:
        """Indices of the key steps of a range of ``steps`` steps."""
        count = math.ceil(steps / self.every)
        return {0, *random.Random(self.seed).sample(range(1, steps), count - 1)}


class Threshold(Record):
    """Adaptive: a step is a key step when ``feature`` has changed by more than ``above`` since the last one.

    The change is the norm of the difference over the norm of the feature at the last key step.
    """

    mode: Literal["threshold"] = "threshold"
    above: float = Field(ge=0, allow_inf_nan=False)
    feature: Name = STEM


Mode = Annotated[Uniform | Quadratic | Front | Back | Explicit | Random | Threshold, Field(discriminator="mode")]
MODES: dict[object, type[Record]] = {
    mode.model_fields["mode"].default: mode for mode in (Uniform, Quadratic, Front, Back, Explicit, Random, Threshold)
}
"""The modes by name."""


def _signed_power(x: float, power: float) -> float:
    return math.copysign(abs(x) ** power, x)


def _shares(steps: int, every: int) -> list[float]:
    count = math.ceil(steps / every)
    return [i / count for i in range(count)]


def _fill(positions: list[float], steps: int) -> set[int]:
    """Whole steps for increasing positions, each at least one after the one before, as long as there are steps."""
    keys: list[int] = []
    for position in positions:
        key = max(round(position), keys[-1] + 1 if keys else 0)
        if key < steps:
            keys.append(key)
    return set(keys)
