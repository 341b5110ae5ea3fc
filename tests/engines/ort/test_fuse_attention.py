"""Attention as one operator: the copy computes what the traced file computes, at any batch and size."""

from __future__ import annotations

import shutil
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx import TensorProto, helper
from torch import nn
from torch.export import Dim

from engines.bundle.manifest import Feature, Segment
from engines.bundle.shapes import resolve
from engines.ort.fuse_attention import fuse_attention
from exporter.segments.quick_export import quick_export, quick_trace
from tests.support.unets import manifest_of, segment_module, small_unet

SIZES = [(1, 2, 2), (2, 4, 8), (3, 16, 6)]


def operators(path: Path, kind: str) -> int:
    return sum(node.op_type == kind for node in onnx.load(path, load_external_data=False).graph.node)


def outputs(path: Path, feeds: dict[str, Any]) -> list[np.ndarray]:
    options = onnxruntime.SessionOptions()
    options.intra_op_num_threads, options.log_severity_level = 1, 3
    return onnxruntime.InferenceSession(path, options, providers=["CPUExecutionProvider"]).run(None, feeds)


def feeds_of(segment: Segment, features: dict[str, Feature], sizes: dict[str, int]) -> dict[str, Any]:
    random = np.random.default_rng(sum(sizes.values()))
    shapes = {name: resolve(features[name].shape, sizes) for name in segment.inputs}
    return {name: random.standard_normal(shape).astype(features[name].dtype) for name, shape in shapes.items()}


def error(path: Path, copy: Path, feeds: dict[str, Any]) -> float:
    """The largest difference of an output, relative to its largest value."""
    pairs = zip(outputs(path, feeds), outputs(copy, feeds), strict=True)
    return max(float(np.abs(a.astype(float) - b).max() / np.abs(a).max()) for a, b in pairs)


def export(path: Path, module: nn.Module, segment: Segment, features: dict[str, Feature]) -> None:
    """Trace with the same options as the exporter."""
    sizes = {"batch": 2, "height": 8, "width": 12}
    chosen = [features[name] for name in segment.inputs]
    with warnings.catch_warnings(), torch.no_grad(), quick_trace(), quick_export():
        warnings.simplefilter("ignore")
        torch.onnx.export(
            module.eval(), tuple(torch.randn(resolve(f.shape, sizes)).to(getattr(torch, f.dtype)) for f in chosen), path,
            dynamo=True, opset_version=18, external_data=True, verbose=False, optimize=True,
            dynamic_shapes=(tuple({n: Dim.AUTO for n, dim in enumerate(f.shape) if isinstance(dim, str)} for f in chosen),),
            input_names=list(segment.inputs), output_names=list(segment.outputs),
        )  # fmt: skip


def traced_block(folder: Path, name: str, **changes: Any) -> tuple[Path, Segment, dict[str, Feature]]:
    unet = small_unet("uneven", **changes)
    manifest = manifest_of(unet)
    segment, path = manifest.segment(name), folder / f"{name}.onnx"
    export(path, segment_module(unet, manifest, segment), segment, manifest.features)
    return path, segment, manifest.features


@pytest.fixture(scope="module")
def traced_once(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Segment, dict[str, Feature]]:
    """The block whose transformers have convolutions at their ends; its files are not to be changed."""
    return traced_block(tmp_path_factory.mktemp("block"), "down.1")


@pytest.fixture
def block(traced_once: tuple[Path, Segment, dict[str, Feature]], tmp_path: Path) -> tuple[Path, Segment, dict[str, Feature]]:
    """The same, in a folder of the test's own."""
    path, segment, features = traced_once
    shutil.copytree(path.parent, tmp_path, dirs_exist_ok=True)
    return tmp_path / path.name, segment, features


@pytest.mark.parametrize("linear", [False, True])
@pytest.mark.slow
def test_self_and_cross_attention_of_a_block(tmp_path: Path, linear: bool, request: pytest.FixtureRequest) -> None:
    path, segment, features = (
        traced_block(tmp_path, "down.1", use_linear_projection=True) if linear else request.getfixturevalue("block")
    )
    copy = tmp_path / "down.1.ort.onnx"
    assert fuse_attention(path, copy) == 2
    assert operators(path, "Softmax") == operators(copy, "MultiHeadAttention") == 2
    assert operators(copy, "Softmax") == 0
    for batch, height, width in SIZES:
        feeds = feeds_of(segment, features, {"batch": batch, "height": 2 * height, "width": 2 * width})
        # Sums in another order differ by some 1e-7; another scale or number of heads by 1e-2.
        assert error(path, copy, feeds) < 1e-5


