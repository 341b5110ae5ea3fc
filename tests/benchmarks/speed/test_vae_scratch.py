"""The memory that the VAE works in does not grow with the images of a call, as TensorRT-RTX's compiler says with no GPU."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch

from benchmarks.speed.vae_scratch import measure
from engines.tensorrt.engine import TensorRTRTX
from exporter.graph.checkpoint import open_source
from exporter.graph.graph import load_graph
from exporter.graph.segmentation import segments_of
from tests.support.sources import save_source

ROOT = Path(__file__).resolve().parents[3]


def test_the_committed_file_names_the_compiler_and_is_what_the_page_says() -> None:
    written, page = json.loads((ROOT / "benchmarks/results/vae-scratch.json").read_text()), (ROOT / "docs/onnx.md").read_text()
    assert written["settings"]["tensorrt-rtx"] == written["versions"]["tensorrt-rtx"]
    sizes = {(row["segment"], row["images"], row["at_a_time"]): f"{row['scratch_bytes'] / 1e6:,.0f}" for row in written["rows"]}
    for words, key in (("a call of 1 image", (1, 1)), ("a call of 4 images", (4, 1)), ("4 images, taken at once", (4, 4))):
        assert f"| {words} | {sizes['vae_decoder', *key]} | {sizes['vae_encoder', *key]} |" in page


@pytest.mark.slow
def test_scratch_for_one_image_and_for_four(tmp_path: Path) -> None:
    pytest.importorskip("tensorrt_rtx")
    graph = load_graph(open_source(str(save_source(tmp_path / "source")), "original"), "original", torch.float16, (128, 128))
    (decoder,) = (segment for segment in segments_of(graph, "block") if segment.name == "vae_decoder")
    rows = measure(graph, decoder, (128, 128), [1, 4], TensorRTRTX(), "sm89", "fp16")
    found = {(row.images, row.at_a_time): row.scratch_bytes for row in rows}
    assert found[1, 1] == found[4, 1] > 0
    assert found[4, 4] > 2 * found[4, 1], "what it was when all images were taken at once"
