"""The first layer that departs is named: where an engine's graph is wrong, where half precision overflows, where only a fused
kernel is wrong; and where the ONNX file itself is, no engine is blamed.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable, Sequence
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest

from engines import Bundle, make_engine
from engines.bundle.folder import describe_file
from exporter.verification.backends import Deviation, check_polygraphy
from exporter.verification.bisect import LayerSearch
from exporter.verification.layers import LayeredSegment
from tests.support.commands import Command, assert_refused

SEGMENT = "up.1"
TOLERANCE = 5e-3


def planted(bundle: Bundle, folder: Path, change: Callable[[Path, dict], list[Path]]) -> Path:
    """A copy of a bundle of which some files of one segment are others, with hashes that fit."""
    shutil.copytree(bundle.folder, folder)
    manifest = json.loads((folder / "manifest.json").read_text())
    segment = next(segment for segment in manifest["segments"] if segment["name"] == SEGMENT)
    changed = [describe_file(folder, path).model_dump() for path in change(folder, segment)]
    for files in (segment["onnx"], segment["engines"]["onnxruntime"]["files"]):
        files[:] = [next((new for new in changed if new["path"] == file["path"]), file) for file in files]
    (folder / "manifest.json").write_text(json.dumps(manifest))
    return folder


def scaled_attention(folder: Path, segment: dict) -> list[Path]:
    """In ONNX Runtime's copy the last attention multiplies scores by twice what it should."""
    path = folder / segment["engines"]["onnxruntime"]["files"][0]["path"]
    model = ir.load(path)
    last = [node for node in model.graph if node.op_type == "MultiHeadAttention"][-1]
    last.attributes["scale"] = ir.AttrFloat32("scale", 2 * last.attributes["scale"].as_float())
    ir.save(model, path)
    return [path]


def larger_weights(folder: Path, segment: dict) -> list[Path]:
    """The ONNX file's weights are not the model's."""
    path = folder / segment["onnx"][1]["path"]
    (1.01 * np.fromfile(path, np.float32)).tofile(path)
    return [path]


def test_a_fault_in_an_engines_own_graph(mini_bundle: Bundle, tmp_path: Path, exporter: Command) -> None:
    folder = planted(mini_bundle, tmp_path / "bundle", scaled_attention)
    path = folder / next(segment for segment in mini_bundle.manifest.segments if segment.name == SEGMENT).onnx[0].path
    copy = onnx.load(path.with_suffix(".ort.onnx"), load_external_data=False)
    attention = [node for node in copy.graph.node if node.op_type == "MultiHeadAttention"][-1]
    outcome = exporter("verify", folder, "--bisect", SEGMENT)
    assert outcome.code == 1
    (line,) = (line for line in outcome.out if line.startswith("the first layer that departs"))
    assert f"{attention.name} (MultiHeadAttention), whose tensor {attention.output[0]} is off by" in line
    assert exporter("verify", mini_bundle.folder, "--bisect", SEGMENT).out[-1] == "no layer departs"


def test_where_the_file_is_wrong_no_engine_is(mini_bundle: Bundle, tmp_path: Path, exporter: Command) -> None:
    folder = planted(mini_bundle, tmp_path / "bundle", larger_weights)
    outcome = exporter("verify", folder, "--bisect", SEGMENT, "--sizes", "64x64")
    assert outcome.code == 1
    assert outcome.out[-1].startswith("the ONNX file computes something else than the model")


OVERFLOWS = """
<ir_version: 9, opset_import: ["" : 20]>
planted (float16[1, 4] x) => (float16[1, 4] y)
<float16 large = {23728}, float16 small = {5145}, float16 one = {15360}>
{
    [in_range] a = Mul (x, large)
    [too_large] b = Mul (a, large)
    [back] c = Mul (b, small)
    [again] d = Mul (c, small)
    [beside] e = Add (x, one)
    [sum] y = Add (d, e)
}
"""
"""The numbers are 300, 0.001 and 1, written as their bits. 300 times 300 is above 65,504, the largest of half precision."""


@pytest.fixture
def overflowing(tmp_path: Path) -> tuple[LayeredSegment, LayeredSegment]:
    path = tmp_path / "planted.onnx"
    onnx.save(onnx.parser.parse_model(OVERFLOWS), path)
    return LayeredSegment(path, tmp_path / "reference", single=True), LayeredSegment(path, tmp_path / "tested")


def search(sides: tuple[LayeredSegment, LayeredSegment], kind: type[LayerSearch] = LayerSearch) -> LayerSearch:
    engine = make_engine("onnxruntime")
    check_polygraphy(engine)
    return kind(engine, *sides, {"x": np.ones((1, 4), np.float32)}, TOLERANCE)


def test_a_number_beyond_half_precision(overflowing: tuple[LayeredSegment, LayeredSegment]) -> None:
    bisection = search(overflowing)
    np.testing.assert_allclose(bisection.outputs_of_reference()["y"], np.full((1, 4), 2.09), rtol=1e-3)
    outputs = bisection.look(["a", "b"])
    assert outputs["a"] == Deviation(0, departs=False)
    assert outputs["b"] == Deviation(float("inf"), departs=True)
    culprit = bisection.first(outputs)
    assert culprit is not None
    assert (culprit.layer.name, culprit.layer.operator, dict(culprit.inputs)) == ("too_large", "Mul", {"a": 0})


class FusedFault(LayerSearch):
    """A compiler that is wrong only as long as nobody looks between `back` and `again`."""

    def look(self, tensors: Sequence[str]) -> dict[str, Deviation]:
        wrong = "c" not in tensors
        return {name: Deviation(0.5 * (wrong and name in "dy"), departs=wrong and name in "dy") for name in [*tensors, "y"]}


def test_a_fault_that_goes_when_one_looks_is_in_a_fused_kernel(overflowing: tuple[LayeredSegment, LayeredSegment]) -> None:
    bisection = search(overflowing, FusedFault)
    culprit = bisection.first(bisection.look(()))
    assert culprit is not None
    assert (culprit.layer.tensor, culprit.fused_over, culprit.deviation.error) == ("y", "c", 0.5)


def test_mistakes_are_one_line(mini_bundle: Bundle, exporter: Command, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = mini_bundle.folder
    assert_refused(exporter("verify", folder, "--bisect", "up.9"), "no segment 'up.9'", "up.3.layer.2")
    assert_refused(exporter("verify", folder, "--bisect", SEGMENT, "--engine", "torch"), "torch", "choose one of onnxruntime")
    assert_refused(exporter("verify", folder, "--bisect", SEGMENT, "--steps", "2"), "--steps does not go with --bisect")
    assert_refused(exporter("verify", folder, "--bisect", SEGMENT, "--sizes", "64x64,128x64"), "2 sizes", "--sizes 64x64")
    monkeypatch.setitem(sys.modules, "polygraphy", None)
    assert_refused(exporter("verify", folder, "--bisect", SEGMENT), "Polygraphy", "pip install", "[debug]")
