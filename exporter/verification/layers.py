"""An ONNX segment as layers that can be looked at: its tensors in order, copies in float32, copies that put out more tensors.

All copies lie in one folder, beside one file of weights; the bundle's own files are only read.
"""

import shutil
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir

__all__ = ["Layer", "LayeredSegment"]

_FLOATS = frozenset({ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})


@dataclass(frozen=True)
class Layer:
    """A node of the graph: the tensor it makes (its first output), its operator, and the tensors of layers that it reads."""

    tensor: str
    name: str
    operator: str
    inputs: tuple[str, ...]


class LayeredSegment:
    """One ONNX file, copied into a folder of its own.

    Args:
        path: the file; its weights lie beside it.
        folder: an empty folder for the copies. Nothing is written elsewhere.
        single: compute the graph in float32, whatever its types are; the weights keep their values.
    """

    def __init__(self, path: Path, folder: Path, *, single: bool = False) -> None:
        folder.mkdir(parents=True)
        for file in (path, *_data_files(path)):
            shutil.copyfile(file, folder / file.name)  # onnx-ir and ONNX Runtime refuse weights behind links
        self._path, self._number = folder / path.name, 0
        if single:
            model = ir.load(self._path)
            _widen(model)
            self._path = folder / "single.onnx"
            ir.save(model, self._path, external_data="single.onnx.data")

    def layers(self) -> list[Layer]:
        """Every layer that makes a tensor of real numbers, in an order in which they can run."""
        found: dict[str, Layer] = {}
        for node in ir.load(self._path).graph:
            value = node.outputs[0]
            inputs = tuple(entry.name for entry in node.inputs if entry is not None and entry.name in found)
            if value.name and (value.dtype is None or value.dtype in _FLOATS):
                found[value.name] = Layer(value.name, node.name or value.name, node.op_type, inputs)
        return list(found.values())

    def marked(self, tensors: Iterable[str]) -> Path:
        """A copy that puts out these tensors too, under their names. The last such copy is removed."""
        model = ir.load(self._path)
        made = {value.name: value for node in model.graph for value in node.outputs}
        known = {value.name for value in model.graph.outputs}
        model.graph.outputs.extend(made[name] for name in tensors if name not in known)
        (self._path.parent / f"marked-{self._number}.onnx").unlink(missing_ok=True)
        self._number += 1
        copy = self._path.parent / f"marked-{self._number}.onnx"
        ir.save(model, copy)
        return copy


def _data_files(path: Path) -> Sequence[Path]:
    """The files of a segment's weights: those that the graph refers to."""
    tensors = (value.const_value for value in ir.load(path).graph.initializers.values())
    names = {Path(tensor.location).name for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}
    return [path.parent / name for name in sorted(names)]


def _widen(model: ir.Model) -> None:
    """Make every half-precision number of a graph a float32."""
    for value in model.graph.initializers.values():
        if value.const_value is not None and value.const_value.dtype in _HALVES:
            value.const_value = ir.tensor(value.const_value.numpy().astype(np.float32), name=value.name)
            value.dtype = ir.DataType.FLOAT
    for node in model.graph:
        for name, attribute in list(node.attributes.items()):
            if attribute.type == ir.AttributeType.TENSOR and attribute.value.dtype in _HALVES:
                node.attributes[name] = ir.AttrTensor(name, ir.tensor(attribute.value.numpy().astype(np.float32)))
            elif node.op_type == "Cast" and name == "to" and ir.DataType(attribute.value) in _HALVES:
                node.attributes[name] = ir.AttrInt64(name, int(ir.DataType.FLOAT))
    values = [*model.graph.inputs, *model.graph.outputs, *(value for node in model.graph for value in node.outputs)]
    for value in values:
        if value.dtype in _HALVES:
            value.dtype = ir.DataType.FLOAT
