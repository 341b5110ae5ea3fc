"""Where a half-precision graph computes in float32: softmax, and norms, whose sums of squares leave float16's range.

LayerNormalization does so by its definition (stash_type). ONNX has no such note for the other operators, and TensorRT takes a
graph's types at their word, so that the casts are written out; a compiler can make them part of the operator's kernel.
"""

import onnx_ir as ir

__all__ = ["WIDE", "keep_in_float32"]

WIDE = frozenset({"Softmax", "InstanceNormalization"})
"""Operators that compute in float32. A group norm is exported as an InstanceNormalization between two reshapes."""


def keep_in_float32(model: ir.Model) -> int:
    """Put casts to float32 and back around every operator in ``WIDE`` that has half-precision inputs; returns how many."""
    nodes = [node for node in model.graph if node.op_type in WIDE and _is_half(node)]
    for node in nodes:
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == ir.DataType.FLOAT16:
                node.replace_input_with(index, _cast(node, value, ir.DataType.FLOAT, before=True))
        (result,) = node.outputs
        result.dtype = ir.DataType.FLOAT
        back = _cast(node, result, ir.DataType.FLOAT16, before=False)
        readers = [(user, index) for user, index in result.uses() if user is not back.producer()]
        for user, index in readers:
            user.replace_input_with(index, back)
    return len(nodes)


def _is_half(node: ir.Node) -> bool:
    return any(value is not None and value.dtype == ir.DataType.FLOAT16 for value in node.inputs)


def _cast(node: ir.Node, value: ir.Value, dtype: ir.DataType, *, before: bool) -> ir.Value:
    """The value in another type, by a new node beside ``node``."""
    cast = ir.node("Cast", [value], attributes={"to": ir.AttrInt64("to", int(dtype))})
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    graph = node.graph
    assert graph is not None
    (graph.insert_before if before else graph.insert_after)(node, cast)
    return cast.outputs[0]
