"""`python -m benchmarks.speed.opsets`: one block of a UNet of Stable Diffusion 1.5's widths (random weights) at several opsets.

For each opset and precision: how many layers TensorRT-RTX reads the block into (before its compiler), in what time it builds it,
how large the engine is, or why it does not build; and in ONNX Runtime on the CPU the time of a run over that of opset 18, in
turns, with the copy for ONNX Runtime (each attention one operator) beside. What docs/onnx.md chooses from.
"""

import tempfile
import time
from collections.abc import Sequence
from functools import partial
from pathlib import Path
from typing import Any

from rich.console import Console
from rich.table import Table

from benchmarks.condconv.forms import ratios, session
from benchmarks.machine import results_file, write_results
from benchmarks.speed.full_size import random_inputs
from engines import EngineError, Segment, Traced, make_engine
from engines.ort.fuse_attention import fuse_attention
from engines.support.cli import Parser, run_command
from exporter.graph.checkpoint import open_source
from exporter.graph.graph import DTYPE, Graph, load_graph
from exporter.graph.segmentation import segments_of
from exporter.options import PRECISIONS
from exporter.segments.trace import trace_program, write_onnx
from exporter.segments.writer import profile_of

OPSETS = (18, 20, 21, 23)
SIZE = (512, 512)
TARGET = "sm89"


def graph_of(source: str, precision: str, block: str) -> tuple[Graph, Segment]:
    """A source's graph in a precision, and the segment of that name in its cut by block."""
    graph = load_graph(open_source(source, "original"), "original", DTYPE[precision], SIZE)  # type: ignore[index]
    (segment,) = [segment for segment in segments_of(graph, "block") if segment.name == block]
    return graph, segment


def in_rtx(graph: Graph, segment: Segment, path: Path) -> dict[str, Any]:
    """TensorRT-RTX's engine of an ONNX file: layers, seconds and megabytes, or the reason why not."""
    engine = make_engine("tensorrt-rtx")
    traced, profile = Traced(segment, path), profile_of(segment, graph.features, [SIZE], 4, graph.vae_scale)
    started = time.perf_counter()
    try:
        (made,) = engine.compile(traced, path.with_suffix(""), profile, [TARGET])
    except EngineError as error:
        return {"error": str(error).splitlines()[0]}
    seconds = round(time.perf_counter() - started, 2)
    return {"layers": layers(path), "seconds": seconds, "megabytes": round(made.stat().st_size / 1e6, 1)}


def layers(path: Path) -> int:
    """How many layers the network has that TensorRT-RTX reads an ONNX file into; the engine has others."""
    import tensorrt_rtx as trt

    log = trt.Logger(trt.Logger.ERROR)
    network = trt.Builder(log).create_network(1 << int(trt.NetworkDefinitionCreationFlag.STRONGLY_TYPED))
    parser = trt.OnnxParser(network, log)
    assert parser.parse_from_file(str(path))
    return int(network.num_layers)


def measure(source: str, block: str, side: int, rounds: int, threads: int, folder: Path) -> list[dict[str, Any]]:
    """One row for each precision and opset; ``side`` is the latents' height and width in ONNX Runtime."""
    rows: list[dict[str, Any]] = []
    sessions = {}
    for precision in PRECISIONS:
        graph, segment = graph_of(source, precision, block)
        program = trace_program(segment, graph.segment_module(segment), graph.features, graph.depth)
        for opset in OPSETS:
            path = folder / f"{precision}-{opset}.onnx"
            write_onnx(program, segment, path, opset)
            rows.append({"precision": precision, "opset": opset, "rtx": in_rtx(graph, segment, path)})
            if precision == "fp32":
                sessions[str(opset)] = session(path, threads)
        if precision == "fp32":
            copy = folder / "copy.onnx"
            assert fuse_attention(folder / "fp32-18.onnx", copy)
            sessions["18, one operator"] = session(copy, threads)
            rows.append({"precision": precision, "opset": "18, one operator", "rtx": {}})
            sizes = {"batch": 2, "height": side, "width": side}
            inputs = random_inputs(segment.inputs, graph.features, sizes)
            feed = {name: tensor.numpy() for name, tensor in inputs.items()}
    for name, row in ratios({name: partial(one.run, None, feed) for name, one in sessions.items()}, "18", rounds).items():
        next(r for r in rows if r["precision"] == "fp32" and str(r["opset"]) == name)["onnxruntime"] = row
    return rows


def show(rows: Sequence[dict[str, Any]]) -> None:
    """Print the table."""
    table = Table("precision", "opset", "layers as read", "RTX s", "RTX MB", "ONNX Runtime time", "low", "high", "ms")
    for row in rows:
        rtx, cpu = row["rtx"], row.get("onnxruntime", {})
        made = [str(rtx.get(key, "")) for key in ("layers", "seconds", "megabytes")]
        if "error" in rtx:
            made = ["does not build", "", ""]
        table.add_row(row["precision"], str(row["opset"]), *made, *(str(cpu.get(k, "")) for k in ("ratio", "low", "high", "ms")))
    Console(width=130).print(table)
    for row in rows:
        if "error" in row["rtx"]:
            Console().print(f"{row['precision']}, opset {row['opset']}: {row['rtx']['error']}", highlight=False, markup=False)


def main(arguments: Sequence[str]) -> None:
    """Measure, print and write what was found."""
    parser = Parser(prog="python -m benchmarks.speed.opsets", description=__doc__)
    parser.add_argument("--source", default="random:sd15", help="source of the UNet (default: %(default)s)")
    parser.add_argument("--block", default="down.0", help="a segment of its partition by blocks (default: %(default)s)")
    parser.add_argument("--side", type=int, default=32, help="latents' height and width in ONNX Runtime (default: %(default)s)")
    parser.add_argument("--rounds", type=int, default=15, help="rounds of timing (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1, help="threads of ONNX Runtime (default: %(default)s)")
    parser.add_argument("--out", type=results_file, default="benchmarks/results/opsets.json")
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as folder:
        rows = measure(options.source, options.block, options.side, options.rounds, options.threads, Path(folder))
    settings = {"source": options.source, "block": options.block, "side": options.side, "rounds": options.rounds}
    settings |= {"threads": options.threads, "target": TARGET, "rtx": make_engine("tensorrt-rtx").version()}
    write_results(options.out, {"settings": settings, "rows": rows}, indent=1)
    show(rows)
    Console().print(f"wrote {options.out}", highlight=False)


if __name__ == "__main__":
    run_command(main)