class Attention(nn.Module):
    """(batch, tokens, 16) and (batch, others, 16) -> (batch, tokens, 16), by two heads of 8; with a mask where it is causal."""

    def __init__(self, causal: bool = False, scale: float | None = None) -> None:
        super().__init__()
        self.projections = nn.ModuleList(nn.Linear(16, 16) for _ in range(3))
        self.causal, self.scale = causal, scale

    def forward(self, *features: torch.Tensor) -> torch.Tensor:
        tokens, others = features
        parts = zip(self.projections, (tokens, others, others), strict=True)
        query, key, value = (layer(x).unflatten(2, (2, 8)).transpose(1, 2) for layer, x in parts)
        mixed = nn.functional.scaled_dot_product_attention(query, key, value, is_causal=self.causal, scale=self.scale)
        return mixed.transpose(1, 2).flatten(2)


def traced_attention(folder: Path, module: Attention, dtype: str = "float32") -> tuple[Path, Segment, dict[str, Feature]]:
    features = {name: Feature(dtype=dtype, shape=("batch", length, 16)) for name, length in (("x", 6), ("y", 6), ("z", 6))}
    segment = Segment(name="attention", units=(), inputs=("x", "y"), outputs=("z",))
    torch.manual_seed(0)
    export(folder / "attention.onnx", module.to(getattr(torch, dtype)), segment, features)
    return folder / "attention.onnx", segment, features


@pytest.mark.parametrize("scale", [None, 0.7])
def test_the_scale_is_the_model_s(tmp_path: Path, scale: float | None) -> None:
    path, segment, features = traced_attention(tmp_path, Attention(scale=scale))
    assert fuse_attention(path, tmp_path / "copy.onnx") == 1
    assert error(path, tmp_path / "copy.onnx", feeds_of(segment, features, {"batch": 3})) < 1e-5


def with_wide_softmax(path: Path) -> None:
    """Put the softmax into single precision."""
    model = onnx.load(path)
    (softmax,) = (node for node in model.graph.node if node.op_type == "Softmax")
    (scores,), (weights,) = softmax.input, softmax.output
    softmax.input[0], softmax.output[0] = "wide scores", "wide weights"
    place = list(model.graph.node).index(softmax)
    model.graph.node.insert(place + 1, helper.make_node("Cast", ["wide weights"], [weights], to=TensorProto.FLOAT16))
    model.graph.node.insert(place, helper.make_node("Cast", [scores], ["wide scores"], to=TensorProto.FLOAT))
    del model.graph.value_info[:]
    model = onnx.shape_inference.infer_shapes(model)
    onnx.save(model, path)


@pytest.mark.parametrize("wide", [False, True])
def test_half_precision(tmp_path: Path, wide: bool) -> None:
    """ONNX Runtime's CPU has no such operator for halves: it puts casts around it, as around most others."""
    path, segment, features = traced_attention(tmp_path, Attention(), "float16")
    if wide:
        with_wide_softmax(path)
    assert fuse_attention(path, tmp_path / "copy.onnx") == 1
    assert operators(tmp_path / "copy.onnx", "Cast") == 0
    # Rounding to halves is 5e-4 a time.
    assert error(path, tmp_path / "copy.onnx", feeds_of(segment, features, {"batch": 3})) < 3e-3


def test_an_attention_with_a_mask_stays(tmp_path: Path) -> None:
    path, _, _ = traced_attention(tmp_path, Attention(causal=True))
    assert operators(path, "Softmax") == 1
    assert fuse_attention(path, tmp_path / "copy.onnx") == 0
    assert not (tmp_path / "copy.onnx").exists()


@pytest.mark.slow
def test_weights_are_not_read(block: tuple[Path, Segment, dict[str, Feature]], tmp_path: Path) -> None:
    path, segment, features = block
    data = tmp_path / "down.1.onnx.data"
    content = data.read_bytes()
    data.unlink()
    assert fuse_attention(path, tmp_path / "down.1.ort.onnx") == 2
    data.write_bytes(content)
    feeds = feeds_of(segment, features, {"batch": 1, "height": 4, "width": 4})
    assert error(path, tmp_path / "down.1.ort.onnx", feeds) < 1e-5
