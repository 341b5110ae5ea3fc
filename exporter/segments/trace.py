"""Trace a segment to a program and write it as ONNX, with dynamic batch, height and width.

Why opset 20, and attention as two matrix products and a softmax: docs/onnx.md.
"""

import errno
import os
import warnings
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from onnx_ir.passes.common import ClearMetadataAndDocStringPass
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from engines import DTYPES, Segment, Traced
from engines.bundle.manifest import Feature, VaePrecision
from engines.bundle.shapes import resolve
from engines.support.cli import quiet_logs
from exporter.segments.precision import keep_in_float32, shrink_scores
from exporter.segments.quick_export import quick_export, quick_trace

__all__ = ["OPSET", "opset_of", "trace", "trace_program", "write_onnx"]

OPSET = 20
"""GELU is one operator from 20 on. Opset 21's group norm gains nothing more, and 23's attention does not build in fp32."""
_OPSET_BF16 = 22
"""The first whose convolutions and norms take bfloat16."""

# Sizes of the example: no two alike and none equal to 1, so that nothing is taken for a constant.
_EXAMPLE = {"batch": 2, "images": 2, "height": 2, "width": 3, "tokens": 5}

# diffusers' upsampler branches at 64 rows (to copy, not to compute otherwise). Only the torch engine holds to the limit.
_MAX_ROWS = 63


def opset_of(precision: VaePrecision) -> int:
    """The opset that a segment of a precision is written at."""
    return _OPSET_BF16 if precision == "bf16" else OPSET


def trace(segment: Segment, module: nn.Module, features: Mapping[str, Feature], depth: int, path: Path) -> Traced:
    """Trace one segment and write it as ONNX; see ``trace_program`` and ``write_onnx``."""
    program = trace_program(segment, module, features, depth)
    write_onnx(program, segment, path)
    return Traced(segment, path, program)


def trace_program(segment: Segment, module: nn.Module, features: Mapping[str, Feature], depth: int) -> ExportedProgram:
    """Trace one segment.

    Args:
        segment: names the inputs and outputs, in the order in which ``module`` takes and returns them.
        module: in evaluation mode, on the CPU.
        features: dtype and symbolic shape of every feature.
        depth: latent height and width are multiples of this number.
    """
    sizes = {name: size * depth if name in {"height", "width"} else size for name, size in _EXAMPLE.items()}
    base = {name: Dim(f"{name}_{depth}") if name in {"height", "width"} else Dim(name, max=_MAX_ROWS) for name in _EXAMPLE}
    arguments = tuple(_example(features[name], sizes) for name in segment.inputs)
    dynamic = tuple(_dynamic(features[name], base, depth) for name in segment.inputs)
    with torch.no_grad(), torch.autocast("cpu", enabled=False), _quiet(), quick_trace():
        return torch.export.export(module.eval(), arguments, dynamic_shapes=(dynamic,), strict=False)


def write_onnx(program: ExportedProgram, segment: Segment, path: Path, opset: int = OPSET) -> list[Path]:
    """Write a segment's program as ONNX: ``path``, and beside it, where there are weights, ``path`` with ``.data`` added.

    Returns:
        The files.
    """
    with torch.no_grad(), _quiet(), quick_export():
        onnx = torch.onnx.export(
            program,
            input_names=list(segment.inputs),
            output_names=list(segment.outputs),
            opset_version=opset,
            dynamo=True,
            verbose=False,
            optimize=False,
        )
        assert onnx is not None
        weights = list(onnx.model.graph.initializers.values())
        onnx.optimize()
    ClearMetadataAndDocStringPass()(onnx.model)  # the lines of code that made each node name folders of the machine that builds
    keep_in_float32(onnx.model)
    shrink_scores(onnx.model)
    try:
        onnx.save(path, external_data=True)
    except OSError as error:
        if error.errno is None:  # a tensor is written by NumPy, which only knows that less was written than there is
            raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)} ({error})", str(path)) from error
        raise
    for value in (*weights, *onnx.model.graph.initializers.values()):
        value.const_value = None  # until the next export PyTorch's exporter holds on to the graph, and that to the weights
    return [file for file in (path, path.with_name(f"{path.name}.data")) if file.exists()]


def _example(feature: Feature, sizes: Mapping[str, int]) -> Tensor:
    shape, dtype = resolve(feature.shape, sizes), DTYPES[feature.dtype]
    return torch.zeros(shape, dtype=dtype) if dtype == torch.int64 else torch.randn(shape, dtype=dtype)


def _dynamic(feature: Feature, base: Mapping[str, object], depth: int) -> dict[int, object]:
    """Which dimensions vary: heights and widths as multiples of the deepest feature's, so that skips are known to fit."""
    dynamic: dict[int, object] = {}
    for position, dim in enumerate(feature.shape):
        if isinstance(dim, int):
            continue
        name = next(name for name in base if name in dim)
        factor = resolve((dim,), {name: depth})[0] if name in {"height", "width"} else 1
        dynamic[position] = base[name] if factor == 1 else factor * base[name]  # type: ignore[operator]
    return dynamic


@contextmanager
def _quiet() -> Iterator[None]:
    """Keep the exporter's own chatter out of the build's output; errors are raised, not logged."""
    with quiet_logs(), warnings.catch_warnings(action="ignore"):
        yield
