"""`python -m benchmarks.speed.kernels`: what TensorRT-RTX's compiler makes of a model's segments under several ways of export.

No GPU is needed. Every segment is traced once, written as ONNX at each opset, with and without casts to float32 round group
norms, compiled for one compute capability at one size and counted; with ``--whole`` the UNet as one engine too. Writes a JSON
file; what docs/onnx.md chooses from.
"""

import tempfile
from collections.abc import Iterator, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any
from unittest.mock import patch

from rich.box import SIMPLE
from rich.console import Console
from rich.table import Table

from benchmarks.machine import results_file, write_results
from benchmarks.old_precision import OLD_WIDE, write_wide
from engines import Segment, Traced, UserError
from engines.bundle.names import NOISE
from engines.support.cli import Parser, parse_size, run_command
from engines.tensorrt.engine import TensorRTRTX
from exporter.graph.checkpoint import open_source
from exporter.graph.graph import DTYPE, Graph, load_graph
from exporter.graph.segmentation import segments_of
from exporter.kernels import DEFAULT_TARGET, KernelCounts, count_kernels, total
from exporter.options import PRECISIONS
from exporter.segments.precision import WIDE
from exporter.segments.trace import trace_program, write_onnx
from exporter.segments.writer import profile_of

WAYS: dict[str, tuple[int, frozenset[str], bool]] = {
    "opset 18, casts round norms": (18, OLD_WIDE, False),
    "opset 18": (18, WIDE, False),
    "opset 20": (20, WIDE, False),
    "opset 21": (21, WIDE, False),
    "opset 20, channels last": (20, WIDE, True),
}
"""Opset, the operators that compute in float32 between casts, and whether features between segments lie channels last."""
BUILT = "opset 20, channels last"
"""The way that builds use."""


def measure(
    graph: Graph, segment: Segment, size: tuple[int, int], target: str, ways: Sequence[str]
) -> Iterator[tuple[str, KernelCounts]]:
    """Yield the kernels that a segment is compiled to, for each way of writing it."""
    program = trace_program(segment, graph.segment_module(segment), graph.features, graph.depth)
    profile = profile_of(segment, graph.features, [size], 1, graph.vae_scale)
    engine = TensorRTRTX()
    for way in ways:
        opset, wide, channels_last = WAYS[way]
        formats = TensorRTRTX._set_formats if channels_last else lambda engine, network: None
        with (
            tempfile.TemporaryDirectory() as folder,
            write_wide(wide),
            patch.object(TensorRTRTX, "_set_formats", formats),
        ):
            path = Path(folder) / "segment.onnx"
            write_onnx(program, segment, path, opset)
            yield way, count_kernels(segment.name, path, engine.kernels(Traced(segment, path), profile, (target,)))


def summary(graph: Graph, counts: dict[str, list[KernelCounts]], whole: dict[str, KernelCounts]) -> list[dict[str, Any]]:
    """Rows of the table: the UNet in segments and as one engine, and both halves of the VAE."""
    unet = {unit.name for unit in graph.unet_units}
    rows = []
    for way, found in counts.items():
        inside = [c for c in found if c.segment.split(".part.")[0] in _names(graph, unet)]
        parts = {"UNet": total("UNet", inside)} if inside else {}
        parts |= {c.segment: c for c in found if c.segment.startswith("vae_")}
        if way in whole:
            parts["UNet, one engine"] = whole[way]
        rows += [{"way": way, "part": name, **asdict(count)} for name, count in parts.items()]
    return rows


def _names(graph: Graph, unet: set[str]) -> set[str]:
    return {segment.name for segment in segments_of(graph, "block") if set(segment.units) <= unet}


def _chosen(segments: Sequence[Segment], names: str | None) -> Sequence[Segment]:
    """Those named, separated by commas, in their order; all where no names are given."""
    if not names:
        return segments
    wanted, known = set(names.split(",")), [segment.name for segment in segments]
    if unknown := sorted(wanted.difference(known)):
        raise UserError(f"--segments: no segment {', '.join(unknown)}; choose from: {', '.join(known)}")
    return [segment for segment in segments if segment.name in wanted]


def show(rows: Sequence[dict[str, Any]], console: Console) -> None:
    """Print the table."""
    table = Table(box=SIMPLE)
    for name in ("way", "part"):
        table.add_column(name)
    for name in ("kernels", "fused\nattn.", "fused\nnorms", "transp.", "GB\nmoved", "MB\nscratch"):
        table.add_column(name, justify="right", no_wrap=True)
    for row in rows:
        fused = (f"{row[f'fused_{name}']}/{row[name]}" for name in ("attentions", "norms"))
        moved, scratch = row["bytes_moved"] / 1e9, row["scratch_bytes"] / 1e6
        table.add_row(
            row["way"], row["part"], str(row["kernels"]), *fused, str(row["transposes"]), f"{moved:.2f}", f"{scratch:,.0f}"
        )
    console.print(table)


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write what was found."""
    parser = Parser(prog="python -m benchmarks.speed.kernels", description=__doc__)
    parser.add_argument("--source", default="random:sd15", help="source of the segments (default: %(default)s)")
    parser.add_argument("--size", type=parse_size, default=(512, 512), help="HEIGHTxWIDTH (default: 512x512)")
    parser.add_argument("--target", default=DEFAULT_TARGET, help="compute capability (default: %(default)s)")
    parser.add_argument("--precision", default="fp16", choices=PRECISIONS, help="(default: %(default)s)")
    parser.add_argument("--segments", help="only these, by name, separated by commas")
    parser.add_argument("--whole", action="store_true", help="the UNet as one engine too: takes 6 GB of memory")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/kernels.json")
    options = parser.parse_args(arguments)
    TensorRTRTX().check_targets((options.target,))
    console = Console()
    graph = load_graph(open_source(options.source, "original"), "original", DTYPE[options.precision], options.size)
    chosen = _chosen(segments_of(graph, "block"), options.segments)
    counts: dict[str, list[KernelCounts]] = {way: [] for way in WAYS}
    for segment in chosen:
        for way, count in measure(graph, segment, options.size, options.target, list(WAYS)):
            counts[way].append(count)
        console.print(
            f"{segment.name}: {', '.join(str(found[-1].kernels) for found in counts.values())} kernels", highlight=False
        )
    whole: dict[str, KernelCounts] = {}
    if options.whole:
        (unet,) = [s for s in segments_of(graph, None) if NOISE in s.units]
        whole = dict(measure(graph, unet, options.size, options.target, [BUILT]))
    rows = summary(graph, counts, whole)
    show(rows, console)
    segments = {way: [asdict(count) for count in found] for way, found in counts.items()}
    settings = {name: str(getattr(options, name)) for name in ("source", "size", "target", "precision")}
    write_results(options.out, {"settings": settings, "rows": rows, "segments": segments}, indent=1)
    console.print(f"wrote {options.out}", highlight=False)


if __name__ == "__main__":
    run_command(main)
