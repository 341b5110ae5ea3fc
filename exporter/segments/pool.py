"""Writes a bundle's segments, one after another or in several processes, each of which holds one segment's weights."""

import os
import signal
import threading
from collections.abc import Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from functools import partial
from multiprocessing import get_context, parent_process
from pathlib import Path
from typing import Any

import torch

from engines import Engine, Segment, make_engine
from engines.bundle.manifest import Precision
from exporter.build import BuildOptions, targets_of
from exporter.errors import BuildError
from exporter.graph.checkpoint import open_source
from exporter.graph.graph import Graph, check_size, load_graph
from exporter.segments.artifacts import Artifacts
from exporter.segments.progress import Progress, Step, TimeLeft
from exporter.segments.writer import CompileSpec, Writer

__all__ = ["DTYPE", "prepare", "write_all"]

DTYPE: dict[Precision, torch.dtype] = {"fp32": torch.float32, "fp16": torch.float16}
_PARAMETERS = 1e8
"""So many take about as long as one unit more, in the blocks of Stable Diffusion 1.5's UNet: for estimates of the time left."""
_WORKER: list[Writer] = []
"""In a worker process: its writer."""


def prepare(options: BuildOptions, made_from: Mapping[str, Any]) -> tuple[Graph, list[Engine], CompileSpec]:
    """What a writer works with; everything that can be found out before anything is written is found out here.

    Raises:
        SourceError: the source cannot be read, is damaged, or its parts do not fit together.
        BuildError: a size is none that the UNet takes.
    """
    checkpoint = open_source(options.source, options.variant, options.unet, options.config)
    checkpoint.check_weights(options.variant)
    first = options.sizes[0] if options.sizes else None
    graph = load_graph(checkpoint, options.variant, DTYPE[options.precision], first)
    sizes = options.sizes or (graph.size,)
    for size in sizes:
        check_size(size, graph.size_multiple)
    engines = [make_engine(name) for name in dict.fromkeys(options.engines)]
    return graph, engines, CompileSpec(made_from, targets_of(options, engines), sizes, options.max_images, options.static)


def write_all(writer: Writer, segments: Sequence[Segment], options: BuildOptions, progress: Progress) -> list[Segment]:
    """Write every segment; returns them with their files, in the order given.

    Raises:
        BuildError: one of several processes has ended.
    """
    tell = _Teller(progress, len(segments), TimeLeft(_weights(writer, segments)))
    if options.jobs == 1:
        written = []
        for segment in segments:
            written.append(writer.write(segment, partial(tell, segment.name)))
            tell.finish(segment.name)
    else:
        written = _side_by_side(writer, segments, options, tell)
    tell("", "done")
    return written


def _weights(writer: Writer, segments: Sequence[Segment]) -> dict[str, float]:
    """How long each segment takes that is still to be written, relative to others: tracing goes by units, weights by size."""
    todo = [segment for segment in segments if not writer.is_written(segment)]
    return {segment.name: len(segment.units) + writer.graph.parameters(segment) / _PARAMETERS for segment in todo}


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


def _side_by_side(writer: Writer, segments: Sequence[Segment], options: BuildOptions, tell: _Teller) -> list[Segment]:
    written = {}
    tell("", f"starting {options.jobs} processes")
    given = options, writer.pieces.place, writer.wanted.made_from
    with ProcessPoolExecutor(options.jobs, get_context("spawn"), _start, given) as pool:
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
                f"one of {options.jobs} processes ended, most likely for want of memory; give fewer --jobs; "
                "the same command goes on from what was finished"
            ) from error
        except BaseException:
            pool.shutdown(wait=True, cancel_futures=True)
            raise
    return [written[segment.name] for segment in segments]


def _start(options: BuildOptions, place: Path, made_from: Mapping[str, Any]) -> None:
    """In a new process: open what it needs, and see to it that it does not outlive the build."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # a terminal sends it to all; the build stops its processes itself
    parent = parent_process()
    assert parent is not None

    def follow() -> None:
        parent.join()
        os._exit(1)

    threading.Thread(target=follow, daemon=True).start()
    torch.set_num_threads(max(1, torch.get_num_threads() // options.jobs))
    _WORKER.append(Writer(*prepare(options, made_from), Artifacts(place)))


def _write(segment: Segment) -> Segment:
    (writer,) = _WORKER
    return writer.write(segment)
