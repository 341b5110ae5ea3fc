"""Write a bundle's segments: the ONNX file of each, and what each engine compiles of it. What is finished already is kept."""

import ctypes
import gc
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

from engines import Engine, Profile, Segment, Traced
from engines.bundle.manifest import Compiled, Feature, Precision, VaePrecision
from engines.bundle.names import TEXT, TOKENS, VAE
from engines.bundle.shapes import resolve
from exporter.graph.components import part_of
from exporter.graph.graph import Graph
from exporter.segments.artifacts import Artifacts, key_of
from exporter.segments.trace import opset_of, trace_program, write_onnx

__all__ = ["CompileSpec", "Writer", "profile_of"]

_LARGE = 5_000_000
"""Parameters from which it is worth a look through all objects to be rid of a segment's weights before the next one's come."""

Report = Callable[[str], None]
"""Told what is being done, before it is."""


@dataclass(frozen=True)
class CompileSpec:
    """The settings for compiling every segment.

    Args:
        made_from: what all pieces depend on: weights, variant, versions, code.
        targets: compute capabilities by the name of the engine that compiles for them.
        sizes: picture sizes (height, width) in pixels, for engines with a profile.
        max_images: images per call, for engines with a profile.
        precision: of the UNet and the text encoder.
        vae_precision: of the VAE.
        static: whether such engines are for nothing but the first size and that many images, with guidance.
        text_chunks: how many chunks of text they take.
    """

    made_from: Mapping[str, Any]
    targets: Mapping[str, Sequence[str]]
    sizes: Sequence[tuple[int, int]]
    max_images: int
    precision: Precision
    vae_precision: VaePrecision
    static: bool = False
    text_chunks: int = 1

    def precision_of(self, segment: Segment) -> VaePrecision:
        """The precision that a segment computes in."""
        return self.vae_precision if VAE.issuperset(segment.units) else self.precision


@dataclass(frozen=True)
class Writer:
    """Writes segments of a graph into a bundle, for some engines."""

    graph: Graph
    engines: Sequence[Engine]
    spec: CompileSpec
    pieces: Artifacts

    def keys(self, segment: Segment) -> dict[str, str]:
        """The keys of a segment's pieces, by piece: ``onnx``, and the name of each engine that compiles."""
        precision = self.spec.precision_of(segment)
        keys = {"onnx": key_of({**self._made_from(segment), "precision": precision, "opset": opset_of(precision)})}
        for engine in self.engines:
            if engine.compiles:
                profile = vars(self._profile(segment)) if engine.has_profile else None
                made_by = {"engine": engine.name, "version": engine.version(), "targets": self.spec.targets[engine.name]}
                keys[engine.name] = key_of({"onnx": keys["onnx"], **made_by, "profile": profile})
        return keys

    def _made_from(self, segment: Segment) -> dict[str, Any]:
        """All that a segment's graph and weights depend on. Text encoder and VAE are the same beside whichever UNet."""
        part = part_of(segment.units[0])
        apart = {"source", "parts", "loras"} if part == "unet" else {"source", "parts", "loras", "variant"}
        shared = {name: value for name, value in self.spec.made_from.items() if name not in apart}
        names = (*segment.inputs, *segment.outputs)
        return {
            **shared,
            "weights": self.spec.made_from["parts"][part],
            "changes": self.graph.parts.changes(segment.units),
            "clip_skip": self.graph.parts.clip_skip if TEXT in segment.units else 0,
            "segment": segment.name,
            "units": segment.units,
            "inputs": segment.inputs,
            "outputs": segment.outputs,
            "features": {name: self.graph.features[name].model_dump(mode="json") for name in names},
            "depth": self._depth(segment),
        }

    def _depth(self, segment: Segment) -> int:
        """The number that latent height and width must be multiples of: 1 for the text encoder and the VAE."""
        return self.graph.depth if part_of(segment.units[0]) == "unet" else 1

    def is_written(self, segment: Segment) -> bool:
        """Whether there is nothing left to do."""
        return all(self.pieces.find(key) is not None for key in self.keys(segment).values())

    def write(self, segment: Segment, report: Report = lambda what: None) -> Segment:
        """Trace and compile a segment, as far as that is not done; returns it with its files.

        Raises:
            SourceError: its weights cannot be read.
            EngineError: an engine refuses it.
        """
        started = time.perf_counter()
        keys = self.keys(segment)
        onnx = self.pieces.find(keys["onnx"])
        todo = [engine for engine in self.engines if engine.compiles and self.pieces.find(keys[engine.name]) is None]
        path = self.pieces.folder / "segments" / f"{segment.name}.onnx"
        program, worked = None, onnx is None or bool(todo)
        if not worked:
            report("kept")
        if onnx is None or any(engine.wants_program for engine in todo):
            report("tracing")
            program = trace_program(segment, self.graph.segment_module(segment), self.graph.features, self._depth(segment))
        if onnx is None:
            assert program is not None
            path.parent.mkdir(exist_ok=True)
            opset = opset_of(self.spec.precision_of(segment))
            onnx = self.pieces.add(keys["onnx"], write_onnx(program, segment, path, opset))
        traced = Traced(segment, path, program if any(engine.wants_program for engine in todo) else None)
        del program
        if self.graph.parameters(segment) > _LARGE:
            _let_go()
        for engine in todo:
            report(f"compiling for {engine.name}")
            stem = self.pieces.folder / "engines" / engine.name / segment.name
            targets, cache_dir = self.spec.targets[engine.name], self.pieces.hidden.parent
            paths = engine.compile(traced, stem, self._profile(segment), targets, cache_dir)
            self.pieces.add(keys[engine.name], paths)
        compiled = {engine.name: self._compiled(engine, keys[engine.name]) for engine in self.engines if engine.compiles}
        seconds = round(time.perf_counter() - started, 1) if worked else 0.0
        return segment.model_copy(update={"onnx": onnx, "key": keys["onnx"], "engines": compiled, "seconds": seconds})

    def _compiled(self, engine: Engine, key: str) -> Compiled:
        files = self.pieces.find(key)
        assert files is not None
        return Compiled(files=files, version=engine.version(), targets=tuple(self.spec.targets[engine.name]), key=key)

    def _profile(self, segment: Segment) -> Profile:
        spec, graph = self.spec, self.graph
        scale, chunks = graph.vae_scale, spec.text_chunks
        return profile_of(segment, graph.features, spec.sizes, spec.max_images, scale, spec.static, chunks)


