"""Keep parts of a half-precision graph in float32, and the scores of its attentions within float16's range.

Softmax is computed in float32, between two casts that become part of the fused attention. LayerNormalization is by its definition
(stash_type). Group norms have no casts: the kernel that TensorRT makes of one sums in float32 by itself, and casts round it are
what keeps the compiler from making that kernel (docs/onnx.md); ONNX Runtime has no half-precision instance norm on the CPU and
puts casts there itself.

The product of queries and keys is float16, because a float32 product would not be fused. Scores above 65,504 overflow there, as
those of Stable Diffusion 2.1 do: queries and keys are multiplied by a further 1/4 each, and the scores by 16 once they are
float32. Powers of two cost no precision. bfloat16 has the range of float32.
"""

from collections.abc import Iterator

import numpy as np
import onnx_ir as ir

__all__ = ["WIDE", "keep_in_float32", "shrink_scores"]

WIDE = frozenset({"Softmax"})
"""Operators that compute in float32 between casts of their own."""
_HALVES = frozenset({ir.DataType.FLOAT16, ir.DataType.BFLOAT16})
_SHRINK = 4
"""Queries and keys are divided by it, scores multiplied by its square."""


def keep_in_float32(model: ir.Model) -> int:
    """Put casts to float32 and back around every operator in ``WIDE`` that has half-precision inputs; returns how many."""
    nodes = [node for node in model.graph if node.op_type in WIDE and _halves_of(node)]
    for node in nodes:
        half, *_ = _halves_of(node)
        for index, value in enumerate(node.inputs):
            if value is not None and value.dtype == half:
                node.replace_input_with(index, _cast(node, value, ir.DataType.FLOAT, before=True))
        (result,) = node.outputs
        result.dtype = ir.DataType.FLOAT
        back = _cast(node, result, half, before=False)
        readers = [(user, index) for user, index in result.uses() if user is not back.producer()]
        for user, index in readers:
            user.replace_input_with(index, back)
    return len(nodes)


def shrink_scores(model: ir.Model) -> int:
    """Divide queries and keys of half-precision attentions before their product, and make up for it in float32.

    Call it after ``keep_in_float32``. An attention whose scores are masked before the softmax is left alone. Returns how many
    were changed.
    """
    found = list(_half_attentions(model.graph))
    for number, (softmax, wide, factors) in enumerate(found):
        for side, scaled in enumerate(factors):
            (value,) = [value for value in scaled.inputs if value is not None and value.const_value is not None]
            assert value.const_value is not None
            smaller = (value.const_value.numpy() / _SHRINK).astype(np.float16)
            shrunk = _constant(model, f"score_{number}_{side}", smaller, value.name)
            scaled.replace_input_with(list(scaled.inputs).index(value), shrunk)
        grown = _constant(model, f"score_{number}_back", np.array(_SHRINK**2, np.float32), wide.name)
        product = ir.node("Mul", [wide, grown])
        product.outputs[0].dtype, product.outputs[0].shape = ir.DataType.FLOAT, wide.shape
        model.graph.insert_before(softmax, product)
        softmax.replace_input_with(0, product.outputs[0])
    return len(found)


def _half_attentions(graph: ir.Graph) -> Iterator[tuple[ir.Node, ir.Value, tuple[ir.Node, ir.Node]]]:
    """Each softmax of half-precision scores, its input in float32, and the nodes that scale queries and keys."""
    for softmax in graph:
        cast = _maker(softmax, 0, "Cast") if softmax.op_type == "Softmax" else None
        product = _maker(cast, 0, "MatMul") if cast is not None and _is_float16(cast) else None
        if cast is None or product is None:
            continue
        factors = [_maker(product, side, "Mul") for side in (0, 1)]
        if all(node is not None and any(v is not None and v.const_value is not None for v in node.inputs) for node in factors):
            yield softmax, cast.outputs[0], (factors[0], factors[1])  # type: ignore[misc]


def _maker(node: ir.Node, index: int, op_type: str) -> ir.Node | None:
    """The node that makes an input, if it is of that type."""
    value = node.inputs[index]
    made_by = value.producer() if value is not None else None
    return made_by if made_by is not None and made_by.op_type == op_type else None


def _constant(model: ir.Model, name: str, number: "np.typing.NDArray[np.generic]", like: str | None) -> ir.Value:
    """A new initializer, called after the value that it is for."""
    tensor = ir.tensor(number, name=f"{like}.{name}")
    value = ir.Value(name=tensor.name, shape=ir.Shape(number.shape), type=ir.TensorType(tensor.dtype), const_value=tensor)
    model.graph.register_initializer(value)
    return value


def _halves_of(node: ir.Node) -> list[ir.DataType]:
    """The 16-bit types among a node's inputs."""
    return [value.dtype for value in node.inputs if value is not None and value.dtype in _HALVES]


def _is_float16(node: ir.Node) -> bool:
    return ir.DataType.FLOAT16 in _halves_of(node)


def _cast(node: ir.Node, value: ir.Value, dtype: ir.DataType, *, before: bool) -> ir.Value:
    """The value in another type, by a new node beside ``node``."""
    cast = ir.node("Cast", [value], attributes={"to": ir.AttrInt64("to", int(dtype))})
    cast.outputs[0].dtype, cast.outputs[0].shape = dtype, value.shape
    graph = node.graph
    assert graph is not None
    (graph.insert_before if before else graph.insert_after)(node, cast)
    return cast.outputs[0]
