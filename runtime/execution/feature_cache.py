"""The features that a call keeps from step to step: as engines wrote them, or forecast from those of two key steps."""

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from runtime.plans.retention import Entry, Retention
from runtime.plans.schedule import Schedule, Step

__all__ = ["FeatureCache", "prompt_half"]


class _Kept(NamedTuple):
    """A tensor, and whether its memory is the cache's own: not where an engine writes."""

    tensor: Tensor
    own: bool


class FeatureCache:
    """Reads and writes what steps inherit.

    Args:
        schedule: whose steps are taken in order.
        overwritten: whether an engine that does the same again writes to the same memory, as a recorded graph does. What is to
            outlive that is copied before.
    """

    def __init__(self, schedule: Schedule, overwritten: bool) -> None:
        self._schedule, self._overwritten = schedule, overwritten
        self._kept = Retention[_Kept](schedule)

    def last(self, name: str, half: bool) -> tuple[Tensor, bool]:
        """A feature as the last key step made it, and whether it has the prompt's rows only: always, with ``half``."""
        entry = self._kept.newest(name)[0]
        return _prompt(entry) if half else entry.value.tensor, entry.half or half

    def read(self, step: Step, name: str) -> tuple[Tensor, bool]:
        """A feature for a step that inherits it, and whether it lies where no engine wrote it: elsewhere at every step."""
        last, whole = self._kept.read(step, name)
        if self._schedule.is_half(step, name):
            return self._forecast(step, name, last, list(map(_prompt, last)))
        if not whole:
            return self._forecast(step, name, last, [entry.value.tensor for entry in last])
        negative, _ = self._forecast(step, name, whole, list(map(_negative, whole)))
        positive, _ = self._forecast(step, name, last, list(map(_prompt, last)))
        return torch.cat([negative, positive]), True

    def make_room(self, step: Step) -> None:
        """Let go what a step is about to refresh and nobody will read; save what somebody will."""
        self._kept.make_room(step)
        if self._overwritten:
            for name, entry in list(self._kept):
                if name in step.keep and not entry.value.own:
                    self._kept.replace(name, entry, _Kept(entry.value.tensor.clone(), own=True))

    def write(self, step: Step, name: str, tensor: Tensor, own: bool = False) -> None:
        """Keep what a step made."""
        self._kept.add(step, name, _Kept(tensor, own))

    def end(self, index: int) -> None:
        """Let go what no step after this one reads."""
        self._kept.end(index)

    def _forecast(self, step: Step, name: str, entries: Sequence[Entry[_Kept]], tensors: Sequence[Tensor]) -> tuple[Tensor, bool]:
        """A feature from one or two key steps, the newer first, whose rows are ``tensors``."""
        predict = self._schedule.predict(step.unet, name)
        if predict is None or len(entries) == 1:
            return tensors[0], entries[0].value.own
        newer, older = (entry.step for entry in entries)
        ahead = predict.damping * (step.index - newer) / (newer - older)
        # One pass, in float32 inside, whatever the precision of the feature.
        return torch.lerp(tensors[1], tensors[0], 1 + ahead), True


def prompt_half(tensor: Tensor) -> Tensor:
    """The rows of the prompt, which come second under guidance; a view."""
    return tensor[len(tensor) // 2 :]


def _prompt(entry: Entry[_Kept]) -> Tensor:
    return entry.value.tensor if entry.half else prompt_half(entry.value.tensor)


def _negative(entry: Entry[_Kept]) -> Tensor:
    return entry.value.tensor[: len(entry.value.tensor) // 2]
