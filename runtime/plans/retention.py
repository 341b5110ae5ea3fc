"""Which entries of a cache of features stay: the newest that later steps read, and none that is about to be replaced.

An entry is a feature as one step made it. A half entry has the rows of the prompt alone: see ``Guidance``.
"""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from typing import Generic, TypeVar

from runtime.plans.schedule import Schedule, Step

__all__ = ["Entry", "Retention"]

Value = TypeVar("Value")


@dataclass(frozen=True)
class Entry(Generic[Value]):
    """A feature as ``step`` made it."""

    step: int
    half: bool
    value: Value


class Retention(Generic[Value]):
    """Entries by the name of their feature, the newest first.

    Args:
        schedule: whose steps are taken in order.
    """

    def __init__(self, schedule: Schedule) -> None:
        self._schedule = schedule
        self._entries: dict[str, list[Entry[Value]]] = {}

    def __iter__(self) -> Iterator[tuple[str, Entry[Value]]]:
        return ((name, entry) for name, entries in self._entries.items() for entry in entries)

    def copy(self) -> "Retention[Value]":
        """The same entries, to go on with apart."""
        other = Retention[Value](self._schedule)
        other._entries = {name: list(entries) for name, entries in self._entries.items()}
        return other

    def newest(self, name: str, whole: bool = False) -> list[Entry[Value]]:
        """A feature's entries; those with all rows, if ``whole``."""
        return [entry for entry in self._entries[name] if not (whole and entry.half)]

    def read(self, step: Step, name: str) -> tuple[list[Entry[Value]], list[Entry[Value]]]:
        """The entries from which a step takes a feature, and those for the negative prompt's rows where they are others."""
        depth = self._schedule.depth(name)
        last = self.newest(name)[:depth]
        split = not self._schedule.is_half(step, name) and any(entry.half for entry in last)
        return last, self.newest(name, whole=True)[:depth] if split else []

    def is_made(self, step: Step, name: str) -> bool:
        """Whether a step reads a feature that it has to put together from several entries."""
        last, whole = self.read(step, name)
        return len(last) > 1 or bool(whole)

    def replace(self, name: str, old: Entry[Value], value: Value) -> None:
        """Put another value into an entry."""
        entries = self._entries[name]
        entries[entries.index(old)] = Entry(old.step, old.half, value)

    def make_room(self, step: Step) -> None:
        """Let go what a step is about to refresh, so that old and new are never held together."""
        for name in step.keep & self._entries.keys():
            depth = self._schedule.depth(name)
            whole_depth = depth if self._schedule.is_half(step, name) else depth - 1
            self._keep(name, self._newest(name, depth - 1, whole_depth))
        self._drop_dead(step.index, step.keep)

    def add(self, step: Step, name: str, value: Value) -> None:
        """Put what a step made in front."""
        self._entries.setdefault(name, []).insert(0, Entry(step.index, self._schedule.is_half(step, name), value))
        depth = self._schedule.depth(name)
        self._keep(name, self._newest(name, depth, depth))

    def end(self, index: int) -> None:
        """Let go what no step after this one reads."""
        self._drop_dead(index, tuple(self._entries))

    def _newest(self, name: str, depth: int, whole_depth: int) -> list[Entry[Value]]:
        kept = [*self.newest(name)[:depth], *self.newest(name, whole=True)[:whole_depth]]
        return [entry for entry in self._entries[name] if any(entry is one for one in kept)]

    def _drop_dead(self, index: int, names: Iterable[str]) -> None:
        for name in names:
            if name in self._entries:
                entries = self._entries[name]
                self._keep(name, [entry for entry in entries if self._schedule.is_read_later(name, entry.step, index)])

    def _keep(self, name: str, entries: list[Entry[Value]]) -> None:
        if entries:
            self._entries[name] = entries
        else:
            del self._entries[name]
