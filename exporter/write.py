"""Write a bundle's segments: the ONNX file of each, and what each engine compiles of it."""

import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from engines import Engine, Profile, Segment, Traced
from engines.bundle import describe_file
from engines.manifest import Compiled, Feature
from engines.shapes import resolve
from exporter.graph import Graph
from exporter.trace import trace

__all__ = ["Progress", "profile_of", "write_segments"]

Progress = Callable[[int, int, str], None]
"""Told what is being done: steps done, steps in all, and what comes next."""


def write_segments(
    folder: Path, graph: Graph, segments: Sequence[Segment], engines: Sequence[Engine], targets: Mapping[str, Sequence[str]],
    sizes: Sequence[tuple[int, int]], max_images: int, progress: Progress,
) -> list[Segment]:  # fmt: skip
    """Trace and compile every segment into ``folder``; returns the segments with their files.

    Args:
        folder: the bundle's folder, being filled.
        graph: the checkpoint's graph with its modules.
        segments: how the graph is cut.
        engines: for each segment, those that compile.
        targets: compute capabilities by engine name.
        sizes: picture sizes (height, width) in pixels, for engines with a profile.
        max_images: images per call, likewise.
        progress: told before every step.
    """
    compilers = [engine for engine in engines if engine.compiles]
    (folder / "segments").mkdir()
    total, done, written = len(segments) * (1 + len(compilers)), 0, []
    for segment in segments:
        started = time.perf_counter()
        progress(done, total, f"{segment.name}: tracing")
        path = folder / "segments" / f"{segment.name}.onnx"
        traced = trace(segment, graph.segment_module(segment), graph.features, graph.depth, path)
        done += 1
        compiled = {}
        for engine in compilers:
            progress(done, total, f"{segment.name}: compiling for {engine.name}")
            profile = profile_of(segment, graph.features, sizes, max_images, graph.vae_scale)
            compiled[engine.name] = _compile(engine, traced, folder, profile, targets[engine.name])
            done += 1
        data = path.with_name(f"{path.name}.data")
        onnx = tuple(describe_file(folder, file) for file in (path, data) if file.exists())
        seconds = round(time.perf_counter() - started, 1)
        written.append(segment.model_copy(update={"onnx": onnx, "engines": compiled, "seconds": seconds}))
    progress(total, total, "done")
    return written


def _compile(engine: Engine, traced: Traced, folder: Path, profile: Profile, targets: Sequence[str]) -> Compiled:
    stem = folder / "engines" / engine.name / traced.segment.name
    stem.parent.mkdir(parents=True, exist_ok=True)
    paths = engine.compile(traced, stem, profile, targets)
    return Compiled(files=tuple(describe_file(folder, path) for path in paths), version=engine.version(), targets=tuple(targets))


def profile_of(
    segment: Segment, features: Mapping[str, Feature], sizes: Sequence[tuple[int, int]], max_images: int, vae_scale: int
) -> Profile:
    """The input shapes an engine must take: one row at the smallest size up to guidance for all images at the largest.

    It is optimised for one image with guidance (two rows of the UNet) at the first size.
    """

    def shapes(images: int, height: int, width: int) -> dict[str, tuple[int, ...]]:
        rows = 1 if images == 0 else 2 * images
        dims = {"batch": rows, "images": max(images, 1), "height": height // vae_scale, "width": width // vae_scale}
        return {name: resolve(features[name].shape, dims) for name in segment.inputs}

    heights, widths = [size[0] for size in sizes], [size[1] for size in sizes]
    return Profile(shapes(0, min(heights), min(widths)), shapes(1, *sizes[0]), shapes(max_images, max(heights), max(widths)))
