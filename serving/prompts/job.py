"""The work on a file of prompts: where pictures go, which are there already, and when a shard is whole."""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from engines.errors import UserError
from serving.prompts.folder import is_there, paths_for, write
from serving.prompts.lines import JSON_SUFFIXES, Asked, Line, read_line, read_lines
from serving.prompts.shards import Shards
from serving.queueing.ticket import Made

__all__ = ["Course", "Job"]


@dataclass(frozen=True)
class Job:
    """All that is the same for every line; it is sent to workers."""

    file: Path
    defaults: dict[str, Any]
    bundle: Path
    key: str
    """The bundle's own."""
    engine: str
    out: Path
    shard_size: int | None
    """Lines of a shard; None for PNG files in ``out``."""
    batch: int

    def read(self, line: Line) -> Asked:
        """The request of a line; raises RequestError or PlanError where there is none."""
        as_json = self.file.suffix.lower() in JSON_SUFFIXES
        return read_line(line, as_json=as_json, defaults=self.defaults, folder=self.file.parent, bundle=self.key)

    def folder_of(self, number: int) -> Path:
        """Where the PNG files of a line are written."""
        return self.out if self.shards is None else self.shards.pictures(self.shards.number_of(number))

    @property
    def shards(self) -> Shards | None:
        """Where the shards are, if there are to be any."""
        return None if self.shard_size is None else Shards(self.out, self.shard_size)

    def write(self, asked: Asked, made: Made) -> None:
        """Write the pictures of a line."""
        write(self.folder_of(asked.number), asked, made)


class Course:
    """The lines of a job in their order, what became of them, and the shards that are whole by that.

    Args:
        job: what is done.
        failed: is told of a line of which no picture can be made; what it raises ends all.
    """

    def __init__(self, job: Job, failed: Callable[[int, UserError], None]) -> None:
        self._job, self._failed = job, failed
        self.there = 0
        """Lines whose pictures were there already."""
        self._shards = job.shards
        if self._shards is not None:
            self._shards.check_size()
        self._open: dict[int, _Range] = {}
        self._last: int | None = None

    def lines(self) -> Iterator[tuple[Line, Asked]]:
        """The lines whose pictures are to be made. To be taken to the end: what comes after the last one closes the shards."""
        for line in read_lines(self._job.file):
            marks = self._enter(line.number)
            try:
                asked = self._job.read(line)
            except UserError as error:
                self.failed(line.number, error)
                continue
            if is_there(self._job.folder_of(line.number), asked, marks):
                self.there += 1
                self._settle(line.number, asked.request.images)
            else:
                yield line, asked
        self._last = None  # none is to come
        self._close_whole_ones()

    def done(self, number: int, pictures: int) -> None:
        """The pictures of a line are written."""
        if self._shards is not None:
            self._open[self._shards.number_of(number)].changed = True
        self._settle(number, pictures)

    def failed(self, number: int, error: UserError) -> None:
        """No picture of a line can be made."""
        self._failed(number, error)
        self._settle(number, 0)

    def _enter(self, number: int) -> Mapping[str, str]:
        """A line comes; the marks of the pictures that its shard has."""
        if self._shards is None:
            return {}
        shard = self._shards.number_of(number)
        if shard not in self._open:
            # Where its hidden folder is there, pictures were made that it does not have yet.
            self._open[shard] = _Range(self._shards.marks(shard), self._shards.pictures(shard).exists())
        found = self._open[shard]
        found.waiting.add(number)
        self._last = shard
        self._close_whole_ones()
        return found.marks

    def _settle(self, number: int, pictures: int) -> None:
        if self._shards is None:
            return
        shard = self._shards.number_of(number)
        self._open[shard].waiting.discard(number)
        self._open[shard].pictures[number] = pictures
        self._close_whole_ones()

    def _close_whole_ones(self) -> None:
        """Write the shards of which no line waits, and none is to come."""
        if self._shards is None:
            return
        for shard in [shard for shard, found in self._open.items() if not found.waiting and shard != self._last]:
            found, folder = self._open.pop(shard), self._shards.pictures(shard)
            numbers = sorted(found.pictures)
            wanted = [path for number in numbers for path in _paths(folder, number, found.pictures[number])]
            gone = not set(found.marks) <= {path.name for path in wanted}  # of lines that are no more, or are bad now
            self._shards.close(shard, wanted, changed=found.changed or gone)


class _Range:
    """The lines of a shard that is being made."""

    def __init__(self, marks: Mapping[str, str], changed: bool) -> None:
        self.marks, self.changed = marks, changed
        self.waiting: set[int] = set()
        self.pictures: dict[int, int] = {}
        """Pictures of each line that is done."""


def _paths(folder: Path, number: int, pictures: int) -> list[Path]:
    return paths_for(folder, number, pictures) if pictures else []
