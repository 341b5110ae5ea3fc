"""Writes a bundle's segments, one after another or in several processes, each of which holds one segment's weights."""

import ctypes
import os
import signal
import sys
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import suppress
from functools import partial
from multiprocessing import get_context, parent_process

import torch

from engines import Segment
from engines.bundle.names import TEXT, VAE_DECODER, VAE_ENCODER
from exporter.errors import BuildError
from exporter.segments.progress import Progress, Step, TimeLeft
from exporter.segments.writer import Writer

__all__ = ["write_all"]

_PARAMETERS = 1e8
"""So many take about as long as one unit more, in the blocks of Stable Diffusion 1.5's UNet: for estimates of the time left."""
_AT_PARENTS_DEATH = 1  # PR_SET_PDEATHSIG
_WORKER: list[Writer] = []
"""In a worker process: its writer."""
_AS_UNITS = {TEXT: 6, VAE_DECODER: 16, VAE_ENCODER: 14}
"""Units of the UNet that take as long to trace as one of these, which is one unit of as many layers."""


def write_all(
    writer: Writer, segments: Sequence[Segment], progress: Progress, jobs: int = 1, reopen: Callable[[], Writer] | None = None
) -> list[Segment]:
    """Write every segment; returns them with their files, in the order given.

    Args:
        writer: of the bundle.
        segments: to write.
        progress: told before every step.
        jobs: how many processes work side by side.
        reopen: gives each of several processes a writer of its own; a function that can be pickled.

    Raises:
        BuildError: one of several processes has ended.
    """
    tell = _Teller(progress, len(segments), TimeLeft(_weights(writer, segments)))
    if jobs == 1 or reopen is None:
        written = []
        for segment in segments:
            written.append(writer.write(segment, partial(tell, segment.name)))
            tell.finish(segment.name)
    else:
        written = _side_by_side(writer, segments, jobs, reopen, tell)
    tell("", "done")
    return written


def _weights(writer: Writer, segments: Sequence[Segment]) -> dict[str, float]:
    """How long each segment takes that is still to be written, relative to others: tracing goes by units, weights by size."""
    todo = [segment for segment in segments if not writer.is_written(segment)]
    return {
        segment.name: sum(_AS_UNITS.get(unit, 1) for unit in segment.units) + writer.graph.parameters(segment) / _PARAMETERS
        for segment in todo
    }


class _Teller:
    """Tells how far the writing is: so many segments done, and the time left."""

    def __init__(self, progress: Progress, total: int, left: TimeLeft) -> None:
        self._progress, self._total, self._left, self._done = progress, total, left, 0

    def __call__(self, segment: str, phase: str) -> None:
        self._progress(Step(self._done, self._total, segment, phase, self._left.seconds()))

    def finish(self, segment: str) -> None:
        """A segment is done."""
        self._done += 1
        self._left.finish(segment)


def _side_by_side(
    writer: Writer, segments: Sequence[Segment], jobs: int, reopen: Callable[[], Writer], tell: _Teller
) -> list[Segment]:
    written = {}
    tell("", f"starting {jobs} processes")
    with ProcessPoolExecutor(jobs, get_context("spawn"), _start, (jobs, reopen)) as pool:
        try:
            # The largest first: what is done last should be short.
            order = sorted(segments, key=lambda segment: -writer.graph.parameters(segment))
            started = {pool.submit(_write, segment): segment.name for segment in order}
            for future in as_completed(started):
                written[started[future]] = future.result()
                tell.finish(started[future])
                tell(started[future], "written")
        except BrokenProcessPool as error:
            raise BuildError(
                f"one of {jobs} processes ended, most likely for want of memory; give fewer --jobs; "
                "the same command resumes from what was finished"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [written[segment.name] for segment in segments]


def _start(jobs: int, reopen: Callable[[], Writer]) -> None:
    """In a new process: open what it needs, and see to it that it does not outlive the build."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the build stops its processes itself
    _end_with_the_build()
    torch.set_num_threads(max(1, torch.get_num_threads() // jobs))
    _WORKER.append(reopen())


def _end_with_the_build() -> None:
    """End this process when the one that started it ends, even if it is killed: the next build writes in the same place.

    Linux does so at once; elsewhere a thread does, as soon as what runs lets it.
    """
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    if sys.platform.startswith("linux"):
        with suppress(OSError, AttributeError):  # a C library without it
            ctypes.CDLL(None).prctl(_AT_PARENTS_DEATH, signal.SIGKILL)


def _write(segment: Segment) -> Segment:
    (writer,) = _WORKER
    return writer.write(segment)