def _let_go() -> None:
    """Give memory that is no longer used back to the system, as far as Python and the C library can be made to."""
    gc.collect()  # a traced program is full of cycles that hold its weights
    with suppress(AttributeError, OSError):  # only glibc has it
        ctypes.CDLL(None).malloc_trim(0)


def profile_of(
    segment: Segment,
    features: Mapping[str, Feature],
    sizes: Sequence[tuple[int, int]],
    max_images: int,
    vae_scale: int,
    static: bool = False,
    text_chunks: int = 1,
) -> Profile:
    """The input shapes an engine must take: one row at the smallest size up to guidance for all images at the largest.

    It is optimised for one image with guidance (two rows of the UNet) at the first size, and for one chunk of text. A static one
    takes guidance for all images at the first size and nothing else; but prompts come with as many rows as they are. The VAE
    takes pictures one by one, so that the memory that it works in does not grow with their number.

    Args:
        segment: whose inputs.
        features: of the graph, by name.
        sizes: picture sizes (height, width) in pixels.
        max_images: images per call.
        vae_scale: pixels per latent, along a side.
        static: whether there is to be one shape only.
        text_chunks: how many chunks of text it must take.
    """
    _, length = resolve(features[TOKENS].shape, {"batch": 1})

    def shapes(images: int, height: int, width: int, chunks: int = 1) -> dict[str, tuple[int, ...]]:
        rows = 1 if images == 0 else 2 * images
        dims = {"batch": rows, "images": 1, "height": height // vae_scale, "width": width // vae_scale, "tokens": chunks * length}
        return {name: resolve(features[name].shape, dims) for name in segment.inputs}

    if static and TOKENS not in segment.inputs:
        only = shapes(max_images, *sizes[0])
        return Profile(only, only, only)
    heights, widths = [size[0] for size in sizes], [size[1] for size in sizes]
    largest = shapes(max_images, max(heights), max(widths), text_chunks)
    return Profile(shapes(0, min(heights), min(widths)), shapes(1, *sizes[0]), largest)
