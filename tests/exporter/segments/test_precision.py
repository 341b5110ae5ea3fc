"""Half-precision graphs compute softmax in float32, scores stay in range, and group norms have no casts round them."""

from __future__ import annotations

from collections import Counter
from pathlib import Path

import numpy as np
import onnx
import onnxruntime
import pytest
import torch
from onnx.reference import ReferenceEvaluator
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.old_precision import OLD_WIDE, write_wide
from engines import Segment
from engines.bundle.manifest import Feature
from exporter.segments.trace import trace

FEATURES = {name: Feature(dtype="float16", shape=("batch", 8, "height", "width")) for name in ("x", "y")}
SEGMENT = Segment(name="s", units=("y",), inputs=("x",), outputs=("y",))


class Block(nn.Module):
    """A group norm, a layer norm and an attention, as a transformer of the UNet has them."""

    def __init__(self) -> None:
        super().__init__()
        self.group, self.layer = nn.GroupNorm(2, 8), nn.LayerNorm(8)

    def forward(self, *features: Tensor) -> tuple[Tensor]:
        (x,) = features
        tokens = self.layer(self.group(x).flatten(2).transpose(1, 2))
        heads = tokens.unflatten(2, (2, 4)).transpose(1, 2)
        found = functional.scaled_dot_product_attention(heads, heads, heads)
        return (found.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]),)


def traced(dtype: torch.dtype, path: Path) -> onnx.ModelProto:
    torch.manual_seed(0)
    name = "float16" if dtype == torch.float16 else "float32"
    features = {key: feature.model_copy(update={"dtype": name}) for key, feature in FEATURES.items()}
    trace(SEGMENT, Block().to(dtype).eval(), features, 1, path)
    return onnx.load(path)


def types(model: onnx.ModelProto) -> dict[str, int]:
    inferred = onnx.shape_inference.infer_shapes(model, strict_mode=True)
    return {value.name: value.type.tensor_type.elem_type for value in inferred.graph.value_info}


def test_softmax_is_single_precision_inside_and_norms_have_no_casts(tmp_path: Path) -> None:
    model = traced(torch.float16, tmp_path / "half.onnx")
    onnx.checker.check_model(model, full_check=True)
    known, found = types(model), Counter[str]()
    expected = {"Softmax": onnx.TensorProto.FLOAT, "InstanceNormalization": onnx.TensorProto.FLOAT16}
    for node in model.graph.node:
        if node.op_type in expected:
            found[node.op_type] += 1
            assert known[node.output[0]] == expected[node.op_type]
        if node.op_type in {"MatMul", "LayerNormalization"}:
            assert known[node.output[0]] == onnx.TensorProto.FLOAT16
        if node.op_type == "LayerNormalization":
            (stash,) = [a.i for a in node.attribute if a.name == "stash_type"]
            assert stash == onnx.TensorProto.FLOAT
    assert found == {"Softmax": 1, "InstanceNormalization": 1}


class Attention(nn.Module):
    """Scores up to some 200,000, as those of Stable Diffusion 2.1 leave float16's range."""

    def forward(self, *features: Tensor) -> tuple[Tensor]:
        (x,) = features
        heads = x.flatten(2).transpose(1, 2).unflatten(2, (2, 4)).transpose(1, 2)
        found = functional.scaled_dot_product_attention(heads, heads, heads)
        return (found.transpose(1, 2).flatten(2).transpose(1, 2).unflatten(2, x.shape[2:]),)


def test_scores_beyond_half_precision_are_right_where_products_are_half(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """ONNX's reference multiplies in float16 as it is written; ONNX Runtime on a CPU would not."""
    torch.manual_seed(0)
    x = 250 * torch.randn(2, 8, 4, 6)
    (expected,) = Attention()(x)

    def made(path: Path) -> Tensor:
        trace(SEGMENT, Attention(), FEATURES, 1, path)
        with np.errstate(all="ignore"):
            (result,) = ReferenceEvaluator(str(path)).run(None, {"x": x.half().numpy()})
        return torch.from_numpy(result).float()

    assert float((made(tmp_path / "ours.onnx") - expected).abs().max()) < 5e-3 * float(expected.abs().max())
    monkeypatch.setattr("exporter.segments.trace.shrink_scores", lambda model: 0)
    assert not made(tmp_path / "plain.onnx").isfinite().all(), "the plain product does overflow"


def test_a_single_precision_graph_has_no_casts(tmp_path: Path) -> None:
    model = traced(torch.float32, tmp_path / "single.onnx")
    assert "Cast" not in {node.op_type for node in model.graph.node}


def test_a_norm_of_large_values_is_right(tmp_path: Path) -> None:
    """Squares of 300 and more are no float16."""
    traced(torch.float16, tmp_path / "half.onnx")
    torch.manual_seed(0)
    block, x = Block().eval(), 1000 * torch.randn(2, 8, 4, 6)
    session = onnxruntime.InferenceSession(tmp_path / "half.onnx", providers=["CPUExecutionProvider"])
    (made,) = session.run(None, {"x": x.half().numpy()})
    with torch.no_grad():
        (expected,) = block(x)
    assert float((torch.from_numpy(made).float() - expected).abs().max()) < 5e-3 * float(expected.abs().max())


class Norm(nn.Module):
    """A group norm with a scale and a shift."""

    def __init__(self) -> None:
        super().__init__()
        self.group = nn.GroupNorm(4, 8)
        nn.init.normal_(self.group.weight)
        nn.init.normal_(self.group.bias)

    def forward(self, *features: Tensor) -> tuple[Tensor]:
        (x,) = features
        return (self.group(x),)


NORM_ERROR = 3e-4
"""Relative to the largest output, and what docs/onnx.md says; about what rounding that output to half precision takes."""
NORM_ERROR_WITH_CASTS = 6e-4
"""Likewise: the norm is rounded before its scale and shift."""


@pytest.mark.parametrize("size", [1.0, 1000.0])
def test_a_norm_without_casts_costs_nothing_in_onnx_runtime(tmp_path: Path, size: float) -> None:
    """On the CPU ONNX Runtime computes it in single precision, with its scale and shift: casts in the file would be worse."""
    torch.manual_seed(0)
    norm, x = Norm().half().eval(), (size * torch.randn(2, 8, 32, 48)).half()
    with torch.no_grad():
        expected = functional.group_norm(x.float(), 4, norm.group.weight.float(), norm.group.bias.float())

    def error(path: Path) -> float:
        trace(SEGMENT, norm, FEATURES, 1, path)
        session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
        made = torch.from_numpy(session.run(None, {"x": x.numpy()})[0])
        assert made.dtype == torch.float16
        return float((made.float() - expected).abs().max() / expected.abs().max())

    plain = error(tmp_path / "plain.onnx")
    with write_wide(OLD_WIDE):
        cast = error(tmp_path / "cast.onnx")
    assert "Cast" in {node.op_type for node in onnx.load(tmp_path / "cast.onnx").graph.node}
    assert 1e-5 < plain < NORM_ERROR < cast < NORM_ERROR_WITH_CASTS


@pytest.mark.parametrize("dtype", [torch.float16, torch.float32])
def test_a_graph_does_not_tell_where_it_was_made(dtype: torch.dtype, tmp_path: Path) -> None:
    traced(dtype, tmp_path / "graph.onnx")
    assert str(Path(__file__).parents[3]).encode() not in (tmp_path / "graph.onnx").read_bytes()
