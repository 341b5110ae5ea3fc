"""`python -m benchmarks.speed.vae_scratch`: the memory that the VAE's engines work in, for calls of one image and of several.

No GPU is needed: TensorRT-RTX's compiler says what memory an engine takes. Each half of the VAE is compiled at the largest shapes
of the profile that a build for so many images gives it, and beside it at all images at once, as it would be if it did not take
them one by one. Writes a JSON file.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.machine import results_file, write_results
from engines import Profile, Segment, Traced
from engines.bundle.names import VAE
from engines.bundle.shapes import resolve
from engines.support.cli import Parser, parse_size, run_command
from engines.tensorrt.engine import TensorRTRTX
from exporter.graph.checkpoint import open_source
from exporter.graph.graph import DTYPE, Graph, load_graph
from exporter.graph.segmentation import segments_of
from exporter.kernels import DEFAULT_TARGET
from exporter.segments.trace import opset_of, trace_program, write_onnx
from exporter.segments.writer import profile_of


@dataclass(frozen=True)
class Scratch:
    """Bytes that one half of the VAE works in, for a call of so many images, of which it takes so many at a time."""

    segment: str
    images: int
    at_a_time: int
    scratch_bytes: int


def measure(graph: Graph, segment: Segment, size: tuple[int, int], images: Sequence[int], engine: TensorRTRTX, target: str,
            precision: str) -> Iterator[Scratch]:  # fmt: skip
    """One segment for each number of images, as builds make it and all at once."""
    program = trace_program(segment, graph.segment_module(segment), graph.features, graph.depth)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "segment.onnx"
        write_onnx(program, segment, path, opset_of(precision))  # type: ignore[arg-type]
        for count in images:
            built = profile_of(segment, graph.features, [size], count, graph.vae_scale).maximum
            dims = {"images": count, "height": size[0] // graph.vae_scale, "width": size[1] // graph.vae_scale}
            together = {name: resolve(graph.features[name].shape, dims) for name in segment.inputs}
            for shapes in (built, together) if count > 1 else (built,):
                found = engine.kernels(Traced(segment, path), Profile(shapes, shapes, shapes), (target,))
                yield Scratch(segment.name, count, next(iter(shapes.values()))[0], found.scratch_bytes)


def show(rows: Sequence[Scratch], console: Console) -> None:
    """Print the table."""
    table = Table(box=SIMPLE)
    for name in ("part", "images of a call", "at a time", "scratch MB"):
        table.add_column(name, justify="left" if name == "part" else "right")
    for row in rows:
        table.add_row(row.segment, str(row.images), str(row.at_a_time), f"{row.scratch_bytes / 1e6:,.0f}")
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write what was found."""
    parser = Parser(prog="python -m benchmarks.speed.vae_scratch", description=__doc__)
    parser.add_argument("--source", default="random:sd15", help="source of the VAE (default: %(default)s)")
    parser.add_argument("--size", type=parse_size, default=(512, 512), help="HEIGHTxWIDTH (default: 512x512)")
    parser.add_argument("--images", default="1,4", help="images of a call (default: %(default)s)")
    parser.add_argument("--target", default=DEFAULT_TARGET, help="compute capability (default: %(default)s)")
    parser.add_argument("--precision", default="fp16", choices=tuple(DTYPE), help="(default: %(default)s)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/vae-scratch.json")
    options = parser.parse_args(arguments)
    engine = TensorRTRTX()
    engine.check_targets((options.target,))
    wide = "fp32" if options.precision == "bf16" else options.precision
    dtypes = DTYPE[wide], options.size, DTYPE[options.precision]  # type: ignore[index]
    graph = load_graph(open_source(options.source, "original"), "original", *dtypes)
    images = [int(count) for count in options.images.split(",")]
    halves = [segment for segment in segments_of(graph, "block") if VAE.issuperset(segment.units)]
    rows = [
        row
        for segment in halves
        for row in measure(graph, segment, options.size, images, engine, options.target, options.precision)
    ]
    show(rows, Console())
    settings = {name: str(getattr(options, name)) for name in ("source", "size", "target", "precision")}
    settings["tensorrt-rtx"] = engine.version()
    write_results(options.out, {"settings": settings, "rows": [asdict(row) for row in rows]}, indent=1)
    print(f"wrote {options.out}")


if __name__ == "__main__":
    run_command(main)
